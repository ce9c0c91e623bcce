"""Where text comes from: files, TFDS datasets and the documentation that Python ships, as a stream of documents."""

import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from core_flax.data import tfds_text
from core_flax.types import UserError

DocumentMode = Literal["blank-line", "file"]

PYTHON_DOCS, STDIN = "python:docs", "-"
_TFDS = "tfds:"
_PART_BYTES = 1 << 20
"""A longer document, or a longer line, is handed on in parts of about this size: memory stays bounded."""
_JSON_LINE_BYTES = 64 << 20
"""A JSON object is read whole, so its length is limited instead."""
_DRAWING = re.compile(r"^[ \t]*([*=~^+|-])[*=~^+| -]{2,}$\n?", re.MULTILINE)

_PACKED = {
    b"\x1f\x8b": "gzipped; give it a name that ends in .gz",
    b"BZh": "packed; unpack it with bunzip2",
    b"\xfd7zXZ": "packed; unpack it with unxz",
    b"PK\x03\x04": "packed; unpack it with unzip",
}
"""How such a file begins."""

Progress = Callable[[int], object]
"""Told how many bytes of the input, as stored, were read since the last call."""


@dataclass(frozen=True, slots=True)
class Part:
    """A document, or a piece of one too long to hold in memory.

    Attributes:
        document: number of the document in the stream, from 0; the parts of one document follow each other.
        text: lines ending in a newline (the last one maybe not); blank lines separate paragraphs.
        where: "FILE:LINE" or the like, where this part begins, for messages.
        last: whether the document ends here.
    """

    document: int
    text: str
    where: str
    last: bool


def _ignore(num_bytes: int) -> None:
    del num_bytes


def read_parts(
    inputs: Sequence[str],
    documents: DocumentMode = "blank-line",
    document_start: str | None = None,
    progress: Progress = _ignore,
    verbatim: bool = False,
) -> Iterator[Part]:
    """Stream the documents of all inputs, in order.

    Args:
        inputs: each a path of plain text or, by its ending, ``.jsonl`` (one document a line, in the field ``text``),
            either of them gzipped (``.gz``); or ``tfds:NAME[/CONFIG][:SPLIT]``; or ``python:docs``.
        documents: what separates the documents of a plain text file: blank lines, or nothing (a file is a document,
            blank lines are paragraph breaks).
        document_start: a regular expression; in plain text, a line that it matches from its beginning starts a new
            document, and blank lines are paragraph breaks. Takes the place of ``documents``.
        progress: told about the bytes read.
        verbatim: keep all blank lines of plain text, and what stands on them, but for those that separate documents.
            False: blank lines after one another become one, and none begins a document.

    Yields:
        Parts that have a character other than white space, of about one million characters at most.

    Raises:
        UserError: an input is missing, empty, not UTF-8, or not of the form that its name says.
    """
    start = _compile(document_start)
    count = 0
    for name in inputs:
        first = count
        for text, where, last in _pieces(name, documents, start, progress, verbatim):
            yield Part(count, text, where, last)
            count += last
        if count == first:
            raise UserError(f"{name} holds no text; leave it out or give another file")


def read_lines(name: str, progress: Progress = _ignore) -> Iterator[tuple[int, str]]:
    """Lines of a plain text file, gzipped (``.gz``) or not, without their ends, with their numbers from 1.

    ``-`` is the standard input, and pipes will do.

    Raises:
        UserError: the file is missing, not UTF-8, no whole gzip file, or has a line longer than memory should hold.
    """
    for number, line in _lines(name, progress, _JSON_LINE_BYTES, cut=False):
        yield number, line.rstrip("\r\n")


def stored_bytes(inputs: Sequence[str]) -> int | None:
    """Size of all inputs as stored, in bytes, or None where it is not known. Raises UserError if one is missing."""
    sizes = [_size(name) for name in inputs]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def identify(name: str) -> dict[str, str | int]:
    """What tells this input from another of the same name: size and modification time of a file, and the like."""
    if name == PYTHON_DOCS:
        digest = hashlib.sha256("".join(text for _, text in _python_docs()).encode()).hexdigest()
        return {"input": name, "sha256": digest}
    if name.startswith(_TFDS):
        return {"input": name, **tfds_text.identify(name.removeprefix(_TFDS))}
    status = existing(name).stat()
    return {"input": str(Path(name).resolve()), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def is_plain_text(name: str) -> bool:
    """Whether ``documents`` and ``document_start`` apply to this input."""
    return name != PYTHON_DOCS and not name.startswith(_TFDS) and not _is_jsonl(name)


_Pieces = Iterator[tuple[str, str, bool]]
"""Texts with their origin and whether their document ends with them; none is blank."""


def _pieces(
    name: str, documents: DocumentMode, start: re.Pattern[str] | None, progress: Progress, verbatim: bool
) -> _Pieces:
    if name == PYTHON_DOCS:
        for topic, text in _python_docs():
            yield text, f"{PYTHON_DOCS} topic {topic!r}", True
            progress(len(text.encode()))
    elif name.startswith(_TFDS):
        for number, text in enumerate(tfds_text.read_texts(name.removeprefix(_TFDS))):
            yield from _cut(text, f"{name} example {number}")
            progress(len(text.encode()))
    elif _is_jsonl(name):
        yield from _read_jsonl(name, progress)
    else:
        yield from _read_plain(name, documents, start, progress, verbatim)


def _read_plain(
    name: str, documents: DocumentMode, start: re.Pattern[str] | None, progress: Progress, verbatim: bool
) -> _Pieces:
    blank_ends = start is None and documents == "blank-line"
    held: list[str] = []  # lines of the current document that are not handed on yet; one of them is not blank
    held_size, held_from, previous, blank_so_far = 0, 0, 0, True
    for number, line in _lines(name, progress, _PART_BYTES, cut=True):
        blank, same_line = not line.strip(), number == previous
        ends = blank_ends if blank else start is not None and bool(start.match(line))
        ends = ends and not same_line
        # A full part waits for the next line that is not blank, which tells whether the document goes on.
        if held and not blank_so_far and (ends or (held_size >= _PART_BYTES and not blank)):
            yield "".join(held), f"{name}:{held_from}", ends
            held, held_size = [], 0
        # One blank line says as much as many.
        if not blank or (verbatim and not blank_ends) or (held and held[-1] != "\n"):
            held_from = held_from if held else number
            held.append("\n" if blank and not verbatim else line)
            held_size += len(line)
        previous, blank_so_far = number, blank_so_far and blank
    if held and not blank_so_far:
        yield "".join(held), f"{name}:{held_from}", True


def _read_jsonl(name: str, progress: Progress) -> _Pieces:
    for number, line in _lines(name, progress, _JSON_LINE_BYTES, cut=False):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not valid JSON ({error}); write one object a line") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{where} has no string in the field 'text' (found: {found or 'no field'})")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half of a surrogate pair at character {error.start} of 'text'") from error
        yield from _cut(text, where)


