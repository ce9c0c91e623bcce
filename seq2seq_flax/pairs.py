"""Prepared sentence pairs on disk: token ids in ArrayRecord shards, their lengths, the tokenizer and the manifest.

A folder holds, for each split (``train``, ``valid``)::

    train-00000-of-00001.arrayrecord   one record = one pair: ids of the source, then of the target, as uint16 if the
                                       vocabulary has at most 65536 pieces and else as uint32
    train.index.npy                    int32 [pairs, 3]: tokens of the source, tokens of the target, direction

and ``tokenizer.model`` and ``manifest.json``. The manifest is written last, so a folder with a manifest is complete.
A source ends with ``</s>`` and, where the data have several target languages, begins with ``<2xx>``; a target ends with
``</s>``. Lengths count these.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core_flax.data import folder
from core_flax.data.shards import IndexWriter, ShardReader, ShardWriter

KIND, FORMAT = "seq2seq_flax.pairs", 1
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Lengths:
    """Tokens of the sentences of one side of a split."""

    mean: float = 0.0
    median: int = 0
    percentile_90: int = 0
    percentile_99: int = 0
    longest: int = 0

    @classmethod
    def of(cls, counts: np.ndarray) -> "Lengths":
        """From how many sentences have 0, 1, 2 ... tokens."""
        total = int(counts.sum())
        if total == 0:
            return cls()
        below = np.cumsum(counts) / total
        median, most, nearly_all = (int(np.searchsorted(below, share)) for share in (0.5, 0.9, 0.99))
        mean = round(float(counts @ np.arange(len(counts))) / total, 2)
        return cls(mean, median, most, nearly_all, int(np.flatnonzero(counts)[-1]))


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split.

    Attributes:
      pairs: sentence pairs.
      source_tokens, target_tokens: tokens of all of them.
      source_unknown, target_unknown: how many of those are ``<unk>``, which no translation can make good.
      source, target: how long their sentences are.
      dropped: pairs left out, by the reason.
    """

    pairs: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    source_unknown: int = 0
    target_unknown: int = 0
    source: Lengths = Lengths()
    target: Lengths = Lengths()
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
      fingerprint: of the tokenizer (SentencePiece.fingerprint): data and model must agree on it.
      num_tokens: size of the vocabulary.
      directions: (source, target) language of each direction, by its number; None where languages have no names.
      tagged: whether sources begin with the target language's piece.
      splits: counts by the name of the split.
      files: size and SHA-256 of every other file in the folder.
      settings: what it was prepared from and how.
    """

    fingerprint: str
    num_tokens: int
    directions: list[list[str | None]]
    tagged: bool
    splits: dict[str, SplitInfo]
    files: dict[str, dict[str, Any]]
    settings: dict[str, Any]

    @property
    def content(self) -> str:
        """Equal exactly when two folders hold the same pairs and tokenizer."""
        return folder.content(self.files)

    def save(self, directory: Path) -> None:
        """Write manifest.json, atomically."""
        folder.write_manifest(directory, {"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read manifest.json. Raises UserError if the folder is not complete or holds something else."""

        def make(stored: dict[str, Any]) -> "Manifest":
            fields = {name: value for name, value in stored.items() if name not in ("kind", "format", "splits")}
            return cls(splits={name: _split_info(split) for name, split in stored["splits"].items()}, **fields)

        return folder.read_manifest(directory, KIND, FORMAT, make)


def _split_info(stored: dict[str, Any]) -> SplitInfo:
    sides = {side: Lengths(**stored[side]) for side in ("source", "target")}
    return SplitInfo(**{**stored, **sides})


class PairWriter:
    """Writes the pairs of one split in the order given."""

    def __init__(self, directory: Path, split: str, num_tokens: int, unk_id: int) -> None:
        self._dtype = folder.token_type(num_tokens)
        self._unk_id, self._unknown = unk_id, [0, 0]
        self._shards, self._index = ShardWriter(directory, split), IndexWriter(directory, split, 3)
        self._histograms = [np.zeros(1, np.int64), np.zeros(1, np.int64)]
        self.dropped: dict[str, int] = {}

    def write(self, source: Sequence[int], target: Sequence[int], direction: int) -> None:
        """Append a pair of token ids. Raises OSError if the disk refuses."""
        self._shards.append(np.array([*source, *target], self._dtype).tobytes())
        self._index.append(np.array([[len(source), len(target), direction]]))
        for side, tokens in enumerate((source, target)):
            self._unknown[side] += tokens.count(self._unk_id)
            counts, length = self._histograms[side], len(tokens)
            if length >= len(counts):
                self._histograms[side] = counts = np.pad(counts, (0, 2 * length - len(counts)))
            counts[length] += 1

    def drop(self, reason: str) -> None:
        """Count a pair that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def finish(self) -> tuple[SplitInfo, dict[str, dict[str, Any]]]:
        """Complete the files of this split. Returns its counts and its files as the manifest lists them."""
        files = {**self._shards.finish(), **self._index.finish()}
        source, target = self._histograms
        tokens = [int(counts @ np.arange(len(counts))) for counts in (source, target)]
        info = SplitInfo(
            pairs=int(source.sum()),
            source_tokens=tokens[0],
            target_tokens=tokens[1],
            source_unknown=self._unknown[0],
            target_unknown=self._unknown[1],
            source=Lengths.of(source),
            target=Lengths.of(target),
            dropped=self.dropped,
        )
        return info, files

    def abort(self) -> None:
        """Close the files without completing them."""
        self._shards.abort()
        self._index.abort()


class PairStore:
    """Random access to the pairs of one split of a prepared folder. Threads may share it; it can be pickled.

    Attributes:
      manifest: what the folder holds.
      info: counts of this split.
      source_lengths, target_lengths, direction: int32 [pairs], from the index: known without reading a pair.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        """Raises UserError if the folder is not complete or a file is missing or damaged."""
        self.directory, self.split = Path(directory), split
        self.manifest = Manifest.load(directory)
        self.info = self.manifest.splits[split]
        self._dtype = folder.token_type(self.manifest.num_tokens)
        for name in (f"{split}.index.npy", TOKENIZER):
            folder.check_file(self.directory, name, self.manifest.files)
        self._records = ShardReader(self.directory, split, self.manifest.files)
        index = np.load(self.directory / f"{split}.index.npy")
        self.source_lengths, self.target_lengths, self.direction = (np.ascontiguousarray(c) for c in index.T)

    def __len__(self) -> int:
        return len(self.direction)

    def __reduce__(self) -> tuple:
        return PairStore, (self.directory, self.split)

    def read(self, numbers: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(source ids, target ids) of the pairs with these numbers. Raises UserError if a shard is damaged."""
        numbers = np.asarray(numbers, np.int64)
        ids = [np.frombuffer(record, self._dtype) for record in self._records.read(numbers)]
        return [(each[:length], each[length:]) for each, length in zip(ids, self.source_lengths[numbers], strict=True)]
