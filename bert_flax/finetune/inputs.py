"""From examples as text to sequences of tokens with their labels.

What the model is shown of one example is a *unit*: one sequence, or for a choice one sequence per ending. A long
context or sentence makes several units of one example, its windows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bert_flax.finetune.examples import ChoiceExample, QuestionExample, TaggedExample, TextExample
from bert_flax.finetune.spans import Context, Window, locate, windows
from core_flax.text.wordpiece import WordPiece

MAX_QUESTION_TOKENS = 64
"""Longer questions are cut, as in BERT's run_squad.py."""
NO_TAG = -1
"""Label of tokens that have none: special ones, later pieces of a word, words of the context."""


@dataclass
class Units:
    """The units of a data set, in its order.

    Attributes:
      tokens: of each sequence, ``[CLS] A [SEP]`` or ``[CLS] A [SEP] B [SEP]``.
      num_first: of each sequence, how many of its tokens are of segment 0.
      per_unit: sequences to a unit.
      example: of each unit, the number of its example.
      labels: of each unit: a class, a score, the (first, last) token of an answer, or a tag for each token; empty if
        the data has none.
      num_cut: texts, pairs, questions or words that did not fit and lost tokens.
      windows: of each unit, for spans: what it shows of its example's context.
      contexts: of each example, for spans.
      words: of each unit, for tagging: (word of the sentence, its first token) of each word that it labels.
    """

    tokens: list[list[int]] = field(default_factory=list)
    num_first: list[int] = field(default_factory=list)
    per_unit: int = 1
    example: list[int] = field(default_factory=list)
    labels: list = field(default_factory=list)
    num_cut: int = 0
    windows: list[Window] = field(default_factory=list)
    contexts: list[Context] = field(default_factory=list)
    words: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def num_units(self) -> int:
        """Units, labelled or not."""
        return len(self.example)

    @property
    def lengths(self) -> np.ndarray:
        """int [S]: tokens of each sequence."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    @property
    def content(self) -> str:
        """SHA-256 of the tokens and labels, by which other data under the same name are told."""
        digest = hashlib.sha256()
        for ids, num_first in zip(self.tokens, self.num_first, strict=True):
            digest.update(np.array([num_first, len(ids), *ids], np.int32).tobytes())
        for label in self.labels:
            digest.update(np.asarray(label, np.float64).tobytes())
        return digest.hexdigest()

    def add(self, vocabulary: WordPiece, first: Sequence[int], second: Sequence[int] | None = None) -> None:
        """Appends a sequence of one or two segments."""
        tokens = [vocabulary.cls_id, *first, vocabulary.sep_id]
        self.num_first.append(len(tokens))
        self.tokens.append(tokens if second is None else [*tokens, *second, vocabulary.sep_id])


def encode_texts(examples: Sequence[TextExample], vocabulary: WordPiece, max_length: int) -> Units:
    """Texts and pairs of texts; of a pair that is too long the longer text loses tokens at its end, one at a time."""
    units = Units(example=list(range(len(examples))))
    first = vocabulary.encode([example.text for example in examples])
    second = vocabulary.encode([example.text_pair or "" for example in examples])
    for example, a, b in zip(examples, first, second, strict=True):
        _add_cut(units, vocabulary, a, None if example.text_pair is None else b, max_length)
    units.labels = [example.label for example in examples if example.label is not None]
    return units


def encode_choices(examples: Sequence[ChoiceExample], vocabulary: WordPiece, max_length: int) -> Units:
    """For each ending the context as first segment, and how the next sentence starts with the ending as second."""
    units = Units(example=list(range(len(examples))), per_unit=len(examples[0].endings))
    contexts = vocabulary.encode([example.context for example in examples])
    texts = [f"{example.start} {ending}" for example in examples for ending in example.endings]
    for number, second in enumerate(vocabulary.encode(texts)):
        _add_cut(units, vocabulary, contexts[number // units.per_unit], second, max_length)
    units.labels = [example.label for example in examples if example.label is not None]
    return units


def _add_cut(units: Units, vocabulary: WordPiece, a: list[int], b: list[int] | None, max_length: int) -> None:
    room = max_length - (2 if b is None else 3)
    num_b = 0 if b is None else len(b)
    units.num_cut += len(a) + num_b > room
    kept_a = min(len(a), max(room - num_b, (room + 1) // 2))
    units.add(vocabulary, a[:kept_a], None if b is None else b[: room - kept_a])


def encode_questions(
    examples: Sequence[QuestionExample], vocabulary: WordPiece, max_length: int, stride: int, labelled: bool
) -> Units:
    """The question as first segment and a window of the context as second, for each window.

    A window that does not hold the whole answer is labelled with its [CLS], token 0, as both ends.

    Args:
      examples: questions with their contexts.
      vocabulary: that of the model.
      max_length: tokens of a sequence.
      stride: tokens between the starts of two windows.
      labelled: whether answers are wanted as labels: the first of each question.
    """
    units, longest = Units(), longest_question(max_length)
    encoded: dict[str, tuple[Context, list[int]]] = {}
    for number, example in enumerate(examples):
        if example.context not in encoded:
            ids, starts, ends = vocabulary.encode_with_offsets(example.context)
            encoded[example.context] = Context(example.context, starts, ends), ids.tolist()
        context, context_ids = encoded[example.context]
        (question,) = vocabulary.encode([example.question])
        units.num_cut += len(question) > longest
        question = question[:longest]
        units.contexts.append(context)
        answer = example.answers[0] if example.answers and not example.is_impossible else None
        for window in windows(len(context_ids), max_length - len(question) - 3, stride):
            units.add(vocabulary, question, context_ids[window.start : window.stop])
            units.example.append(number)
            units.windows.append(window)
            if labelled:
                found = answer and locate(context, answer.start, answer.start + len(answer.text), window)
                offset = len(question) + 2
                units.labels.append((found[0] + offset, found[1] + offset) if found else (0, 0))
    return units


def longest_question(max_length: int) -> int:
    """Tokens of a question that are shown: half of a sequence at most is not context."""
    return min(MAX_QUESTION_TOKENS, max_length // 2)


def encode_tagged(
    examples: Sequence[TaggedExample],
    vocabulary: WordPiece,
    max_length: int,
    labels: Sequence[str],
    document_context: bool,
) -> Units:
    """Sentences, of which the first piece of each word carries the word's tag (section 5.3 of the paper).

    A sentence that is too long becomes several units, each word in one of them.

    Args:
      examples: sentences, those of a document one after another.
      vocabulary: that of the model.
      max_length: tokens of a sequence.
      labels: the tags, in the order of their classes.
      document_context: whether to fill the sequence with unlabelled words of the same document, before and after.
    """
    classes = {label: number for number, label in enumerate(labels)}
    whole = [vocabulary.encode(example.words) for example in examples]
    units = Units(num_cut=sum(len(word) > max_length - 2 for sentence in whole for word in sentence))
    # Nothing is left of some words, a control character for one.
    pieces = [[ids[: max_length - 2] or [vocabulary.unk_id] for ids in sentence] for sentence in whole]
    for number, example in enumerate(examples):
        for begin, stop in _portions([len(word) for word in pieces[number]], max_length - 2):
            before, after = [], []
            if document_context:
                size = sum(len(word) for word in pieces[number][begin:stop])
                before, after = _surroundings(examples, pieces, number, begin, stop, max_length - 2 - size)
            own = pieces[number][begin:stop]
            units.add(vocabulary, [piece for word in (*before, *own, *after) for piece in word])
            units.example.append(number)
            starts = 1 + sum(map(len, before)) + np.cumsum([0, *map(len, own)])[:-1]
            units.words.append(list(zip(range(begin, stop), starts.tolist(), strict=True)))
            if example.tags is not None:
                tags = np.full(len(units.tokens[-1]), NO_TAG, np.int32)
                tags[starts] = [classes[tag] for tag in example.tags[begin:stop]]
                units.labels.append(tags)
    return units


def _portions(sizes: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Cuts words with these numbers of pieces into runs that fit, as (first word, word after the last)."""
    portions, begin, used = [], 0, 0
    for word, size in enumerate(sizes):
        if used + size > room:
            portions.append((begin, word))
            begin, used = word, 0
        used += size
    return [*portions, (begin, len(sizes))]


