"""WordPiece: training a vocabulary, the standard vocab.txt, and fast encoding (BERT's pieces, arXiv 1810.04805)."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from core_flax import storage
from core_flax.types import UserError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIALS = (PAD, UNK, CLS, SEP, MASK)
_FEW_CHARACTERS, _COVERAGE = 1000, 0.9995
_MAX_WORD_CHARACTERS = 100
"""Longer words become [UNK], as in BERT's own tokenizer."""
_LONG_RUN = re.compile(r"[^ \t\n\r]{1000}")
"""Training takes time quadratic in a word's length, so it breaks such runs (Thai, base64).
Other white space does not count: some of it is removed as control characters."""


class WordPiece:
    """A WordPiece vocabulary and the splitting of text into its pieces, as BERT does it.

    Text is cleaned of control characters, lower-cased and stripped of accents if asked to, split at white space,
    punctuation and CJK characters, and each word into the longest pieces that the vocabulary has.

    Attributes:
        pieces: the vocabulary in the order of its ids; pieces that continue a word begin with ``##``.
        lowercase: whether text is lower-cased and stripped of accents.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special pieces.
        num_tokens: size of the vocabulary.
    """

    def __init__(self, pieces: Sequence[str], lowercase: bool = True, origin: str = "the vocabulary"):
        ids = {piece: number for number, piece in enumerate(pieces)}
        missing = [special for special in SPECIALS if special not in ids]
        if missing:
            raise UserError(
                f"{origin} lacks {', '.join(missing)}; BERT needs {' '.join(SPECIALS)} each on its own line"
            )
        if len(ids) != len(pieces):
            twice = next(piece for number, piece in enumerate(pieces) if ids[piece] != number)
            raise UserError(f"{origin} has {twice!r} twice; every piece must stand on one line only")
        self.pieces = tuple(pieces)
        self.lowercase = lowercase
        self.num_tokens = len(pieces)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[special] for special in SPECIALS)
        self._tokenizer = _tokenizer(
            models.WordPiece(ids, unk_token=UNK, max_input_chars_per_word=_MAX_WORD_CHARACTERS)
        )
        self._tokenizer.normalizer = _normalizer(lowercase)
        self._tokenizer.add_special_tokens(list(SPECIALS))
        self._tokenizer.encode_special_tokens = True

    @classmethod
    def load(cls, path: str | Path, lowercase: bool = True) -> "WordPiece":
        """Read a vocab.txt, one piece a line. Raises UserError if it is missing or is no WordPiece vocabulary."""
        try:
            text = storage.path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the vocabulary {path} is not UTF-8 (byte {error.start})") from error
        pieces = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
        return cls(pieces, lowercase, origin=f"the vocabulary {path}")

    def save(self, path: str | Path) -> None:
        """Write vocab.txt: one piece a line, the line number is the id."""
        Path(path).write_text("".join(f"{piece}\n" for piece in self.pieces), encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces and the lower-casing: equal exactly when every text gets equal ids."""
        text = json.dumps({"lowercase": self.lowercase, "pieces": self.pieces}, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of [PAD], [UNK], [CLS], [SEP] and [MASK], in this order."""
        return self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id

    @property
    def continues_word(self) -> np.ndarray:
        """bool [V]: the pieces that continue a word (written ``##...``)."""
        return np.array([piece.startswith("##") and len(piece) > 2 for piece in self.pieces])

    def encode(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        """Ids of each text, without [CLS] and [SEP] around.

        Args:
            texts: what to encode; many at once are faster.
            specials: whether "[MASK]" and the like in a text stand for the special pieces. In a corpus they are just
                text: a page about BERT must not mark sentence ends inside a sentence.
        """
        # The setting lives in the shared tokenizer; ids of one text are asked for by one thread at a time.
        self._tokenizer.encode_special_tokens = not specials
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of a text, and which of its characters each stands for. What looks like a special piece is text.

        Returns:
            ids, starts, ends, int32 [L] each: piece ``i`` comes from ``text[starts[i] : ends[i]]``, characters of the
            text as it was before cleaning, lower-casing and stripping. Starts and ends never decrease. Pieces overlap
            where one character became several (Hangul, lower-cased, is split into its letters), and marks that were
            stripped belong to the piece that they stand on: a slice never leaves a letter's accent behind.
        """
        self._tokenizer.encode_special_tokens = True
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
        if not text.isascii():
            limits = [*starts[1:], len(text)]
            for piece, limit in enumerate(limits[: len(ends)]):
                while ends[piece] < limit and unicodedata.category(text[ends[piece]]) == "Mn":
                    ends[piece] += 1
        return np.array(encoding.ids, np.int32), starts, ends

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids: pieces joined to words, words separated by spaces, special pieces kept."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)

    def __reduce__(self) -> tuple:
        return WordPiece, (self.pieces, self.lowercase)


def train(texts: Sequence[str], vocab_size: int, lowercase: bool = True) -> WordPiece:
    """Learn a vocabulary of at most ``vocab_size`` pieces; the same texts give the same pieces in the same order.

    The learner is that of the ``tokenizers`` package: merges of the most frequent pair, as for byte-pair encoding.
    Memory grows with the number of different words, so give it a sample of a large corpus. The special pieces come
    first, then the most frequent characters (at most a quarter of the vocabulary; more than 1000 only as long as these
    are not 99.95 % of the text, as in Chinese) by code point, then these with ``##``, then what was learned, the most
    frequent first. Runs without white space are learned from in pieces of 1000 characters: words of more than 100 are
    [UNK] anyway.

    Raises:
        UserError: ``vocab_size`` is too small to learn anything.
    """
    if vocab_size < 100:
        raise UserError(f"--vocab-size {vocab_size} is too small; take at least 100 (BERT has 30522)")
    tokenizer = _tokenizer(models.WordPiece({}, unk_token=UNK))
    tokenizer.normalizer = _normalizer(lowercase)
    characters = _characters(texts, tokenizer, vocab_size // 4)
    # Left to itself the trainer numbers the ## characters in the order of a hash map, which differs from run to run,
    # and breaks ties by these numbers. Named as special tokens they have fixed numbers.
    inner = ["##" + character for character in characters if _continues(character, tokenizer)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *characters, *inner],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_LONG_RUN.sub(r"\g<0> ", text) for text in texts), trainer)
    vocab = tokenizer.get_vocab()
    return WordPiece(sorted(vocab, key=vocab.__getitem__), lowercase)


def _characters(texts: Iterable[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    """The most frequent characters after normalisation, sorted; ties go to the lower code point.

    At most ``limit``, and more than _FEW_CHARACTERS only until _COVERAGE of the text is made of them.
    """
    raw_counts = np.zeros(0x110000, np.int64)
    for text in texts:
        codes, counts = np.unique(
            np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32), return_counts=True
        )
        raw_counts[codes] += counts
    counter: Counter[str] = Counter()
    for code in raw_counts.nonzero()[0]:
        for character in tokenizer.normalizer.normalize_str(chr(code)).replace(" ", ""):
            counter[character] += int(raw_counts[code])
    ranked = sorted(counter, key=lambda character: (-counter[character], character))
    spelt = np.cumsum([counter[character] for character in ranked])
    enough = int(np.searchsorted(spelt, _COVERAGE * spelt[-1])) + 1 if len(spelt) else 0
    return sorted(ranked[: min(limit, max(_FEW_CHARACTERS, enough))])


def _continues(character: str, tokenizer: Tokenizer) -> bool:
    """Whether a word can go on with this character: punctuation and CJK characters always stand alone."""
    normal = tokenizer.normalizer.normalize_str(f"a{character}a")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(normal)) == 1


def single_threaded() -> None:
    """Keep the tokenizer of this process to one thread: for worker processes, which are parallel already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _tokenizer(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return tokenizer


def _normalizer(lowercase: bool) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )
