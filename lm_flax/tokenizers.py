"""How text becomes tokens: characters, words, byte-level BPE, SentencePiece. Imports no jax.

All kinds have the same methods (``Tokenizer``). A tokenizer is one file of a prepared folder and of a run's: our own
tokenizer.json (characters, words), a tokenizer.json of the package tokenizers (BPE), or a tokenizer.model
(SentencePiece).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from tokenizers import Tokenizer as PackageTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from core_flax import storage
from core_flax.data.folder import MANIFEST
from core_flax.text import sentencepiece_model
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import UserError
from core_flax.weight_files import read_json

Kind = Literal["char", "word", "bpe", "sentencepiece"]
KINDS: tuple[Kind, ...] = ("char", "word", "bpe", "sentencepiece")

JSON, MODEL = "tokenizer.json", "tokenizer.model"
END_OF_TEXT, UNKNOWN, END_OF_LINE = "<|endoftext|>", "<unk>", "<eos>"
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""What ends a document in published vocabularies, the first that there is."""
_GPT2_FILES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Vocabulary and merges of a byte-level BPE, as transformers and as OpenAI call them."""


class Tokenizer(Protocol):
    """What preparing, evaluation and generation need of a tokenizer.

    Attributes:
      file: name of its file in a folder.
      num_tokens: size of the vocabulary.
      end_id: what ends a document, and so stands before the next; None: nothing does.
      unk_id: what stands for all that is not in the vocabulary; None: nothing does.
      is_words: whether tokens are words and line ends, so that loss per token is loss per word.
    """

    file: str
    num_tokens: int
    end_id: int | None
    unk_id: int | None
    is_words: bool

    @property
    def fingerprint(self) -> str:
        """SHA-256: if equal, every text gets equal tokens."""
        ...

    def encode(self, text: str, ends: bool = False) -> np.ndarray:
        """Tokens of a text, int32; with ``ends`` the document's end after them. Raises UserError if it cannot be."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of tokens; the end of a document leaves nothing behind."""
        ...

    def words(self) -> list[str]:
        """Of every token the word that it stands for by itself; "" for parts of words and for marks."""
        ...

    def save(self, path: Path) -> None:
        """Write its file."""
        ...


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ended(ids: np.ndarray, end_id: int | None, ends: bool) -> np.ndarray:
    return np.append(ids, np.int32(end_id)) if ends and end_id is not None else ids


