"""The vocabulary of a Marian folder: source.spm and target.spm cut text into pieces, vocab.json numbers them.

Source: transformers' MarianTokenizer. It also normalises punctuation where the package sacremoses is installed; here
text is taken as it is.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from core_flax import storage
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import UserError
from core_flax.weight_files import read_json

SOURCE, TARGET, VOCAB = "source.spm", "target.spm", "vocab.json"
SETTINGS = "tokenizer_config.json"
END, UNKNOWN = "</s>", "<unk>"
_LANGUAGE = re.compile(r">>(.+)<<")


class MarianVocabulary:
    """Pieces and their numbers; for encoding and decoding the same as core's SentencePiece.

    Attributes:
      num_tokens: size of the vocabulary.
      bos_id: what targets begin with: Marian's models take padding for it.
      eos_id, unk_id: ids of the end of a sentence and of what the vocabulary does not know.
      languages: id of the piece ``>>xx<<`` that asks for language xx, by language; text never gives these pieces.
    """

    def __init__(self, source: bytes, target: bytes, ids: dict[str, int], bos_id: int, origin: str = "it") -> None:
        """From the bytes of the two models and the numbers of the pieces.

        Raises:
          UserError: a model is none, or the numbers lack a piece that must be or are not 0, 1, 2 ...
        """
        self._source_model, self._target_model, self._ids = source, target, ids
        self._source = _processor(source, f"{SOURCE} of {origin}")
        self._target = _processor(target, f"{TARGET} of {origin}")
        self.num_tokens = len(ids)
        if set(ids.values()) != set(range(len(ids))):
            raise UserError(f"{VOCAB} of {origin} does not number its pieces 0, 1, 2 ...; get it again")
        missing = [piece for piece in (END, UNKNOWN) if piece not in ids]
        if missing or not 0 <= bos_id < len(ids):
            raise UserError(
                f"{VOCAB} of {origin} lacks {missing[0] if missing else f'the piece {bos_id}'}; get it again"
            )
        self._pieces = sorted(ids, key=ids.__getitem__)
        self.bos_id, self.eos_id, self.unk_id = bos_id, ids[END], ids[UNKNOWN]
        matches = {piece: _LANGUAGE.fullmatch(piece) for piece in ids}
        self.languages = {match[1]: ids[piece] for piece, match in matches.items() if match}
        self._silent = {self.bos_id, self.eos_id, *self.languages.values()}

    @classmethod
    def load(cls, folder: str | Path, bos_id: int) -> "MarianVocabulary":
        """Read the three files. Raises UserError if one is missing or is not what it should be."""
        folder = storage.path(folder)
        ids = read_json(folder / VOCAB)
        if not all(isinstance(number, int) for number in ids.values()):
            raise UserError(f"{folder / VOCAB} holds something other than pieces and their numbers; get it again")
        return cls(_bytes(folder / SOURCE), _bytes(folder / TARGET), ids, bos_id, str(folder))

    @classmethod
    def of(cls, tokenizer: SentencePiece) -> "MarianVocabulary":
        """One model for both languages; targets begin with its ``<s>``, which serves as padding."""
        numbers = range(tokenizer.num_tokens)
        ids = {piece: number for number, piece in zip(numbers, tokenizer.pieces(numbers), strict=True)}
        for language, number in tokenizer.languages.items():
            del ids[f"<2{language}>"]
            ids[f">>{language}<<"] = number
        model = tokenizer.model
        return cls(model, model, dict(sorted(ids.items(), key=lambda item: item[1])), tokenizer.bos_id)

    @property
    def bos(self) -> str:
        """The piece that targets begin with."""
        return self._pieces[self.bos_id]

    def save(self, folder: Path) -> None:
        """Write the three files, bit for bit those that were read."""
        (folder / SOURCE).write_bytes(self._source_model)
        (folder / TARGET).write_bytes(self._target_model)
        text = json.dumps(self._ids, indent=2, ensure_ascii=False)
        (folder / VOCAB).write_text(text + "\n", encoding="utf-8")

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all of it: if equal, every text gets equal ids."""
        numbers = json.dumps([self._pieces, self.bos_id]).encode()
        parts = (hashlib.sha256(part).digest() for part in (self._source_model, self._target_model, numbers))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text of the source language, without beginning and end."""
        return self._encode(self._source, texts)

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text of the target language, likewise."""
        return self._encode(self._target, texts)

    def _encode(self, processor: Any, texts: Sequence[str]) -> list[list[int]]:
        cut = processor.encode(list(texts), out_type=str) if texts else []
        return [[self._ids.get(piece, self.unk_id) for piece in pieces] for pieces in cut]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids in the target language; pieces that stand for no text leave nothing behind."""
        return self._target.decode_pieces(self.pieces(number for number in ids if int(number) not in self._silent))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The pieces with these ids; ``▁`` marks where a word begins. Padding of the vocabulary is unknown."""
        known = len(self._pieces)
        return [self._pieces[int(number)] if int(number) < known else UNKNOWN for number in ids]


def _processor(model: bytes, origin: str) -> Any:
    try:
        if not model:
            raise RuntimeError
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        processor.get_piece_size()
    except RuntimeError as error:
        raise UserError(f"{origin} is no SentencePiece model; get it again") from error
    return processor


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
