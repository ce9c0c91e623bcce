import random
import warnings

import pytest
import seqeval.metrics
from seqeval.metrics.sequence_labeling import get_entities

from core_flax.metrics.tagging import Entity, EntityScores, entities, entity_scores, parse_tag

TRICKY = [
    ("I-PER I-PER O", [("PER", 0, 2)]),
    ("O I-PER B-PER I-PER", [("PER", 1, 2), ("PER", 2, 4)]),
    ("I-LOC I-PER", [("LOC", 0, 1), ("PER", 1, 2)]),
    ("B-LOC I-PER", [("LOC", 0, 1), ("PER", 1, 2)]),
    ("B-LOC B-LOC I-LOC", [("LOC", 0, 1), ("LOC", 1, 3)]),
    ("O I-ORG O I-ORG", [("ORG", 1, 2), ("ORG", 3, 4)]),
    ("S-PER I-PER B-PER E-PER E-PER", [("PER", 0, 1), ("PER", 1, 2), ("PER", 2, 4), ("PER", 4, 5)]),
    ("B-A-B I-A-B", [("A-B", 0, 2)]),
    ("O O", []),
    ("", []),
]


@pytest.mark.parametrize(("tags", "found"), TRICKY)
def test_entities_of_tricky_tags(tags, found):
    """Worked out by hand from conlleval's tables of beginnings and ends."""
    assert entities(tags.split()) == [Entity(*entity) for entity in found]


def random_tags(draw, prefixes="BIIO", kinds=("PER", "LOC")):
    prefix_of = [draw.choice(prefixes) for _ in range(draw.randint(0, 12))]
    return [prefix if prefix == "O" else f"{prefix}-{draw.choice(kinds)}" for prefix in prefix_of]


@pytest.mark.parametrize("prefixes", ["BIIO", "IO", "BIESO"])
def test_entities_are_those_of_seqeval(prefixes):
    draw = random.Random(0)
    for _ in range(2000):
        tags = random_tags(draw, prefixes)
        expected = [Entity(kind, start, last + 1) for kind, start, last in get_entities(tags)]
        assert entities(tags) == expected, tags


def conlleval(gold, predicted):
    """The official script's loop over rows, with its state: correct, predicted and gold chunks by type."""
    counts = {"correct": {}, "predicted": {}, "gold": {}}

    def split(tag):
        return (tag[0], tag[2:])

    def end(before, kind_before, tag, kind):
        ended = (before, tag) in {("B", "B"), ("B", "O"), ("I", "B"), ("I", "O")}
        return ended or (before != "O" and kind_before != kind)

    def start(before, kind_before, tag, kind):
        started = (before, tag) in {("B", "B"), ("I", "B"), ("O", "B"), ("O", "I")}
        return started or (tag != "O" and kind_before != kind)

    def add(name, kind):
        counts[name][kind] = counts[name].get(kind, 0) + 1

    in_correct = False
    last_gold = last_predicted = ("O", "")
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        for gold_tag, predicted_tag in zip([*gold_tags, "O"], [*predicted_tags, "O"], strict=True):
            now_gold, now_predicted = split(gold_tag), split(predicted_tag)
            gold_ended, predicted_ended = end(*last_gold, *now_gold), end(*last_predicted, *now_predicted)
            if in_correct and gold_ended and predicted_ended and last_gold[1] == last_predicted[1]:
                in_correct = False
                add("correct", last_gold[1])
            elif in_correct and (gold_ended != predicted_ended or now_gold[1] != now_predicted[1]):
                in_correct = False
            gold_started = start(*last_gold, *now_gold)
            predicted_started = start(*last_predicted, *now_predicted)
            in_correct |= gold_started and predicted_started and now_gold[1] == now_predicted[1]
            if gold_started:
                add("gold", now_gold[1])
            if predicted_started:
                add("predicted", now_predicted[1])
            last_gold, last_predicted = now_gold, now_predicted
    return counts


def corpus(seed, num=40):
    """Gold tags and predictions that differ from them here and there."""
    draw = random.Random(seed)
    gold = [random_tags(draw) for _ in range(num)]
    noise = [random_tags(draw, "BIO" * 10) for _ in range(1000)]
    flat = iter([tag for tags in noise for tag in tags])
    predicted = [[next(flat) if draw.random() < 0.2 else tag for tag in tags] for tags in gold]
    return gold, predicted


@pytest.mark.parametrize("seed", range(10))
def test_scores_are_those_of_conlleval_and_seqeval(seed):
    gold, predicted = corpus(seed)
    scores = entity_scores(gold, predicted)
    counts = conlleval(gold, predicted)
    assert set(scores) == {"PER", "LOC", "all"}
    for kind in ("PER", "LOC"):
        ours = scores[kind]
        assert ours.num_correct == counts["correct"][kind] > 0
        assert (ours.num_predicted, ours.num_gold) == (counts["predicted"][kind], counts["gold"][kind])
    report = seqeval.metrics.classification_report(gold, predicted, output_dict=True)
    for kind, name in (("PER", "PER"), ("LOC", "LOC"), ("all", "micro avg")):
        expected = [report[name][column] for column in ("precision", "recall", "f1-score", "support")]
        ours = scores[kind]
        assert [ours.precision, ours.recall, ours.f1, ours.num_gold] == pytest.approx(expected, abs=1e-12)


def test_scores_by_hand():
    """IOB1 gold against IOB2 predictions: the same names written otherwise are right, a name cut in two is wrong."""
    gold = [["I-PER", "I-PER", "O", "I-LOC"], ["I-ORG", "B-ORG"], ["O"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "I-ORG"], ["I-MISC"]]
    scores = entity_scores(gold, predicted)
    assert list(scores) == ["LOC", "MISC", "ORG", "PER", "all"]
    assert scores["PER"] == EntityScores(1.0, 1.0, 1.0, 1, 1, 1)
    assert scores["ORG"] == EntityScores(0.0, 0.0, 0.0, 0, 1, 2)
    assert scores["MISC"] == EntityScores(0.0, 0.0, 0.0, 0, 1, 0)
    assert scores["all"] == pytest.approx(EntityScores(2 / 4, 2 / 4, 2 / 4, 2, 4, 4))


def test_no_entities_at_all():
    assert entity_scores([["O"], []], [["O"], []]) == {"all": EntityScores(0.0, 0.0, 0.0, 0, 0, 0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert seqeval.metrics.f1_score([["O"]], [["O"]]) == 0


def test_an_entity_does_not_go_on_in_the_next_sentence():
    scores = entity_scores([["I-PER"], ["I-PER"]], [["I-PER"], ["O"]])
    assert scores["all"].num_gold == 2 and scores["all"].num_correct == 1


@pytest.mark.parametrize("tag", ["PER", "b-PER", "I_PER", "", "B-", "O-PER", "X-PER", "-PER", "I PER"])
def test_what_is_no_tag_is_refused(tag):
    with pytest.raises(ValueError, match="is no tag"):
        parse_tag(tag)
    with pytest.raises(ValueError, match=f"{tag!r} is no tag"):
        entities(["O", tag])


def test_sentences_of_different_lengths_are_a_mistake_of_the_caller():
    with pytest.raises(AssertionError):
        entity_scores([["O", "O"]], [["O"]])
    with pytest.raises(ValueError, match="shorter"):
        entity_scores([["O"], ["O"]], [["O"]])
