"""SentencePiece: training a BPE or unigram vocabulary, one model file, and encoding (Kudo & Richardson 2018)."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from core_flax import storage
from core_flax.types import UserError

Algorithm = Literal["bpe", "unigram"]

BOS, EOS = "<s>", "</s>"
_LANGUAGE = re.compile(r"<2([A-Za-z][A-Za-z0-9_-]*)>")
_CONTROL = 3
"""ModelProto.SentencePiece.Type.CONTROL: a piece that text never gives, however it looks."""
_TRAINING_THREADS = 8
"""Fixed, whatever the machine has: the unigram learner adds up its counts thread by thread, and sums of floats differ
with the number of parts."""


class SentencePiece:
    """A SentencePiece model and the splitting of text into its pieces.

    Attributes:
        num_tokens: size of the vocabulary.
        bos_id, eos_id, unk_id: ids of the beginning and the end of a sentence and of what the model does not know.
        languages: id of the piece ``<2xx>`` that asks for language xx, by language; text never gives these pieces.
    """

    def __init__(self, model: bytes, origin: str = "the tokenizer"):
        """From the bytes of a model file. Raises UserError if they are none, or lack ``<s>`` or ``</s>``."""
        if not model:
            raise UserError(f"{origin} is empty; give the .model file that was trained")
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.num_tokens = self._processor.get_piece_size()
        except RuntimeError as error:
            raise UserError(f"{origin} is no SentencePiece model; give the .model file that was trained") from error
        self.bos_id, self.eos_id = (self._control(piece, origin) for piece in (BOS, EOS))
        self.unk_id = self._processor.unk_id()
        controls = filter(self._processor.is_control, range(self.num_tokens))
        tags = {number: _LANGUAGE.fullmatch(self._processor.id_to_piece(number)) for number in controls}
        self.languages = {match[1]: number for number, match in tags.items() if match}

    def _control(self, piece: str, origin: str) -> int:
        number = self._processor.piece_to_id(piece)
        if not self._processor.is_control(number):
            raise UserError(f"{origin} lacks the control piece {piece}; train it with --bos_id and --eos_id set")
        return number

    @classmethod
    def load(cls, path: str | Path) -> "SentencePiece":
        """Read a .model file. Raises UserError if it is missing or is no SentencePiece model."""
        try:
            model = storage.path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
        return cls(model, origin=f"the tokenizer {path}")

    @property
    def model(self) -> bytes:
        """The bytes of the .model file."""
        return self._model

    def save(self, path: str | Path) -> None:
        """Write the .model file."""
        Path(path).write_bytes(self._model)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model: if equal, every text gets equal ids."""
        return hashlib.sha256(self._model).hexdigest()

    def with_languages(self, languages: Iterable[str]) -> "SentencePiece":
        """The same model with a piece ``<2xx>`` at its end for each of the languages that has none yet.

        Raises:
            UserError: a language whose name cannot be one.
        """
        model = self._model
        for language in dict.fromkeys(languages):
            check_language(language)
            if language not in self.languages:
                model += _control_piece(f"<2{language}>")
        return SentencePiece(model)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without beginning and end; many at once are faster."""
        return self._processor.encode(list(texts), out_type=int) if texts else []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; pieces that stand for no text (``<s>``, ``</s>``, languages) leave nothing behind."""
        return self._processor.decode([int(number) for number in ids])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The pieces with these ids, as the model writes them: ``▁`` marks where a word begins."""
        return [self._processor.id_to_piece(int(number)) for number in ids]

    def __reduce__(self) -> tuple:
        return SentencePiece, (self._model,)


def check_language(name: str) -> None:
    """Raises UserError if no piece can ask for a language of this name."""
    if not _LANGUAGE.fullmatch(f"<2{name}>"):
        raise UserError(f"{name!r} is no language name; write letters, digits and _, such as de or pt_BR")


def train(
    texts: Iterable[str],
    vocab_size: int,
    algorithm: Algorithm = "bpe",
    character_coverage: float = 0.9995,
    symbols: Sequence[str] = (),
) -> SentencePiece:
    """Learn a vocabulary of ``vocab_size`` pieces; the same texts give the same model on any machine.

    The learner keeps all texts in memory, so give it a sample of a large corpus.

    Args:
        texts: sentences, one a text, of all languages that share the vocabulary.
        vocab_size: pieces, ``<unk>``, ``<s>`` and ``</s>`` among them.
        algorithm: byte-pair encoding (Sennrich et al. 2016, 1508.07909) or the unigram model (Kudo 2018, 1804.10959).
        character_coverage: share of the characters of the texts that get a piece; the rarest become ``<unk>``.
        symbols: pieces that there are in any case and that stand alone; "\\n" keeps ends of lines, which otherwise
            become spaces.

    Raises:
        UserError: the texts do not give so many pieces, or have more different characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=algorithm,
            character_coverage=character_coverage,
            num_threads=_TRAINING_THREADS,
            max_sentence_length=1 << 16,
            user_defined_symbols=list(symbols),
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # ValueError: a size that is no int32
        raise UserError(f"--vocab-size {vocab_size} cannot be had: {_reason(str(error))}") from error
    return SentencePiece(model.getvalue())


def _reason(message: str) -> str:
    """SentencePiece's own words, without the place in its source that they begin with, and an option it has itself."""
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"the texts have so many different characters that it takes {needed[1]}; choose that many at least"
    return re.sub(r"^.*?\) \[.*?\] ", "", message).strip().split("\n")[0] or "the texts give no pieces"


def _control_piece(piece: str) -> bytes:
    """A control piece as bytes that, appended to a model, append the piece.

    A model is a protocol buffer whose field 1 is the repeated list of pieces, and of these more may follow at the end.
    Field 1 of a piece is its text, field 2 its score (a float, 0), field 3 its type.
    """
    text = piece.encode()
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + bytes(4) + b"\x18" + _varint(_CONTROL)
    return b"\x0a" + _varint(len(body)) + body


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
