"""The prepared data on disk: passages of token ids in ArrayRecord shards, their index, and the manifest.

A folder holds, for each split (``train``, ``valid``)::

    train-00000-of-00002.arrayrecord   one record = one passage: consecutive sentences of one document, as token ids
    train.index.npy                    int32 [passages, 3]: tokens, sentences, document of each passage
    train.unigram.npy                  int64 [V]: how often each token occurs in the split

and ``vocab.txt`` and ``manifest.json``. The manifest is written last, so a folder with a manifest is complete.

A record is, little-endian: uint32 number of sentences n, uint16 [n] tokens of each sentence, then the ids of all
tokens, as uint16 if the vocabulary has at most 65536 pieces and else as uint32.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from core_flax.types import UserError

FORMAT = 1
MANIFEST = "manifest.json"
VOCAB = "vocab.txt"
SPLITS = ("train", "valid")
MAX_SENTENCE_TOKENS = 1024
PASSAGE_TOKENS = 4096
"""A passage ends before the sentence that would make it longer."""
_SHARD_BYTES = 256 << 20
# One record a chunk, so that reading a record unpacks that record only.
_WRITER_OPTIONS = "group_size:1,zstd:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split."""

    documents: int = 0
    passages: int = 0
    sentences: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        fingerprint: of the tokenizer (WordPiece.fingerprint): data and model must agree on it.
        num_tokens: size of the vocabulary.
        lowercase: whether the text was lower-cased.
        splits: counts by the name of the split.
        files: size and SHA-256 of every other file in the folder.
        dropped_documents: how many documents were left out for having no sentence, or one only.
        settings: what it was prepared from and how.
    """

    fingerprint: str
    num_tokens: int
    lowercase: bool
    splits: dict[str, SplitInfo]
    files: dict[str, dict[str, Any]]
    dropped_documents: int
    settings: dict[str, Any]
    format: int = FORMAT

    @property
    def content(self) -> str:
        """SHA-256 over those of the files: equal exactly when two folders hold the same text and vocabulary."""
        hashes = {name: entry["sha256"] for name, entry in sorted(self.files.items())}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write manifest.json, atomically."""
        partial = directory / (MANIFEST + ".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(directory / MANIFEST)

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read manifest.json. Raises UserError if the folder is not complete or of another format."""
        path = Path(directory) / MANIFEST
        if not path.is_file():
            state = "not complete" if path.parent.is_dir() else "missing"
            raise UserError(f"data folder {directory} is {state} (no {MANIFEST}); run prepare again")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise UserError(f"{path} has format {stored['format']}, not {FORMAT}; run prepare again")
            splits = {name: SplitInfo(**counts) for name, counts in stored.pop("splits").items()}
            return cls(splits=splits, **stored)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); run prepare again") from error


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def token_type(num_tokens: int) -> np.dtype:
    """The type that token ids have on disk."""
    return np.dtype("<u2") if num_tokens <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Record:
    """A passage as it is written: the serialised record and what the index holds of it."""

    data: bytes
    num_tokens: int
    num_sentences: int


def pack_passages(sentences: Iterable[Sequence[int]], dtype: np.dtype) -> list[Record]:
    """Serialise the sentences of one document (or part of it) as passages of two sentences or more.

    A sentence of more than MAX_SENTENCE_TOKENS tokens is cut. If only one sentence is left it is cut in half, so that
    every passage has a next sentence; a single token cannot be, and gives no passage.
    """
    pieces = [
        sentence[start : start + MAX_SENTENCE_TOKENS]
        for sentence in sentences
        for start in range(0, len(sentence), MAX_SENTENCE_TOKENS)
    ]
    passages: list[list[Sequence[int]]] = []
    size = PASSAGE_TOKENS
    for piece in pieces:
        if size + len(piece) > PASSAGE_TOKENS:
            passages.append([])
            size = 0
        passages[-1].append(piece)
        size += len(piece)
    if len(passages) > 1 and len(passages[-1]) == 1:
        passages[-1].insert(0, passages[-2].pop())  # the one before is full, so it has at least four sentences
    elif len(pieces) == 1:
        middle = (len(pieces[0]) + 1) // 2
        passages = [[pieces[0][:middle], pieces[0][middle:]]] if middle < len(pieces[0]) else []
    return [_serialise(passage, dtype) for passage in passages]


def _serialise(sentences: list[Sequence[int]], dtype: np.dtype) -> Record:
    lengths = np.array([len(sentence) for sentence in sentences], "<u2")
    tokens = np.array([token for sentence in sentences for token in sentence], dtype)
    data = np.uint32(len(sentences)).astype("<u4").tobytes() + lengths.tobytes() + tokens.tobytes()
    return Record(data, len(tokens), len(sentences))


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """ArrayRecord raises RuntimeError where writing fails; to the rest of this code that is an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split("; at byte")[0]) from error


