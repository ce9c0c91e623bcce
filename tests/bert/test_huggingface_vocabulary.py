"""The vocabulary of a Hugging Face folder, whichever of its files says how text is cut, and what cannot be read."""

import pytest
from hf_folder import PIECES, edit, random_arrays, refused, write
from tokenizers.implementations import BertWordPieceTokenizer

from bert_flax.huggingface import load_pretrained
from core_flax.text.wordpiece import WordPiece

TEXTS = ["The quick brown FOX jumped, jumps.", "Café café é 今the", "[MASK] the", "ab aé"]


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", random_arrays())


WORD_PIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {piece: number for number, piece in enumerate(PIECES)},
}


def theirs(folder, **settings):
    """tokenizer.json as the tokenizers package writes it, in place of vocab.txt; the tokenizer."""
    made = BertWordPieceTokenizer({piece: number for number, piece in enumerate(PIECES)}, **settings)
    made.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    return made


@pytest.mark.parametrize("lowercase", [True, False])
def test_tokenizer_json_alone(folder, lowercase):
    made = theirs(folder, lowercase=lowercase)
    found = load_pretrained(folder).vocabulary
    assert (found.pieces, found.lowercase) == (tuple(PIECES), lowercase)
    for text in TEXTS:
        assert found.encode([text], specials=True) == [made.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lowercase": False, "strip_accents": True}, "tokenizer.json: strip_accents is True where text is not lower-"),
        ({"strip_accents": False}, "tokenizer.json: strip_accents is False where text is lower-cased"),
        ({"handle_chinese_chars": False}, "normalizer.handle_chinese_chars is False; only True can be read"),
        ({"clean_text": False}, "normalizer.clean_text is False"),
    ],
)
def test_tokenizer_json_that_cuts_in_another_way(folder, settings, message):
    theirs(folder, **settings)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": None}, "normalizer.type is None; only 'BertNormalizer' can be read"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer.type is 'Whitespace'"),
        ({"model": WORD_PIECE | {"continuing_subword_prefix": "@@"}}, "subword_prefix is '@@'; only '##' can be read"),
        ({"model": WORD_PIECE | {"max_input_chars_per_word": 9}}, "model.max_input_chars_per_word is 9; only 100 can"),
        ({"model": {"type": "BPE"}}, "model.type is 'BPE'; only 'WordPiece'"),
        ({"added_tokens": [{"id": 5, "content": "the"}]}, "'the', added as 5, is looked for in text before it is cut"),
        ({"added_tokens": [{"id": 19, "content": "<e>"}]}, "'<e>', added as 19, is looked for in text"),
        ({"added_tokens": [1]}, "its added tokens cannot be read"),
    ],
)
def test_tokenizer_json_of_another_kind(folder, changes, message):
    theirs(folder)
    edit(folder / "tokenizer.json", **changes)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "tokenizer_class is 'BertJapaneseTokenizer'; only 'BertTokeni"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is False; only True"),
        ({"strip_accents": False}, "tokenizer_config.json: strip_accents is False where text is lower-cased"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize is False"),
        ({"mask_token": "<mask>"}, "mask_token is '<mask>'; only [MASK] can be read"),
        ({"added_tokens_decoder": {"19": {"content": "<e>"}}}, "'<e>', added as 19, is looked for in text"),
        ({"additional_special_tokens": ["<e>"]}, "additional_special_tokens is ['<e>']"),
    ],
)
def test_settings_that_cut_in_another_way(folder, changes, message):
    edit(folder / "tokenizer_config.json", **changes)
    assert message in refused(folder)


def test_settings_that_say_what_is_usual(folder):
    usual = load_pretrained(folder).vocabulary.fingerprint
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="BertTokenizer",
        strip_accents=None,
        tokenize_chinese_chars=True,
        never_split=None,
        mask_token={"content": "[MASK]", "lstrip": False},
        added_tokens_decoder={"0": {"content": "[PAD]"}, "4": {"content": "[MASK]"}},
    )
    assert load_pretrained(folder).vocabulary.fingerprint == usual


def test_files_that_contradict_each_other(folder):
    BertWordPieceTokenizer({piece: number for number, piece in enumerate(PIECES)}).save(str(folder / "tokenizer.json"))
    load_pretrained(folder)  # the same vocabulary, lower-cased in both
    edit(folder / "tokenizer_config.json", do_lower_case=False)
    assert "tokenizer_config.json and tokenizer.json differ on lower-casing" in refused(folder)
    edit(folder / "tokenizer_config.json", do_lower_case="false")
    assert "lower-cases by 'false', which is neither true nor false" in refused(folder)
    edit(folder / "tokenizer_config.json", do_lower_case=True)
    WordPiece([*PIECES[:-1], "other"]).save(folder / "vocab.txt")
    assert "vocab.txt and tokenizer.json hold different vocabularies" in refused(folder)
    (folder / "added_tokens.json").write_text('{"<e>": 19}')
    (folder / "tokenizer.json").unlink()
    assert "added_tokens.json: '<e>', added as 19" in refused(folder)


def test_lower_casing_that_no_file_tells(folder):
    (folder / "tokenizer_config.json").unlink()
    found = load_pretrained(folder)
    assert found.vocabulary.lowercase
    assert "text is lower-cased, since of the vocabulary it has no capital letters" in found.report.notes[0]
    WordPiece([*PIECES[:-1], "Fox"]).save(folder / "vocab.txt")
    found = load_pretrained(folder)
    assert not found.vocabulary.lowercase
    assert "text is not lower-cased, since of the vocabulary it has 'Fox'" in found.report.notes[0]
