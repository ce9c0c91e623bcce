"""A prepared corpus on disk: one stream of tokens for each split, where documents end, the tokenizer, the manifest.

A folder holds, for each split (``train``, ``valid``)::

    train.tokens       token ids, one after another: uint16 if the vocabulary has at most 65536 of them, else uint32,
                       little-endian (the layout of nanoGPT's train.bin)
    train.ends.npy     int64 [documents]: the place in the stream behind each document's last token
    train.counts.npy   int64 [V]: how often each token occurs

and the tokenizer's file and ``manifest.json``. The manifest is written last, so a folder with a manifest is complete.
Where the vocabulary has a token that ends documents, every document ends with it. Imports no jax.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core_flax.data import folder
from core_flax.types import UserError
from lm_flax import tokenizers
from lm_flax.tokenizers import Tokenizer

KIND, FORMAT = "lm_flax.tokens", 1
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split.

    Attributes:
      documents: documents, or parts of them.
      tokens: ends of documents included.
      characters: of the text.
      bytes: of the text in UTF-8.
      words: between white space, and line ends: what the tokenizer "word" makes of the text.
    """

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    words: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
      fingerprint: of the tokenizer (Tokenizer.fingerprint): data and model must agree on it.
      num_tokens: size of the vocabulary.
      splits: counts by the name of the split.
      files: size and SHA-256 of every other file in the folder.
      settings: what it was prepared from and how.
      end_id: the token that ends documents, where the model that the tokenizer came with has said which.
    """

    fingerprint: str
    num_tokens: int
    splits: dict[str, SplitInfo]
    files: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    end_id: int | None = None

    @property
    def content(self) -> str:
        """Equal exactly when two folders hold the same tokens and tokenizer."""
        return folder.content(self.files)

    def save(self, directory: Path) -> None:
        """Write manifest.json, atomically."""
        folder.write_manifest(directory, {"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Read manifest.json. Raises UserError if the folder is not complete or holds something else."""

        def make(stored: dict[str, Any]) -> "Manifest":
            fields = {name: value for name, value in stored.items() if name not in ("kind", "format", "splits")}
            return cls(splits={name: SplitInfo(**split) for name, split in stored["splits"].items()}, **fields)

        return folder.read_manifest(directory, KIND, FORMAT, make)


class TokenWriter:
    """Writes the tokens of one split in the order given."""

    def __init__(self, directory: Path, split: str, num_tokens: int) -> None:
        self._directory, self._split = directory, split
        self._dtype, self._counts_V = folder.token_type(num_tokens), np.zeros(num_tokens, np.int64)
        self._ends: list[int] = []
        self._info = SplitInfo()
        self._partial = (directory / f"{split}.tokens.partial").open("wb")

    @property
    def tokens(self) -> int:
        """How many have been written."""
        return self._info.tokens

    def write(self, ids: np.ndarray, text: SplitInfo, ends: bool) -> None:
        """Append tokens, and end the document behind them if it does.

        Args:
          ids: int [n].
          text: what there is to count in the text that they are of; its own tokens and documents do not matter.
          ends: whether a document ends.

        Raises:
          OSError: the disk refuses.
        """
        self._partial.write(ids.astype(self._dtype).tobytes())
        self._counts_V += np.bincount(ids, minlength=len(self._counts_V))
        info = self._info
        self._info = SplitInfo(
            documents=info.documents + ends,
            tokens=info.tokens + len(ids),
            characters=info.characters + text.characters,
            bytes=info.bytes + text.bytes,
            words=info.words + text.words,
        )
        if ends:
            self._ends.append(self._info.tokens)

    def finish(self) -> tuple[SplitInfo, dict[str, dict[str, Any]]]:
        """Complete the files of this split. Returns its counts and its files as the manifest lists them."""
        self._partial.close()
        path = self._directory / f"{self._split}.tokens"
        Path(self._partial.name).rename(path)
        arrays = {"ends": np.array(self._ends, np.int64), "counts": self._counts_V}
        for name, array in arrays.items():
            np.save(self._directory / f"{self._split}.{name}.npy", array)
        names = [path.name, *(f"{self._split}.{name}.npy" for name in arrays)]
        return self._info, {name: folder.describe_file(self._directory / name) for name in names}

    def abort(self) -> None:
        """Close the file without completing it."""
        self._partial.close()


class TokenStore:
    """Random access to the tokens of one split of a prepared folder; they stay on disk. Threads may share it.

    Attributes:
      manifest: what the folder holds.
      info: counts of this split.
      tokens_T: the stream, mapped into memory.
      ends: int64 [documents], ascending.
      counts_V: how often each token occurs.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        """Raises UserError if the folder is not complete, or a file is missing or has another size."""
        home = Path(directory)
        self.manifest = Manifest.load(home)
        self.info = self.manifest.splits[split]
        for name in (name for name in self.manifest.files if name.startswith((f"{split}.", "tokenizer."))):
            folder.check_file(home, name, self.manifest.files)
        self.tokens_T = np.zeros(0, folder.token_type(self.manifest.num_tokens))
        if self.info.tokens:  # what is empty cannot be mapped
            self.tokens_T = np.memmap(home / f"{split}.tokens", self.tokens_T.dtype, "r")
        self.ends, self.counts_V = (np.load(home / f"{split}.{name}.npy") for name in ("ends", "counts"))


def load_tokenizer(directory: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a prepared folder. Raises UserError if it is not the one that the manifest names."""
    found = tokenizers.load(directory, manifest.end_id)
    if found.fingerprint != manifest.fingerprint:
        raise UserError(f"{directory / found.file} is not the tokenizer of this folder; run prepare again")
    return found
