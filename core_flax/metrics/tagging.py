"""Entity precision, recall and F1 as the official conlleval reads tags (CoNLL-2003, Tjong Kim Sang & De Meulder)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Entity(NamedTuple):
    """A tagged stretch of one sentence: rows ``start`` to ``stop``, the latter not included."""

    type: str
    start: int
    stop: int


class EntityScores(NamedTuple):
    """Fractions, and the numbers of entities that they come from."""

    precision: float
    recall: float
    f1: float
    num_correct: int
    num_predicted: int
    num_gold: int


def parse_tag(tag: str) -> tuple[str, str]:
    """Prefix (B, I, E, S or O) and type of a tag: ``I-PER`` is ("I", "PER"), ``O`` is ("O", ""), ``B`` is ("B", "").

    Raises:
        ValueError: it is no such tag.
    """
    prefix, dash, kind = tag.partition("-")
    if prefix not in ("B", "I", "E", "S", "O") or (dash and (not kind or prefix == "O")):
        raise ValueError(f"{tag!r} is no tag; tags are O, B-TYPE and I-TYPE (and E-TYPE, S-TYPE)")
    return prefix, kind


def entities(tags: Sequence[str]) -> list[Entity]:
    """Entities of one sentence, in order, from tags in IOB1, IOB2 or IOBES.

    One rule reads all of them, as conlleval does: an entity begins at B or S, or where the row before is O, E, S or of
    another type; it goes on until the next O or beginning. So in IOB1 (the official files) I-PER after O begins a
    name, and B-PER after I-PER a second one; nothing that a model predicts is malformed.

    Raises:
        ValueError: a tag is neither O nor prefix-TYPE.
    """
    found = []
    start, before, kind_before = 0, "O", ""
    for row, tag in enumerate([*tags, "O"]):
        prefix, kind = parse_tag(tag)
        begins = prefix != "O" and (prefix in "BS" or before in "OES" or kind != kind_before)
        if before != "O" and (prefix == "O" or begins):
            found.append(Entity(kind_before, start, row))
        start = row if begins else start
        before, kind_before = prefix, kind
    return found


def entity_scores(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, EntityScores]:
    """Scores over all sentences: of every type that occurs, sorted, then of all types together under ``"all"``.

    An entity is right if type, beginning and end are. A fraction whose denominator is 0 is 0.

    Args:
        gold: tags of each sentence.
        predicted: tags of the same sentences.
    """
    num_correct: Counter[str] = Counter()
    num_predicted: Counter[str] = Counter()
    num_gold: Counter[str] = Counter()
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        assert len(gold_tags) == len(predicted_tags), (len(gold_tags), len(predicted_tags))
        right, found = set(entities(gold_tags)), set(entities(predicted_tags))
        for counter, group in ((num_correct, right & found), (num_predicted, found), (num_gold, right)):
            counter.update(entity.type for entity in group)
    kinds = sorted(num_predicted | num_gold)
    scores = {kind: _scores(num_correct[kind], num_predicted[kind], num_gold[kind]) for kind in kinds}
    return scores | {"all": _scores(num_correct.total(), num_predicted.total(), num_gold.total())}


def _scores(correct: int, predicted: int, gold: int) -> EntityScores:
    return EntityScores(
        precision=correct / predicted if predicted else 0.0,
        recall=correct / gold if gold else 0.0,
        f1=2 * correct / (predicted + gold) if predicted + gold else 0.0,
        num_correct=correct,
        num_predicted=predicted,
        num_gold=gold,
    )