class Characters:
    """Every character a token, in the order of their code points; after them, if there is one, a document's end."""

    file, is_words = JSON, False

    def __init__(self, characters: str, has_end: bool) -> None:
        self._characters, self._has_end = characters, has_end
        self._codes = np.array([ord(each) for each in characters], np.uint32)
        self.num_tokens = len(characters) + has_end
        self.end_id = len(characters) if has_end else None
        self.unk_id: int | None = None

    @property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        return _sha256(self._json())

    def _json(self) -> str:
        return json.dumps({"kind": "char", "characters": self._characters, "has_end": self._has_end})

    def encode(self, text: str, ends: bool = False) -> np.ndarray:
        """See Tokenizer. Raises UserError at a character that is not in the vocabulary."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        wrong = np.flatnonzero(self._codes[ids] != codes)
        if len(wrong):
            known = f"the {len(self._codes)} characters of the vocabulary"
            raise UserError(f"{chr(codes[wrong[0]])!r} is not among {known}; leave it out, or prepare text that has it")
        return _ended(ids.astype(np.int32), self.end_id, ends)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return "".join(self._characters[number] for number in map(int, ids) if number < len(self._characters))

    def words(self) -> list[str]:
        """See Tokenizer."""
        return [*self._characters, *[""] * self._has_end]

    def save(self, path: Path) -> None:
        """See Tokenizer."""
        path.write_text(self._json() + "\n", encoding="utf-8")


class Words:
    """Words between white space, and ``<eos>`` at the end of every line, as Mikolov's data sets are read.

    Words that are not in the vocabulary are ``<unk>``. A document ends as a line does.
    """

    file, is_words = JSON, True

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._ids = {word: number for number, word in enumerate(self._words)}
        self.num_tokens = len(self._words)
        self._line_end = self._ids[END_OF_LINE]
        self.end_id: int | None = self._line_end
        self._unknown = self._ids[UNKNOWN]
        self.unk_id: int | None = self._unknown

    @classmethod
    def of(cls, counts: Counter[str], vocab_size: int | None) -> "Words":
        """The most frequent words (equally frequent ones by the alphabet), with what there must be; None: all."""
        counts = Counter(counts)
        least = {UNKNOWN, END_OF_LINE}
        ordered = sorted(counts.keys() | least, key=lambda word: (-counts[word], word))
        if vocab_size is not None:
            kept = [word for word in ordered if word not in least][: max(0, vocab_size - len(least))]
            ordered = [word for word in ordered if word in {*kept, *least}]
        return cls(ordered)

    @property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        return _sha256(self._json())

    def _json(self) -> str:
        return json.dumps({"kind": "word", "words": self._words}, ensure_ascii=False)

    def encode(self, text: str, ends: bool = False) -> np.ndarray:
        """See Tokenizer. A last line without its end gets one where the document ends."""
        *lines, rest = text.split("\n")
        ids: list[int] = []
        for line in lines:
            ids += [self._ids.get(word, self._unknown) for word in line.split()]
            ids.append(self._line_end)
        ids += [self._ids.get(word, self._unknown) for word in rest.split()]
        if ends and rest.strip():
            ids.append(self._line_end)
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        words = [self._words[int(number)] for number in ids]
        text = " ".join("\n" if word == END_OF_LINE else word for word in words)
        return re.sub(" ?\n ?", "\n", text)

    def words(self) -> list[str]:
        """See Tokenizer."""
        return ["" if word in (UNKNOWN, END_OF_LINE) else word for word in self._words]

    def save(self, path: Path) -> None:
        """See Tokenizer."""
        path.write_text(self._json() + "\n", encoding="utf-8")


class BytePairs:
    """A tokenizer of the package tokenizers: byte-level BPE (Radford et al. 2019, section 2.2), or what a file holds.

    Special tokens that stand in a text are text like any other, so that no text can end a document by itself.

    Args:
      tokenizer: the package's.
      origin: where it is from, for messages.
      end_id: the token that ends a document; None: the first of the common ones that it has.

    Raises:
      UserError: it has none of them.
    """

    file, is_words = JSON, False

    def __init__(self, tokenizer: PackageTokenizer, origin: str = "the tokenizer", end_id: int | None = None) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.num_tokens = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.unk_id: int | None = None  # bytes spell everything
        found = [tokenizer.token_to_id(token) for token in _ENDS]
        self.end_id = next((number for number in [end_id, *found] if number is not None), None)
        if self.end_id is None:
            raise UserError(f"{origin} has no token that ends a document (such as {END_OF_TEXT}); add one to it")

    def __reduce__(self) -> tuple:
        return _byte_pairs_from, (self._tokenizer.to_str(), self.end_id)

    @property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        return _sha256(self._tokenizer.to_str())

    @property
    def start_id(self) -> int | None:
        """The token that its file puts before every text, as Llama's do; None: none."""
        ids = self._tokenizer.encode("", add_special_tokens=True).ids
        return ids[0] if ids else None

    def encode(self, text: str, ends: bool = False) -> np.ndarray:
        """See Tokenizer."""
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        return _ended(ids, self.end_id, ends)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)

    def words(self) -> list[str]:
        """See Tokenizer."""
        found = [""] * self.num_tokens
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if token.startswith(("Ġ", "▁")) and len(token) > 1:  # how a space before a word is written
                found[number] = self._tokenizer.decode([number]).strip()
        return found

    def token(self, number: int) -> str:
        """How the file writes a token."""
        return self._tokenizer.id_to_token(number) or ""

    def save(self, path: Path) -> None:
        """See Tokenizer."""
        path.write_text(self._tokenizer.to_str() + "\n", encoding="utf-8")


def _byte_pairs_from(text: str, end_id: int | None) -> BytePairs:
    return BytePairs(PackageTokenizer.from_str(text), end_id=end_id)


class Pieces:
    """SentencePiece (Kudo and Richardson 2018); ``</s>`` ends a document."""

    file, is_words = MODEL, False

    def __init__(self, model: SentencePiece, end_id: int | None = None) -> None:
        self._model, self.num_tokens, self.start_id = model, model.num_tokens, model.bos_id
        self.end_id: int | None = model.eos_id if end_id is None else end_id
        self.unk_id: int | None = model.unk_id

    @property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        return self._model.fingerprint

    def encode(self, text: str, ends: bool = False) -> np.ndarray:
        """See Tokenizer."""
        return _ended(np.array(self._model.encode([text])[0], np.int32), self.end_id, ends)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return self._model.decode(ids)

    def words(self) -> list[str]:
        """See Tokenizer."""
        pieces = self._model.pieces(range(self.num_tokens))
        return [piece[1:] if piece.startswith("▁") else "" for piece in pieces]

    def token(self, number: int) -> str:
        """How the model writes a token."""
        return self._model.pieces([number])[0]

    def save(self, path: Path) -> None:
        """See Tokenizer."""
        self._model.save(path)


