"""What the readers return: one labelled (or not) example of each kind of task, as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text or a pair of texts to classify or to score.

    Attributes:
        id: the file's own number of the row (GLUE's ``index``), else the row's place, from 0.
        label: place of the label in ``TaskSpec.labels``; a number for regression; None where the file has none.
    """

    id: str
    text: str
    text_pair: str | None
    label: int | float | None


@dataclass(frozen=True, slots=True)
class ChoiceExample:
    """A context, how the next sentence starts, and the endings of which one is right (``label``, from 0)."""

    id: str
    context: str
    start: str
    endings: tuple[str, ...]
    label: int | None


@dataclass(frozen=True, slots=True)
class TaggedExample:
    """A sentence, a tag for each of its words (IOB2), and the number of the document that it is from."""

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    document: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and the character of the context at which it starts."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class QuestionExample:
    """A question about a context, which is as the file has it: answers count its characters."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    is_impossible: bool


Example = TypeVar("Example", TextExample, ChoiceExample, TaggedExample, QuestionExample)


@dataclass(frozen=True)
class Dataset(Generic[Example]):
    """The examples of a file, in its order, and what is to be said about them.

    Attributes:
        dropped: a line for everything that was left out: where, and why.
        warnings: a line for everything that is wrong but was kept.
    """

    examples: tuple[Example, ...]
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def summarize(lines: Sequence[str], shown: int = 3) -> str:
    """The first of many lines and the number of the others, in one line."""
    others = len(lines) - shown
    return "; ".join(lines[:shown]) + (f"; and {others:,} more" if others > 0 else "")
