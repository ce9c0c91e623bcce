import pickle
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest

from core_flax.text import wordpiece
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError

VOCABULARY = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the quick brown fox jump ##s ##ed over un ##aff ##able ##a cafe naive gross ß "
    "a b c i n t ##i ##n ##t ##g ##ing . , ! ? ' - [ ] mask uni ##corn 今 日 π µ ½ 3 ##3 5 ##5 é e ##e The Fox É"
)
PIECES = VOCABULARY.split()

AWKWARD = [
    "The quick brown fox jumped, unaffable!",
    "Café NAÏVE groß GROSS",
    "tab\tand\nnewline and\u00a0no-break\u2003em space",
    "control\x00 chars\x07 \ufffd dropped\u200d\u200b.",
    "今日 the今日fox",
    "un\u0301affable e\u0301 é É",
    "[MASK] [CLS]the[SEP] [mask] [ MASK ]",
    "a" * 101 + " " + "a" * 100,
    "jump's fox-jumps 3.53 ½ µ π İi ǅ ﬁ",
    "",
    "   ",
    "\U0001f600 fox \U0001f468\u200d\U0001f469",
    "ﷺ क्षि ก็ 한국어",
    "''...!!--",
]


@pytest.fixture(scope="module")
def vocabulary():
    return WordPiece(PIECES)


def reference_words(text, lowercase):
    """Splitting into words as the BERT paper's code release describes it, written down from that description."""
    cleaned = []
    for character in text:
        category = unicodedata.category(character)
        if character in "\t\n\r " or category == "Zs":
            cleaned.append(" ")
        elif character in "\x00\ufffd" or category.startswith("C"):
            continue
        elif 0x4E00 <= ord(character) <= 0x9FFF:
            cleaned.append(f" {character} ")
        else:
            cleaned.append(character)
    words = []
    for word in "".join(cleaned).split():
        if lowercase:
            word = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        current = ""
        for character in word:
            ascii_symbol = ord(character) < 128 and not character.isalnum()
            if ascii_symbol or unicodedata.category(character).startswith("P"):
                words += [current, character]
                current = ""
            else:
                current += character
        words.append(current)
    return [word for word in words if word]


def reference_ids(text, pieces, lowercase):
    ids = []
    for word in reference_words(text, lowercase):
        start, found = 0, []
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            sizes = [size for size in range(len(word) - start, 0, -1) if prefix + word[start : start + size] in pieces]
            if not sizes:
                break
            found.append(pieces.index(prefix + word[start : start + sizes[0]]))
            start += sizes[0]
        ids += found if start == len(word) else [pieces.index("[UNK]")]
    return ids


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("text", AWKWARD)
def test_ids_are_those_of_the_definition(text, lowercase):
    assert WordPiece(PIECES, lowercase).encode([text]) == [reference_ids(text, PIECES, lowercase)]


@pytest.mark.parity
@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_are_those_of_transformers(tmp_path, lowercase):
    transformers = pytest.importorskip("transformers")
    vocabulary = WordPiece(PIECES, lowercase)
    vocabulary.save(tmp_path / "vocab.txt")
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lowercase)
    for text in AWKWARD:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert vocabulary.encode([text], specials=True) == [expected], text
        if "[" not in text:
            assert vocabulary.encode([text]) == [expected], text


def test_special_pieces_are_text_unless_asked_for(vocabulary):
    assert vocabulary.encode(["the [MASK] fox"], specials=True) == [[5, vocabulary.mask_id, 8]]
    (ids,) = vocabulary.encode(["the [MASK] fox"])
    assert [vocabulary.pieces[number] for number in ids] == ["the", "[", "mask", "]", "fox"]


