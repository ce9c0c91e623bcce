"""The prepared data on disk: passages of token ids in ArrayRecord shards, their index, and the manifest.

A folder holds, for each split (``train``, ``valid``)::

    train-00000-of-00002.arrayrecord   one record = one passage: consecutive sentences of one document, as token ids
    train.index.npy                    int32 [passages, 3]: tokens, sentences, document of each passage
    train.unigram.npy                  int64 [V]: how often each token occurs in the split

and ``vocab.txt`` and ``manifest.json``. The manifest is written last, so a folder with a manifest is complete.

A record is, little-endian: uint32 number of sentences n, uint16 [n] tokens of each sentence, then the ids of all
tokens, as uint16 if the vocabulary has at most 65536 pieces and else as uint32.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core_flax.data import folder
from core_flax.data.folder import check_file, describe_file, token_type
from core_flax.data.shards import IndexWriter, ShardReader, ShardWriter

FORMAT = 1
VOCAB = "vocab.txt"
SPLITS = ("train", "valid")
MAX_SENTENCE_TOKENS = 1024
PASSAGE_TOKENS = 4096
"""A passage ends before the sentence that would make it longer."""


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
        return folder.content(self.files)

    def save(self, directory: Path) -> None:
        """Write manifest.json, atomically."""
        folder.write_manifest(directory, dataclasses.asdict(self))

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read manifest.json. Raises UserError if the folder is not complete or holds something else."""

        def make(stored: dict[str, Any]) -> Manifest:
            splits = {name: SplitInfo(**counts) for name, counts in stored.pop("splits").items()}
            return cls(splits=splits, **stored)

        return folder.read_manifest(directory, None, FORMAT, make)


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


class SplitWriter:
    """Writes the passages of one split in the order given: shards, index and token counts."""

    def __init__(self, directory: Path, split: str, num_tokens: int):
        self.tokens = 0
        self._documents = self._passages = self._sentences = 0
        self._dtype = token_type(num_tokens)
        self._unigram, self._unigram_path = np.zeros(num_tokens, np.int64), directory / f"{split}.unigram.npy"
        self._shards, self._index = ShardWriter(directory, split), IndexWriter(directory, split, num_columns=3)

    def write(self, records: Sequence[Record], new_document: bool) -> None:
        """Append passages of one document, which is the one written last or a new one."""
        self._documents += new_document
        rows = [(record.num_tokens, record.num_sentences, self._documents - 1) for record in records]
        self._index.append(np.array(rows, np.int64).reshape(-1, 3))
        for record in records:
            self._shards.append(record.data)
            self.tokens += record.num_tokens
            self._sentences += record.num_sentences
            tokens = np.frombuffer(record.data, self._dtype, record.num_tokens, 4 + 2 * record.num_sentences)
            np.add.at(self._unigram, tokens, 1)
        self._passages += len(records)

    def finish(self) -> tuple[SplitInfo, dict[str, dict[str, Any]]]:
        """Complete the files of this split. Returns its counts and its files as the manifest lists them."""
        files = self._shards.finish() | self._index.finish()
        np.save(self._unigram_path, self._unigram)
        files[self._unigram_path.name] = describe_file(self._unigram_path)
        return SplitInfo(self._documents, self._passages, self._sentences, self.tokens), files

    def abort(self) -> None:
        """Close the files without completing them, whatever state they are in."""
        self._index.abort()
        self._shards.abort()


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
        self._records = ShardReader(self.directory, split, self.manifest.files)
        for name in (f"{split}.index.npy", f"{split}.unigram.npy", VOCAB):
            check_file(self.directory, name, self.manifest.files)
        index = np.load(self.directory / f"{split}.index.npy")
        self.num_tokens, self.num_sentences, self.document = (np.ascontiguousarray(column) for column in index.T)
        self.unigram: np.ndarray = np.load(self.directory / f"{split}.unigram.npy")

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __reduce__(self) -> tuple:
        return PassageStore, (self.directory, self.split)

    def read(self, passages: np.ndarray) -> Passages:
        """Read passages by their numbers, an int array [n]. Raises UserError if a shard is damaged."""
        records = self._records.read(np.asarray(passages))
        counts = self.num_sentences[passages]
        lengths = [np.frombuffer(record, "<u2", n, 4) for record, n in zip(records, counts, strict=True)]
        tokens = [np.frombuffer(record, self._dtype, -1, 4 + 2 * n) for record, n in zip(records, counts, strict=True)]
        return Passages(
            tokens=np.concatenate(tokens),
            sentence_ends=np.cumsum(np.concatenate(lengths), dtype=np.int64),
            first_sentence=np.cumsum([0, *counts], dtype=np.int64),
            first_token=np.cumsum([0, *self.num_tokens[passages]], dtype=np.int64),
        )
