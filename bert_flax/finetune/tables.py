"""Tables of texts: GLUE's TSV files, which know no quotes, and CSV files, which do."""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_flax.finetune.examples import ChoiceExample, Dataset, TextExample
from bert_flax.finetune.files import read_text
from bert_flax.finetune.tasks import TaskSpec
from core_flax.types import UserError

SHOWN_CHARACTERS = 60
"""Of a field that is none of what it should be: a file of another kind may have it as long as the file."""
MAX_FIELD = 2**31 - 1
"""Characters of a field of CSV. Python's own limit, 131,072, is less than some documents have."""

LARGEST = 1e9
"""Score that float32 still squares and sums without harm."""

Row = tuple[int, list[str]]
"""The line of the file that a row begins in, from 1, and its fields."""


@dataclass(frozen=True)
class Table:
    """A table whose header is known and whose rows are still to be read."""

    path: Path
    names: tuple[str, ...]
    rows: Iterator[Row]
    has_header: bool = True

    def place(self, name: str) -> int:
        """The number of a column. Raises UserError if there is none, or more than one, of this name."""
        if self.names.count(name) != 1:
            how_many = "has two columns" if name in self.names else "has no column"
            columns = shorten([repr(each[:SHOWN_CHARACTERS]) for each in self.names])
            raise UserError(f"{self.path} {how_many} {name!r}; its columns are {columns}")
        return self.names.index(name)

    def torn(self, line: int, fields: list[str]) -> str | None:
        """What is wrong with a row whose fields are not as many as the columns."""
        if len(fields) == len(self.names):
            return None
        if fields in ([], [""]):
            return f"{self.path}:{line} is blank"
        return f"{self.path}:{line} has {len(fields)} field{'s' * (len(fields) > 1)}, not {len(self.names)}"

    @property
    def how_to_mend(self) -> str:
        """What a field of such a file may be."""
        if _is_csv(self.path):
            return "mend the row: a field with a comma or a line break stands in double quotes"
        return "mend the row: a field can hold no tab and no line break"


def open_table(path: Path, text: str, headerless: tuple[str, ...] = ()) -> Table:
    """A table by the ending of its name: ``.csv`` is quoted and separated by commas, all else unquoted and by tabs.

    Args:
        path: the file.
        text: a column that a header would name.
        headerless: names of the columns if the first row does not hold ``text``.
    """
    rows = _read_csv(path) if _is_csv(path) else _read_tsv(path)
    first = next(rows)
    names = tuple(name.strip() for name in first[1])  # "id, text" is a common way to write a header
    if text in names or not headerless:
        return Table(path, names, rows)
    return Table(path, headerless, itertools.chain((first,), rows), has_header=False)


