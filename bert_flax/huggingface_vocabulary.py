"""The vocabulary of a Hugging Face folder: vocab.txt or tokenizer.json, and what says how text is cut into pieces."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from core_flax.text.wordpiece import CLS, MASK, PAD, SEP, SPECIALS, UNK, WordPiece
from core_flax.types import UserError
from core_flax.weight_files import read_json

VOCAB, TOKENIZER, SETTINGS, ADDED = "vocab.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
CLASSES = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
ROLES = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}

FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    SETTINGS: {
        "tokenizer_class": (*CLASSES, None),
        "do_basic_tokenize": (True,),
        "tokenize_chinese_chars": (True,),
        "never_split": ([], None),
        "additional_special_tokens": ([], None),
        "extra_special_tokens": ([], {}, None),
    },
    TOKENIZER: {
        "model.type": ("WordPiece", None),
        "model.unk_token": (UNK,),
        "model.continuing_subword_prefix": ("##",),
        "model.max_input_chars_per_word": (100,),
        "normalizer.type": ("BertNormalizer",),
        "normalizer.clean_text": (True,),
        "normalizer.handle_chinese_chars": (True,),
        "pre_tokenizer.type": ("BertPreTokenizer",),
    },
}
"""Settings by file of which WordPiece has one value, the first; the others are other ways to write it."""
STRIP, LOWER = "normalizer.strip_accents", "normalizer.lowercase"


def read_vocabulary(folder: Path) -> tuple[WordPiece, list[str]]:
    """The vocabulary, and what the user should know of how it was read.

    Raises:
      UserError: there is none, its files contradict each other, or they cut text in a way that WordPiece does not.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    tokenizer = read_json(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else {}
    for file, found in ((SETTINGS, settings), (TOKENIZER, tokenizer)):
        for name, values in FIXED[file].items() if found else ():
            value = _get(found, name, values[0] if file == SETTINGS else None)
            if value not in values:
                raise UserError(f"{folder / file}: {name} is {value!r}; only {values[0]!r} can be read")
    pieces, origin = _pieces(folder, tokenizer)
    lowercase, notes = _lowercase(folder, settings, tokenizer, pieces)
    for file, accents in ((SETTINGS, settings.get("strip_accents")), (TOKENIZER, _get(tokenizer, STRIP))):
        if accents not in (None, lowercase):
            raise UserError(
                f"{folder / file}: strip_accents is {accents} where text is {'' if lowercase else 'not '}lower-cased; "
                "accents are stripped exactly where text is lower-cased"
            )
    vocabulary = WordPiece(pieces, lowercase, origin=f"the vocabulary {origin}")
    _check_specials(folder, settings, tokenizer, vocabulary)
    return vocabulary, notes


def write_vocabulary(folder: Path, vocabulary: WordPiece, max_length: int) -> None:
    """vocab.txt and tokenizer_config.json, as transformers' BertTokenizer reads them."""
    vocabulary.save(folder / VOCAB)
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": vocabulary.lowercase,
        "strip_accents": None,  # where text is lower-cased
        "tokenize_chinese_chars": True,
        "model_max_length": max_length,
        **ROLES,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _get(content: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """content[a][b] for name "a.b"; default where one of them is missing."""
    value: Any = content
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def _pieces(folder: Path, tokenizer: Mapping[str, Any]) -> tuple[list[str], Path]:
    """The pieces by id, and the file that has them; where two have, they agree."""
    listed = None
    if tokenizer:
        ids = _get(tokenizer, "model.vocab")
        if not isinstance(ids, dict) or not _are_numbered(ids.values()):
            raise UserError(f"{folder / TOKENIZER}: model.vocab does not number its pieces from 0 on; get it again")
        listed = sorted(ids, key=ids.__getitem__)
    if not (folder / VOCAB).is_file():
        if listed is None:
            raise UserError(f"{folder} has no vocabulary: neither {VOCAB} nor {TOKENIZER}; get one of them")
        return listed, folder / TOKENIZER
    pieces = list(WordPiece.load(folder / VOCAB).pieces)
    if listed not in (None, pieces):
        raise UserError(f"{folder}: {VOCAB} and {TOKENIZER} hold different vocabularies; remove the one that is wrong")
    return pieces, folder / VOCAB


def _are_numbered(ids: Collection[Any]) -> bool:
    return all(type(number) is int for number in ids) and set(ids) == set(range(len(ids)))


def _lowercase(
    folder: Path, settings: Mapping[str, Any], tokenizer: Mapping[str, Any], pieces: list[str]
) -> tuple[bool, list[str]]:
    said = {value for value in (settings.get("do_lower_case"), _get(tokenizer, LOWER)) if value is not None}
    if odd := [value for value in said if not isinstance(value, bool)]:
        raise UserError(
            f"{folder}: {SETTINGS} or {TOKENIZER} lower-cases by {odd[0]!r}, which is neither true nor false"
        )
    if len(said) == 2:
        raise UserError(f"{folder}: {SETTINGS} and {TOKENIZER} differ on lower-casing; remove the one that is wrong")
    if said:
        return said.pop(), []
    # Without a word on it, a vocabulary with capital letters is one that text must not be lower-cased for.
    capitals = [piece for piece in pieces if piece != piece.lower() and not piece.startswith("[")]
    because = f"it has {capitals[0]!r}" if capitals else "it has no capital letters"
    how = "not lower-cased" if capitals else "lower-cased"
    return not capitals, [f"no {SETTINGS} says it: text is {how}, since of the vocabulary {because}"]


def _check_specials(
    folder: Path, settings: Mapping[str, Any], tokenizer: Mapping[str, Any], vocabulary: WordPiece
) -> None:
    """The special pieces have their usual names, and there are no others: text in which they occur is cut by them."""
    for role, piece in ROLES.items():
        named = settings.get(role) or piece
        named = named.get("content") if isinstance(named, dict) else named
        if named != piece:
            raise UserError(f"{folder / SETTINGS}: {role} is {named!r}; only {piece} can be read")
    for file, piece, number in _added(folder, settings, tokenizer):
        if piece not in SPECIALS or vocabulary.pieces.index(piece) != number:
            raise UserError(
                f"{folder / file}: {piece!r}, added as {number}, is looked for in text before it is cut into pieces; "
                f"only {' '.join(SPECIALS)} can be read so"
            )


def _added(folder: Path, settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(file, piece, id) of the pieces that stand beside the vocabulary's own."""
    file = TOKENIZER
    try:
        for entry in tokenizer.get("added_tokens") or []:
            yield file, entry["content"], entry["id"]
        file = SETTINGS
        for number, entry in (settings.get("added_tokens_decoder") or {}).items():
            yield file, entry["content"], int(number)
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / file}: its added tokens cannot be read ({error}); get it again") from error
    if (folder / ADDED).is_file():
        for piece, number in read_json(folder / ADDED).items():
            yield ADDED, piece, number