def _surroundings(
    examples: Sequence[TaggedExample], pieces: list[list[list[int]]], number: int, begin: int, stop: int, room: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Words of the document right before and right after words ``begin`` to ``stop``: half the room each, or more."""
    before = _words_away(examples, pieces, number, pieces[number][:begin][::-1], -1, room)
    after = _words_away(examples, pieces, number, pieces[number][stop:], 1, room)
    shown_after = _fitting(after, room - room // 2)
    shown_before = _fitting(before, room - sum(map(len, shown_after)))
    return shown_before[::-1], _fitting(after, room - sum(map(len, shown_before)))


def _words_away(
    examples: Sequence[TaggedExample],
    pieces: list[list[list[int]]],
    number: int,
    rest: list[list[int]],
    direction: int,
    room: int,
) -> list[list[int]]:
    """The rest of a sentence and then of its document in one direction, the nearest word first, until room is full."""
    found = list(rest)
    document = examples[number].document
    while sum(map(len, found)) < room:
        number += direction
        if not 0 <= number < len(examples) or examples[number].document != document:
            break
        found += pieces[number][::direction]
    return found


def _fitting(words: list[list[int]], room: int) -> list[list[int]]:
    """The first words that fit."""
    return words[: int(np.searchsorted(np.cumsum([len(word) for word in words]), room, side="right"))]