def test_attributes(vocabulary, tmp_path):
    assert vocabulary.special_ids == (0, 1, 2, 3, 4)
    assert (vocabulary.pad_id, vocabulary.mask_id, vocabulary.num_tokens) == (0, 4, len(PIECES))
    expected = [piece.startswith("##") for piece in PIECES]
    assert vocabulary.continues_word.tolist() == expected
    assert vocabulary.decode([2, 5, 13, 14, 15, 4, 3]) == "[CLS] the unaffable [MASK] [SEP]"
    vocabulary.save(tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text().split("\n")[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"]
    for again in (WordPiece.load(tmp_path / "vocab.txt"), pickle.loads(pickle.dumps(vocabulary))):
        assert again.pieces == vocabulary.pieces
        assert again.fingerprint == vocabulary.fingerprint
        assert again.encode(AWKWARD) == vocabulary.encode(AWKWARD)


def test_fingerprint_tells_tokenizers_apart(vocabulary):
    others = [
        WordPiece(PIECES, lowercase=False),
        WordPiece([*PIECES, "more"]),
        WordPiece([*PIECES[:5], *reversed(PIECES[5:])]),
    ]
    assert len({vocabulary.fingerprint, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the vocabulary .*vocab.txt"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"vocab.txt lacks \[MASK\]"),
        ("", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("\n".join([*PIECES, "the"]), "'the' twice"),
        (b"[PAD]\n\xff\n", r"vocab.txt is not UTF-8 \(byte 6\)"),
    ],
)
def test_unusable_vocabulary_is_refused(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        WordPiece.load(path)


def test_windows_line_ends_are_no_part_of_a_piece(tmp_path, vocabulary):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(PIECES).encode())
    assert WordPiece.load(tmp_path / "vocab.txt").fingerprint == vocabulary.fingerprint


TEXTS = ["Low lower lowest, newer newest. Café Ünder 今日 wider!"] * 30 + ["the widest low café newer low"] * 20


def test_training_learns_the_frequent_words():
    vocabulary = wordpiece.train(TEXTS, 150)
    assert vocabulary.pieces[:5] == wordpiece.SPECIALS
    assert vocabulary.num_tokens <= 150
    assert {"low", "newer", "cafe", "今", "!"} <= set(vocabulary.pieces)
    assert not {"##!", "##今", "É", "é", "[", "##[", "Low"} & set(vocabulary.pieces)
    assert all(vocabulary.unk_id not in ids for ids in vocabulary.encode(TEXTS))
    cased = wordpiece.train(TEXTS, 150, lowercase=False)
    assert {"Low", "low", "é"} <= set(cased.pieces)


def test_training_keeps_the_frequent_characters():
    texts = ["".join(chr(code) for code in range(0x4E00, 0x4E00 + 500)), "abc abd acd " * 100, "\u4e05" * 10]
    vocabulary = wordpiece.train(texts, 100)
    single = [piece for piece in vocabulary.pieces if len(piece) == 1]
    assert len(single) == 25
    assert {"a", "b", "c", "d", "\u4e05", "\u4e00"} <= set(single)


def test_what_takes_many_characters_gets_them():
    """As Chinese does: 3000 of them, half of the text made of 500."""
    codes = [*range(0x4E00, 0x4E00 + 500)] * 6 + [*range(0x4E00, 0x4E00 + 3000)]
    vocabulary = wordpiece.train(["".join(map(chr, codes))], 20_000)
    ids = np.array(vocabulary.encode(["".join(map(chr, codes))])[0])
    assert vocabulary.num_tokens > 2990 and np.mean(ids == vocabulary.unk_id) < 0.001
    # What is rare among few characters is left out as before.
    rare = "".join(chr(code) for code in range(0x5E00, 0x5E00 + 1500))
    assert wordpiece.train(["abc abd acd " * 10**6, rare], 20_000).num_tokens < 1020


def test_training_twice_gives_the_same_vocabulary():
    """Also in another process: the trainer's hash maps have another order there."""
    script = (
        "from core_flax.text import wordpiece\nimport random\nrng = random.Random(0)\n"
        "texts = [' '.join(''.join(rng.choices('abcdefghij', k=rng.randint(2, 6))) for _ in range(20)) + ' é今!' "
        "for _ in range(100)]\nprint(wordpiece.train(texts, 300).fingerprint)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert len(runs[0]) == 65 and len(set(runs)) == 1


def test_training_breaks_long_runs():
    """Unbroken, this takes many minutes; broken, a second. What stands beside the run is learned as ever."""
    started = time.monotonic()
    vocabulary = wordpiece.train([*TEXTS, "word" * 1_000_000], 150)
    assert time.monotonic() - started < 60
    assert {"low", "newer", "cafe", "word"} <= {piece.removeprefix("##") for piece in vocabulary.pieces}


def test_words_that_can_be_encoded_are_learned_whole():
    """A hundred letters, between spaces, are one word however many such words the text has."""
    word = "abcdefghij" * 10
    assert word in wordpiece.train([f"{word} " * 100], 200).pieces


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match="--vocab-size 99 is too small"):
        wordpiece.train(TEXTS, 99)


def test_no_jax_is_imported():
    script = (
        "import sys, core_flax.text.wordpiece, core_flax.data.records, core_flax.data.feed; print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_many_texts_at_once(vocabulary):
    texts = AWKWARD * 50
    assert vocabulary.encode(texts) == [vocabulary.encode([text])[0] for text in texts]
    assert np.shape(vocabulary.encode([])) == (0,)


SLICES = [
    ("Café cafe\u0301!", True, "Café cafe\u0301 !"),
    ("Café", False, "[UNK]:Café"),
    ("the e\u0301\u0327 e\u0301e", True, "the e\u0301\u0327 e\u0301 e"),
    ("İi fox", True, "İ i fox"),
    ("\u0130\u0307a", True, "\u0130\u0307 a"),
    ("İ", True, "İ"),
    ("today 今日the今", True, "[UNK]:today 今 日 the 今"),
    ("\U0001f600 fox \u2764\ufe0f the", True, "[UNK]:\U0001f600 fox [UNK]:\u2764\ufe0f the"),
    ("\U0001f468\u200d\U0001f469 fox", True, "[UNK]:\U0001f468\u200d\U0001f469 fox"),
    ("fo\u200bx f\x00ox\ufffd over", True, "fo\u200bx f\x00ox over"),
    ("\u00a0the\u2003\t\nfox ", True, "the fox"),
    ("[MASK] [SEP]", True, "[ MASK ] [ [UNK]:SEP ]"),
    ("unaffable.", True, "un aff able ."),
    ("\u0301the", True, "the"),
    ("", True, ""),
    (" \u0301 ", True, ""),
]


@pytest.mark.parametrize(("text", "lowercase", "slices"), SLICES)
def test_pieces_are_slices_of_the_text(text, lowercase, slices):
    """Expected slices by hand; an unknown word is written ``[UNK]:word``."""
    vocabulary = WordPiece(PIECES, lowercase)
    ids, starts, ends = vocabulary.encode_with_offsets(text)
    assert ids.dtype == starts.dtype == ends.dtype == np.int32
    found = [
        ("[UNK]:" if number == vocabulary.unk_id else "") + text[start:end]
        for number, start, end in zip(ids, starts, ends, strict=True)
    ]
    assert found == (slices.split(" ") if slices else [])


def test_a_mark_with_a_piece_of_its_own_belongs_to_that():
    vocabulary = WordPiece([*PIECES, "##\u0301"], lowercase=False)
    _, starts, ends = vocabulary.encode_with_offsets("e\u0301 fox")
    assert (starts.tolist(), ends.tolist()) == ([0, 1, 3], [1, 2, 6])


def test_special_pieces_are_text_to_offsets_also_after_others_asked_for_them(vocabulary):
    vocabulary.encode(["[MASK]"], specials=True)
    ids, _, _ = vocabulary.encode_with_offsets("[MASK]")
    assert [vocabulary.pieces[number] for number in ids] == ["[", "mask", "]"]


def test_a_character_that_becomes_several_pieces():
    """A Hangul syllable is three letters once accents are stripped; each piece stands for the whole syllable."""
    letters = ["\u1112", "##\u1161", "##\u11ab", "##x"]
    vocabulary = WordPiece([*PIECES, *letters])
    ids, starts, ends = vocabulary.encode_with_offsets("the 한x")
    assert [vocabulary.pieces[number] for number in ids] == ["the", *letters]
    assert starts.tolist() == [0, 4, 4, 4, 5]
    assert ends.tolist() == [3, 5, 5, 5, 6]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("text", [*AWKWARD, *(text for text, _, _ in SLICES)])
def test_a_slice_has_the_pieces_it_was_cut_for(text, lowercase):
    """Cutting the text between two words and encoding both halves gives the pieces of the whole."""
    vocabulary = WordPiece(PIECES, lowercase)
    ids, starts, ends = vocabulary.encode_with_offsets(text)
    assert ids.tolist() == vocabulary.encode([text])[0]
    assert (np.diff(starts) >= 0).all() and (np.diff(ends) >= 0).all() and (starts < ends).all()
    for piece in range(1, len(ids)):
        if text[ends[piece - 1] : starts[piece]].isspace():
            cut = starts[piece]
            left, right = vocabulary.encode([text[: ends[piece - 1]], text[cut:]])
            assert [*left, *right] == ids.tolist()