def train_byte_pairs(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """Learns byte-level BPE as GPT-2 has it: ``vocab_size`` tokens, of which 256 are bytes and one ends a document.

    Raises:
      UserError: the texts do not give so many.
    """
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        limit = "at least 257: every byte and the end of a document" if found > vocab_size else f"{found} at most"
        raise UserError(f"--vocab-size {vocab_size} cannot be had from this text; choose {limit}")
    return BytePairs(tokenizer)


def train_pieces(texts: Iterable[str], vocab_size: int) -> Pieces:
    """Learns SentencePiece's BPE, with a piece for the end of a line. Raises UserError as sentencepiece_model.train."""
    return Pieces(sentencepiece_model.train(texts, vocab_size, symbols=["\n"]))


def _byte_level(model: models.BPE) -> PackageTokenizer:
    tokenizer = PackageTokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def is_common(tokenizer: Tokenizer) -> bool:
    """Whether other programs can read its file."""
    return isinstance(tokenizer, BytePairs | Pieces)


def about(tokenizer: Tokenizer, start_id: int | None) -> dict[str, Any]:
    """What tokenizer_config.json says of a tokenizer, so that transformers reads its file as we do; {} if it cannot.

    Their LlamaTokenizer makes the same tokens of a SentencePiece model but where that changes the text: several spaces,
    characters of another form, and such as it does not know.
    """
    if isinstance(tokenizer, Pieces):
        name: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
        name["unk_token"] = "" if tokenizer.unk_id is None else tokenizer.token(tokenizer.unk_id)
    elif isinstance(tokenizer, BytePairs):
        name = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        return {}
    marks = {"bos_token": start_id, "eos_token": tokenizer.end_id}
    return name | {mark: tokenizer.token(number) for mark, number in marks.items() if number is not None}


def end_of(path: Path) -> int | None:
    """The token that ends documents, as the model or data say that a tokenizer lies beside; None: nothing there does.

    Args:
      path: a folder of ours or of Hugging Face's; of a file nothing is known.
    """
    for name, key in ((MANIFEST, "end_id"), ("config.json", "end_id"), ("config.json", "eos_token_id")):
        if path.is_dir() and (path / name).is_file():
            found = read_json(path / name).get(key)
            first = found[0] if isinstance(found, list) and found else found
            if isinstance(first, int) and first >= 0:
                return first
    return None


def load(path: str | Path, end_id: int | None = None) -> Tokenizer:
    """The tokenizer in a file, or in a folder: ours, a tokenizer.json, vocab.json beside merges.txt, or a .model.

    Args:
      path: the file or folder.
      end_id: the token that ends documents, where an imported model says which; None: the tokenizer's own.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = storage.path(path)
    if path.is_dir():
        there = [path / name for name in (JSON, *_GPT2_FILES, MODEL) if (path / name).is_file()]
        if not there:
            raise UserError(f"{path} holds no tokenizer: none of {JSON}, vocab.json with merges.txt, or {MODEL}")
        path = there[0]
    if path.suffix == ".model":
        return Pieces(SentencePiece.load(path), end_id)
    if path.name.endswith((*_GPT2_FILES, *_GPT2_FILES.values())):
        return _load_gpt2(path, end_id)
    return _load_json(path, end_id)


def _load_gpt2(path: Path, end_id: int | None) -> Tokenizer:
    """GPT-2's own files, which lie beside each other; their names end in what one of ``_GPT2_FILES`` has."""
    ends = next(pair for pair in _GPT2_FILES.items() if path.name.endswith(pair))
    stem = path.name.removesuffix(ends[0]).removesuffix(ends[1])
    vocab, merges = (path.with_name(stem + end) for end in ends)
    try:
        tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the package raises nothing narrower
        missing = [str(file) for file in (vocab, merges) if not file.is_file()]
        why = f"{' and '.join(missing)} is missing" if missing else f"{error}"
        raise UserError(f"cannot read the byte-level BPE {vocab} and {merges}: {why}") from error
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return BytePairs(tokenizer, str(vocab), end_id)


def _load_json(path: Path, end_id: int | None) -> Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read the tokenizer {path} ({why}); give a tokenizer.json, a vocab.json beside its merges.txt, or "
            "a .model"
        ) from error
    try:
        if stored.get("kind") == "char":
            return Characters(stored["characters"], stored["has_end"])
        if stored.get("kind") == "word":
            return Words(stored["words"])
        return BytePairs(PackageTokenizer.from_str(text), str(path), end_id)
    except UserError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise UserError(f"{path} is no tokenizer.json ({error}); give another file") from error