class SplitWriter:
    """Writes the passages of one split in the order given: shards, index and token counts."""

    def __init__(self, directory: Path, split: str, num_tokens: int):
        self.tokens = 0
        self._directory, self._split = directory, split
        self._documents = self._passages = self._sentences = 0
        self._dtype = token_type(num_tokens)
        self._unigram = np.zeros(num_tokens, np.int64)
        self._index = (directory / f"{split}.index.partial").open("wb")
        self._shards: list[tuple[Path, int]] = []  # path and number of records
        self._writer: ArrayRecordWriter | None = None
        self._shard_path, self._shard_size, self._shard_records = directory, 0, 0

    def write(self, records: Sequence[Record], new_document: bool) -> None:
        """Append passages of one document, which is the one written last or a new one."""
        self._documents += new_document
        rows = [(record.num_tokens, record.num_sentences, self._documents - 1) for record in records]
        self._index.write(np.array(rows, "<i4").tobytes())
        for record in records:
            self._append(record.data)
            self.tokens += record.num_tokens
            self._sentences += record.num_sentences
        self._passages += len(records)
        self._count(records)

    def _count(self, records: Sequence[Record]) -> None:
        for record in records:
            tokens = np.frombuffer(record.data, self._dtype, record.num_tokens, 4 + 2 * record.num_sentences)
            np.add.at(self._unigram, tokens, 1)

    def _append(self, data: bytes) -> None:
        if self._shard_size + len(data) > _SHARD_BYTES:
            self._close_shard()
        writer = self._writer or self._open_shard()
        with _disk_errors():
            writer.write(data)
        self._shard_size += len(data)
        self._shard_records += 1

    def _open_shard(self) -> ArrayRecordWriter:
        self._shard_path = self._directory / f"{self._split}-{len(self._shards):05d}.arrayrecord.partial"
        self._shard_size = self._shard_records = 0
        self._writer = ArrayRecordWriter(str(self._shard_path), _WRITER_OPTIONS)
        return self._writer

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        with _disk_errors():
            self._writer.close()
        self._writer = None
        reader = ArrayRecordReader(str(self._shard_path), _READER_OPTIONS)
        num_records = reader.num_records()
        reader.close()
        if num_records != self._shard_records:  # a full disk, say
            raise OSError(f"{self._shard_path} holds {num_records} of {self._shard_records} records")
        self._shards.append((self._shard_path, num_records))

    def finish(self) -> tuple[SplitInfo, dict[str, dict[str, Any]]]:
        """Complete the files of this split. Returns its counts and its files as the manifest lists them."""
        self._close_shard()
        self._index.close()
        files = {}
        for number, (partial, num_records) in enumerate(self._shards):
            path = self._directory / f"{self._split}-{number:05d}-of-{len(self._shards):05d}.arrayrecord"
            partial.rename(path)
            files[path.name] = describe_file(path) | {"records": num_records}
        for path in (self._finish_index(), self._finish_unigram()):
            files[path.name] = describe_file(path)
        return SplitInfo(self._documents, self._passages, self._sentences, self.tokens), files

    def abort(self) -> None:
        """Close the files without completing them, whatever state they are in."""
        with contextlib.suppress(OSError):
            self._index.close()
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()

    def _finish_index(self) -> Path:
        path = self._directory / f"{self._split}.index.npy"
        with path.open("wb") as file, open(self._index.name, "rb") as rows:
            header = {"descr": "<i4", "fortran_order": False, "shape": (self._passages, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(rows, file)
        Path(self._index.name).unlink()
        return path

    def _finish_unigram(self) -> Path:
        path = self._directory / f"{self._split}.unigram.npy"
        np.save(path, self._unigram)
        return path


@dataclass(frozen=True, slots=True)
class Passages:
    """Passages laid end to end, in the order asked for.

    Attributes:
        tokens: ids of all sentences of all passages.
        sentence_ends: int64, where each sentence ends in ``tokens``; it begins where the one before it ends.
        first_sentence: int64 [passages + 1], number of each passage's first sentence in ``sentence_ends``.
        first_token: int64 [passages + 1], where each passage begins in ``tokens``.
    """

    tokens: np.ndarray
    sentence_ends: np.ndarray
    first_sentence: np.ndarray
    first_token: np.ndarray

    def begin(self, sentence: np.ndarray) -> np.ndarray:
        """Where sentences begin in ``tokens``; for the one after the last, where the last one ends."""
        return np.where(sentence > 0, self.sentence_ends[sentence - 1], 0)


class PassageStore:
    """Random access to the passages of one split of a prepared folder. Threads may share it; it can be pickled.

    Attributes:
        manifest: what the folder holds.
        info: counts of this split.
        num_tokens, num_sentences, document: int32 [passages], from the index: known without reading a passage.
            Documents are numbered from 0 and never decrease.
        unigram: int64 [V], how often each token occurs in the split.
    """

    def __init__(self, directory: str | Path, split: str):
        self.directory, self.split = Path(directory), split
        self.manifest = Manifest.load(directory)
        self.info = self.manifest.splits[split]
        self._dtype = token_type(self.manifest.num_tokens)
        self._shards = [name for name in sorted(self.manifest.files) if name.startswith(f"{split}-")]
        for name in (*self._shards, f"{split}.index.npy", f"{split}.unigram.npy", VOCAB):
            self._check(name)
        index = np.load(self.directory / f"{split}.index.npy")
        self.num_tokens, self.num_sentences, self.document = (np.ascontiguousarray(column) for column in index.T)
        self.unigram: np.ndarray = np.load(self.directory / f"{split}.unigram.npy")
        sizes = [self.manifest.files[name]["records"] for name in self._shards]
        self._first_record = np.cumsum([0, *sizes])
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __reduce__(self) -> tuple:
        return PassageStore, (self.directory, self.split)

    def read(self, passages: np.ndarray) -> Passages:
        """Read passages by their numbers, an int array [n]. Raises UserError if a shard is damaged."""
        records = self._read_records(np.asarray(passages))
        counts = self.num_sentences[passages]
        lengths = [np.frombuffer(record, "<u2", n, 4) for record, n in zip(records, counts, strict=True)]
        tokens = [np.frombuffer(record, self._dtype, -1, 4 + 2 * n) for record, n in zip(records, counts, strict=True)]
        return Passages(
            tokens=np.concatenate(tokens),
            sentence_ends=np.cumsum(np.concatenate(lengths), dtype=np.int64),
            first_sentence=np.cumsum([0, *counts], dtype=np.int64),
            first_token=np.cumsum([0, *self.num_tokens[passages]], dtype=np.int64),
        )

    def _read_records(self, passages: np.ndarray) -> list[bytes]:
        shards = np.searchsorted(self._first_record, passages, side="right") - 1
        records: list[bytes] = [b""] * len(passages)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            try:
                found = self._reader(int(shard)).read((passages[rows] - self._first_record[shard]).tolist())
            except RuntimeError as error:  # what ArrayRecord raises when a checksum does not match
                path = self.directory / self._shards[shard]
                raise UserError(f"{path} is damaged ({error}); run prepare again with --overwrite") from error
            for row, record in zip(rows, found, strict=True):
                records[row] = record
        return records

    def _reader(self, shard: int) -> ArrayRecordReader:
        """The reader of a shard, opened when first used; each thread has its own."""
        readers = self._local.__dict__.setdefault("readers", {})
        if shard not in readers:
            readers[shard] = ArrayRecordReader(str(self.directory / self._shards[shard]), _READER_OPTIONS)
        return readers[shard]

    def _check(self, name: str) -> None:
        path = self.directory / name
        expected = self.manifest.files[name]["bytes"]
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise UserError(f"{path} {state}; run prepare again with --overwrite")