def format_table(path: Path, rows: Iterable[Sequence[object]]) -> str:
    """The text of a table to write, which ``open_table`` reads by the same name; see ``check_fields``."""
    if not _is_csv(path):
        return "".join("\t".join(map(str, row)) + "\n" for row in rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def check_fields(path: Path, fields: Iterable[str]) -> None:
    """Raises UserError if a table of this name cannot hold one of the fields."""
    for field in () if _is_csv(path) else fields:
        if set(field) & set("\t\r\n"):
            raise UserError(
                f"{path}: {field[:SHOWN_CHARACTERS]!r} holds a tab or a line break, which a TSV cannot; let the name "
                "of the file to write end in .csv"
            )


def read_texts(spec: TaskSpec, path: Path, labelled: bool) -> Dataset[TextExample]:
    """Texts or pairs of texts of a table.

    Args:
        spec: a task of kind classification or regression.
        path: the table.
        labelled: whether to read the labels, too.

    Raises:
        UserError: a column is missing, a row torn, a label not the task's, or the file is not a table.
    """
    columns = spec.columns
    assert columns is not None
    table = open_table(path, columns.text, columns.headerless)
    text = table.place(columns.text)
    pair = None if columns.text_pair is None else table.place(columns.text_pair)
    # A file without header is known by its labels alone, so these are looked at in any case.
    label = table.place(columns.label) if labelled or not table.has_header else None
    has_id = columns.id and (columns.needs_id or columns.id in table.names)
    own_id = table.place(columns.id) if columns.id and has_id else None
    examples, dropped = [], []
    for number, (line, fields) in enumerate(table.rows):
        if torn := table.torn(line, fields):
            if spec.torn_rows == "error":
                raise UserError(f"{torn}; {table.how_to_mend}")
            dropped.append(torn)
        elif label is not None and fields[label] == spec.no_label:
            dropped.append(f"{path}:{line} has no label ({spec.no_label!r})")
        else:
            found = None if label is None else parse_label(spec, fields[label], f"{path}:{line}")
            name = str(number) if own_id is None else fields[own_id]
            second = None if pair is None else fields[pair]
            examples.append(TextExample(name, fields[text], second, found if labelled else None))
    return Dataset(tuple(examples), tuple(dropped))


def read_choices(spec: TaskSpec, path: Path, labelled: bool) -> Dataset[ChoiceExample]:
    """SWAG's table: a sentence, the start of the next, and four endings. Raises UserError as ``read_texts`` does."""
    table = open_table(path, "sent1")
    context, start = table.place("sent1"), table.place("sent2")
    endings = [table.place(f"ending{choice}") for choice in range(len(spec.labels))]
    label = table.place("label") if labelled else None
    examples = []
    for number, (line, fields) in enumerate(table.rows):
        if torn := table.torn(line, fields):
            raise UserError(f"{torn}; {table.how_to_mend}")
        examples.append(
            ChoiceExample(
                fields[table.names.index("")] if "" in table.names else str(number),
                fields[context],
                fields[start],
                tuple(fields[ending] for ending in endings),
                None if label is None else int(parse_label(spec, fields[label], f"{path}:{line}")),
            )
        )
    return Dataset(tuple(examples))


def read_labels(spec: TaskSpec, path: Path) -> tuple[str, ...]:
    """The different labels of a table, sorted."""
    assert spec.columns is not None
    table = open_table(path, spec.columns.text)
    place, labels = table.place(spec.columns.label), set()
    for line, fields in table.rows:
        if torn := table.torn(line, fields):
            raise UserError(f"{torn}; {table.how_to_mend}")
        if not fields[place].strip():
            raise UserError(f"{path}:{line} has an empty label")
        labels.add(fields[place])
    if len(labels) < 2:
        raise UserError(f"{path}: column {spec.columns.label!r} holds no two labels ({', '.join(labels) or 'no rows'})")
    return tuple(sorted(labels))


def shorten(names: Sequence[str], shown: int = 20) -> str:
    """The first of many names and the number of the others, for a message."""
    others = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {others:,} more" if others > 0 else "")


def parse_label(spec: TaskSpec, label: str, where: str) -> int | float:
    """Place of a label in the task's, or the score. Raises UserError if it is not the task's."""
    if spec.kind != "regression":
        if label not in spec.labels:
            shown = repr(label[:SHOWN_CHARACTERS])
            raise UserError(f"{where}: {shown} is no label of task {spec.name}, which has {shorten(spec.labels)}")
        return spec.labels.index(label)
    least, greatest = spec.score_range or (-math.inf, math.inf)
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not (abs(score) <= LARGEST and least <= score <= greatest):
        between = f" from {least:g} to {greatest:g}" if spec.score_range else ""
        shown = repr(label[:SHOWN_CHARACTERS])
        raise UserError(f"{where}: {shown} is no score of task {spec.name}; it takes numbers{between}")
    return score


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _read_tsv(path: Path) -> Iterator[Row]:
    """Rows end at line feeds alone: str.splitlines and csv would also break them where texts have odd characters."""
    stream = io.StringIO(read_text(path).rstrip("\r\n"), newline="\n")
    for line, row in enumerate(stream, 1):
        yield line, row.removesuffix("\n").removesuffix("\r").split("\t")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.StringIO(read_text(path).rstrip("\r\n"), newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line} is not a row of CSV: {error}") from error
