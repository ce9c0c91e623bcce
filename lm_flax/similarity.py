"""What word vectors know: analogies, agreement with people's judgements of similarity, nearest neighbours."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core_flax.metrics.classification import spearman
from core_flax.types import UserError

_AT_ONCE = 1024  # questions whose scores of all words are in memory together


@dataclass(frozen=True)
class Vectors:
    """The vectors of words, each of length 1.

    Attributes:
      words: V of them, all different.
      unit_VD: their vectors.
    """

    words: Sequence[str]
    unit_VD: np.ndarray

    @classmethod
    def of(cls, tokens: Sequence[str], table_VD: np.ndarray) -> "Vectors":
        """From an embedding table: of its tokens, those that are words by themselves.

        Args:
          tokens: the text of each token, in the order of the table; "" for one that is no word. Of tokens with the same
            text the first counts.
          table_VD: their vectors; rows beyond the tokens are padding.
        """
        first = {text: number for number, text in reversed(list(enumerate(tokens))) if text}
        rows = np.array(sorted(first.values()), np.int64)
        vectors_VD = np.asarray(table_VD, np.float32)[rows]
        # A vector of zeros, as a word has that never occurred, stays one: it is like nothing.
        lengths_V = np.linalg.norm(vectors_VD, axis=1, keepdims=True)
        return cls([tokens[int(row)] for row in rows], vectors_VD / np.where(lengths_V == 0, 1, lengths_V))

    def finder(self) -> Callable[[str], int]:
        """A function that tells a word's place, -1 if it has none: as it is written or, failing that, in any case."""
        exact = {word: number for number, word in enumerate(self.words)}
        lower = {word.lower(): number for word, number in reversed(exact.items())}
        return lambda word: exact.get(word, lower.get(word.lower(), -1))


def neighbours(vectors: Vectors, word: str, number: int = 10) -> list[tuple[str, float]]:
    """The words whose vectors point in the most similar direction, with the cosine; the word itself left out.

    Raises:
      UserError: it is not in the vocabulary.
    """
    at = vectors.finder()(word)
    if at < 0:
        raise UserError(f"{word!r} is no token of this model's vocabulary by itself; give another word")
    cosine_V = vectors.unit_VD @ vectors.unit_VD[at]
    order = np.argsort(-cosine_V, kind="stable")
    return [(vectors.words[int(each)], float(cosine_V[each])) for each in order if each != at][:number]


Question = tuple[str, str, str, str]
"""a, b, c, d: a is to b as c is to d."""


def read_questions(path: str | Path) -> dict[str, list[Question]]:
    """The questions of a file in the layout of questions-words.txt, by section, of which ``: name`` is the head.

    Raises:
      UserError: it cannot be read, or a line does not have four words.
    """
    sections: dict[str, list[Question]] = {}
    current = None
    for number, line in _lines(path):
        if line.startswith(":"):
            current = sections.setdefault(line[1:].strip(), [])
            continue
        words = line.split()
        if len(words) != 4 or current is None:
            wanted = "four words" if len(words) != 4 else "the head of a section, ': name',"
            raise UserError(f"{path}, line {number}: {line!r}, where {wanted} should be")
        current.append((words[0], words[1], words[2], words[3]))
    if not any(sections.values()):
        raise UserError(f"{path} holds no questions; give a file in the layout of questions-words.txt")
    return sections


def read_judgements(path: str | Path) -> list[tuple[str, str, float]]:
    """Pairs of words and how similar people find them, in the layout of wordsim353.tsv and simlex999.txt.

    A line has two words and a number, separated by tabs; "#" begins a comment.

    Raises:
      UserError: it cannot be read, or a line is not like that.
    """
    pairs = []
    for number, line in _lines(path):
        if line.startswith("#"):
            continue
        first, second, *rest = [*line.split("\t"), "", ""]
        judged = _number(rest[0])
        if not math.isfinite(judged):
            raise UserError(
                f"{path}, line {number}: {line!r}, where two words and a number should be, separated by tabs"
            )
        pairs.append((first, second, judged))
    if not pairs:
        raise UserError(f"{path} holds no pairs of words; give a file in the layout of wordsim353.tsv")
    return pairs


def _number(text: str) -> float:
    """NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not empty."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


@dataclass(frozen=True)
class Score:
    """One measurement.

    Attributes:
      value: share of right answers, or Spearman's rank correlation; 0 where nothing was known.
      num_known: questions or pairs whose words are all in the vocabulary. The others count for nothing.
      num_all: questions or pairs of the file.
    """

    value: float
    num_known: int
    num_all: int


def analogies(vectors: Vectors, questions: Sequence[Question]) -> Score:
    """Share of questions answered right: the word nearest to b - a + c, but for a, b and c, is d.

    (3CosAdd: Mikolov, Yih and Zweig 2013, "Linguistic Regularities in Continuous Space Word Representations".)
    """
    find = vectors.finder()
    known = [[find(word) for word in question] for question in questions]
    known_Q4 = np.array([row for row in known if min(row) >= 0], np.int64).reshape(-1, 4)
    right = 0
    for start in range(0, len(known_Q4), _AT_ONCE):
        part_Q4 = known_Q4[start : start + _AT_ONCE]
        a_QD, b_QD, c_QD = (vectors.unit_VD[part_Q4[:, place]] for place in range(3))
        scores_QV = (b_QD - a_QD + c_QD) @ vectors.unit_VD.T
        np.put_along_axis(scores_QV, part_Q4[:, :3], -np.inf, axis=1)
        right += int(np.sum(np.argmax(scores_QV, axis=1) == part_Q4[:, 3]))
    return Score(right / len(known_Q4) if len(known_Q4) else 0.0, len(known_Q4), len(questions))


def judgements(vectors: Vectors, pairs: Sequence[tuple[str, str, float]]) -> Score:
    """Spearman's rank correlation of cosines with people's judgements."""
    find = vectors.finder()
    known = [(find(first), find(second), judged) for first, second, judged in pairs]
    known = [each for each in known if min(each[:2]) >= 0]
    if len(known) < 2:
        return Score(0.0, len(known), len(pairs))
    first, second = [each[0] for each in known], [each[1] for each in known]
    cosines = np.sum(vectors.unit_VD[first] * vectors.unit_VD[second], axis=1)
    return Score(spearman(cosines, [judged for *_, judged in known]), len(known), len(pairs))
