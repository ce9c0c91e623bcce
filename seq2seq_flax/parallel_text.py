"""Where sentence pairs come from: two files of as many lines, a table of two columns, or a TFDS dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from core_flax.data import corpora, tfds_text
from core_flax.data.corpora import Progress
from core_flax.types import UserError

_TFDS = "tfds:"
TABLES = (".tsv", ".tsv.gz")


@dataclass(frozen=True, slots=True)
class Pair:
    """A sentence and its translation.

    Attributes:
      source: text to translate from, without white space around.
      target: its translation, likewise.
      where: "FILE:LINE" or the like, for messages.
    """

    source: str
    target: str
    where: str


@dataclass(frozen=True)
class ParallelText:
    """One input of pairs.

    Attributes:
      names: two files, or one table (.tsv) or dataset (tfds:NAME[/CONFIG][:SPLIT]) that has both sides.
      source: language to translate from; None: not named.
      target: language to translate into; None: not named.
    """

    names: tuple[str, ...]
    source: str | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError if the names do not give two sides."""
        if len(self.names) == 1 and (self.names[0].startswith(_TFDS) or self.names[0].lower().endswith(TABLES)):
            return
        if len(self.names) != 2:
            raise UserError(
                f"{' '.join(self.names) or 'no files given'}: pairs come from two files (SRC TGT), from one table "
                "(FILE.tsv or FILE.tsv.gz) or from tfds:NAME[/CONFIG][:SPLIT]"
            )
        for name in self.names:
            if name.startswith(_TFDS) or name.lower().endswith(TABLES):
                raise UserError(f"{name} has both sides of its pairs: give it alone, without another file")

    @property
    def title(self) -> str:
        """The names, for messages."""
        return " ".join(self.names)

    def stored_bytes(self) -> int | None:
        """Size as stored, or None where it is not known. Raises UserError if a file is missing."""
        return corpora.stored_bytes(self.names)

    def identify(self) -> list[dict[str, Any]]:
        """What tells this input from another of the same name."""
        (name, *others) = self.names
        if name.startswith(_TFDS):
            spec = name.removeprefix(_TFDS)
            languages = self._languages(spec)
            return [{"input": name, "fields": list(languages), **tfds_text.identify(spec, languages)}]
        return [corpora.identify(each) for each in (name, *others)]

    def read(self, progress: Progress) -> Iterator[Pair]:
        """The pairs in order; ``progress`` is told about the bytes read.

        Raises:
          UserError: an input is missing, empty or not UTF-8; two files differ in their number of lines; a row of a
            table has not two columns.
        """
        read = self._read_two if len(self.names) == 2 else self._read_table
        number = 0
        for number, pair in enumerate(self._read_tfds(progress) if self._is_tfds else read(progress), start=1):  # noqa: B007
            yield pair
        if number == 0:
            raise UserError(f"{self.title}: no pairs, not a line; give other files")

    @property
    def _is_tfds(self) -> bool:
        return self.names[0].startswith(_TFDS)

    def _languages(self, spec: str) -> tuple[str, str]:
        return (self.source, self.target) if self.source and self.target else tfds_text.languages(spec)

    def _read_tfds(self, progress: Progress) -> Iterator[Pair]:
        (name,) = self.names
        spec = name.removeprefix(_TFDS)
        pairs = tfds_text.read_translations(spec, *self._languages(spec))
        for number, (source, target) in enumerate(pairs):
            progress(len(source.encode()) + len(target.encode()))
            yield Pair(source.strip(), target.strip(), f"{name} example {number}")

    def _read_table(self, progress: Progress) -> Iterator[Pair]:
        (name,) = self.names
        for number, line in corpora.read_lines(name, progress):
            columns = line.split("\t")
            if len(columns) != 2:
                found = "1 column" if len(columns) == 1 else f"{len(columns)} columns"
                raise UserError(f"{name}:{number} has {found}; a row is a sentence, a tab and its translation")
            yield Pair(columns[0].strip(), columns[1].strip(), f"{name}:{number}")

    def _read_two(self, progress: Progress) -> Iterator[Pair]:
        sides = [corpora.read_lines(name, progress) for name in self.names]
        counts = [0, 0]
        for both in zip_longest(*sides):
            counts = [count + (line is not None) for count, line in zip(counts, both, strict=True)]
            source, target = both
            if source is None or target is None:
                continue  # the longer file is read to its end, to say how long it is
            yield Pair(source[1].strip(), target[1].strip(), f"{self.names[0]}:{source[0]}")
        if counts[0] != counts[1]:
            raise UserError(
                f"{self.names[0]} has {counts[0]:,} lines and {self.names[1]} has {counts[1]:,}: line by line one must "
                "be the translation of the other; give files that belong together"
            )


def parse_direction(name: str, option: str = "--pair") -> tuple[str, str]:
    """("en", "de") of "en-de". Raises UserError if it names no two languages."""
    source, _, target = name.partition("-")
    if not source or not target or source == target or "-" in target:
        raise UserError(
            f"{option} {name}: write SOURCE-TARGET with the two languages, such as en-de or en-pt_BR, then the files"
        )
    return source, target
