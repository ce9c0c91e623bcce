"""The text that is prepared: pieces of documents, cut where the held-out part begins. Imports no jax."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from core_flax.data import corpora
from core_flax.data.corpora import Part


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one document, or a part of it. ``split`` is None where documents are held out as they come."""

    split: str | None
    text: str
    where: str
    last: bool


@dataclass(frozen=True)
class Input:
    """One of the inputs, and the number of characters before it of those that a share is held out of."""

    name: str
    begin: int
    is_valid: bool = False


class Text:
    """The input, which can be read again and again.

    Attributes:
      inputs: those to train on, then those held out.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        held_out: Sequence[str],
        documents: corpora.DocumentMode,
        document_start: str | None,
        valid_fraction: float,
        at_end: bool,
    ) -> None:
        """Reads all of it once if its end is held out, to know where that begins.

        Args:
          inputs: as ``read_parts`` has them.
          held_out: those of the split valid; if there are any, nothing of ``inputs`` is held out.
          documents: as ``read_parts`` has it.
          document_start: likewise.
          valid_fraction: share of ``inputs`` that is held out.
          at_end: whether that are the last characters, or documents as they come, which is not settled here.
        """
        self._documents: corpora.DocumentMode = documents
        self._document_start = document_start
        fraction = 0 if held_out else valid_fraction
        self._chosen = fraction > 0 and not at_end
        self._valid_from: int | None = None  # in characters
        begins = [0] * (len(inputs) + 1)
        if fraction and at_end:
            with _bar(inputs, "measuring the text") as bar:
                sizes = [sum(len(part.text) for part in self._parts(name, bar.update)) for name in inputs]
            begins = [0, *itertools.accumulate(sizes)]
            self._valid_from = int(begins[-1] * (1 - fraction))
        self.inputs = [Input(name, begin) for name, begin in zip(inputs, begins, strict=False)]
        self.inputs += [Input(name, 0, is_valid=True) for name in held_out]

    def _parts(self, name: str, progress: corpora.Progress) -> Iterator[Part]:
        return corpora.read_parts([name], self._documents, self._document_start, progress, verbatim=True)

    def pieces(self, title: str) -> Iterator[Piece]:
        """All of it, in order, under a progress bar."""
        with _bar([each.name for each in self.inputs], title) as bar:
            for each in self.inputs:
                yield from self.pieces_of(each, bar.update)

    def pieces_of(self, source: Input, progress: corpora.Progress) -> Iterator[Piece]:
        """Those of one input."""
        begin, cut = source.begin, self._valid_from
        for part in _white_space_first(self._parts(source.name, progress)):
            end = begin + len(part.text)
            if source.is_valid:
                yield Piece("valid", part.text, part.where, part.last)
            elif cut is not None and begin < cut < end:
                yield Piece("train", part.text[: cut - begin], part.where, True)
                yield Piece("valid", part.text[cut - begin :], part.where, part.last)
            else:
                is_valid = cut is not None and begin >= cut
                last = part.last or end == cut
                yield Piece(None if self._chosen else "valid" if is_valid else "train", part.text, part.where, last)
            begin = end


def _bar(inputs: Sequence[str], title: str) -> "tqdm[Any]":
    return tqdm(total=corpora.stored_bytes(inputs), desc=title, unit="B", unit_scale=True, disable=None)


def _white_space_first(parts: Iterable[Part]) -> Iterator[Part]:
    """The same text, but white space at the end of a part that is not the last goes to the next one.

    So a document's tokens do not depend on where it was cut: BPE takes the white space before a word together.
    """
    rest = ""
    for part in parts:
        text = rest + part.text
        kept = text if part.last else text.rstrip()
        rest = text[len(kept) :]
        yield dataclasses.replace(part, text=kept)