def _cut(text: str, where: str) -> _Pieces:
    """A whole document in parts, cut at the end of a line if there is one, else at a space if there is one."""
    text, start = text.rstrip(), 0
    while len(text) - start > _PART_BYTES:
        middle, limit = start + _PART_BYTES // 2, start + _PART_BYTES
        ends = (text.rfind("\n", middle, limit), text.rfind(" ", middle, limit), limit)
        end = next(end for end in ends if end >= 0)
        if text[start:end].strip():
            yield text[start:end], where, False
        start = end
    if text[start:].strip():
        yield text[start:], where, True


def _lines(name: str, progress: Progress, limit: int, cut: bool) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1. One longer than ``limit`` bytes: in pieces of the same number, or an error."""
    number, told, unread, rest = 1, 0, 0, b""
    with _open(name) as (stored, stream):
        while raw := stream.readline(limit):
            unread += len(raw)
            if unread >= _PART_BYTES:
                progress(_place(stored) - told)
                told, unread = _place(stored), 0
            size = _cut_before(raw, limit)
            if size < len(raw) and not cut:
                raise UserError(
                    f"{name}:{number} is longer than {limit >> 20} MiB; give so long a document as plain text"
                )
            yield number, _decode(name, number, rest + raw[:size])
            rest = raw[size:]
            number += raw.endswith(b"\n")
        if rest:
            yield number, _decode(name, number, rest)
        progress(_place(stored) - told)


def _place(stored: IO[bytes]) -> int:
    """Bytes read so far; a pipe does not know, and tells 0."""
    return stored.tell() if stored.seekable() else 0


def _cut_before(raw: bytes, limit: int) -> int:
    """Bytes of a piece of a line that can stand for themselves: to the last space, else to the last whole character."""
    if len(raw) < limit or raw.endswith(b"\n"):
        return len(raw)
    if (space := raw.rfind(b" ")) > 0:
        return space
    lead = len(raw) - 1
    while lead > len(raw) - 4 and raw[lead] & 0xC0 == 0x80:
        lead -= 1
    return lead


def _decode(name: str, number: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        packed = next((what for mark, what in _PACKED.items() if number == 1 and raw.startswith(mark)), None)
        if packed:
            raise UserError(f"{name} is no text but {packed}") from error
        of = "UTF-16" if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise UserError(
            f"{name}:{number} is not UTF-8: byte {raw[error.start]:#04x} at position {error.start + 1} of the line; "
            f"convert the file, for example with iconv -f {of} -t UTF-8"
        ) from error


@contextmanager
def _open(name: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as stored and as read (unpacked). What goes wrong while it is read becomes a UserError."""
    if name == STDIN:
        if sys.stdin is None:
            raise UserError("standard input is closed; give a file")
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    path = existing(name)
    try:
        with path.open("rb") as stored:
            if path.suffix.lower() == ".gz":
                with gzip.open(stored, "rb") as stream:
                    yield stored, cast(IO[bytes], stream)
            else:
                yield stored, stored
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name} is not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error


def existing(name: str) -> Path:
    """The path of an input. Raises UserError if there is none, or a folder."""
    path = Path(name)
    if not path.exists():
        raise UserError(f"input {name} does not exist")
    if path.is_dir():
        raise UserError(f"input {name} is a folder; name the files in it, for example {name.rstrip('/')}/*.txt")
    return path


def _size(name: str) -> int | None:
    if name == PYTHON_DOCS:
        return sum(len(text.encode()) for _, text in _python_docs())
    if name.startswith(_TFDS):
        return None
    if not (path := existing(name)).is_file():
        raise UserError(f"input {name} is no file but a pipe or a device, and is read more than once; copy it to one")
    return path.stat().st_size


def _is_jsonl(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(".jsonl")


def _compile(document_start: str | None) -> re.Pattern[str] | None:
    try:
        return None if document_start is None else re.compile(document_start)
    except re.error as error:
        raise UserError(f"--document-start {document_start!r} is not a regular expression: {error}") from error


def _python_docs() -> list[tuple[str, str]]:
    """The language reference as pydoc's ``help`` has it: (topic, text), without lines that only draw (underlines)."""
    from pydoc_data.topics import topics

    return [(topic, _DRAWING.sub("", topics[topic])) for topic in sorted(topics)]
