"""Preparing text for language models: nothing is lost, every split and count as published readers have them."""

import dataclasses
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from core_flax.data import folder
from core_flax.types import UserError
from lm_flax.data import SPLITS, Manifest, TokenStore, load_tokenizer
from lm_flax.figures import share_unknown
from lm_flax.prepare import PrepareConfig, prepare

TEXT = "\n  First line,  two spaces.\n\n\nÄ second — “one”.\n \nlast without an end"


def made(tmp_path, text=TEXT, name="data", **settings):
    source = tmp_path / f"{name}.txt"
    source.write_text(text, encoding="utf-8")
    settings = {"tokenizer": "char", "valid_fraction": 0.0} | settings
    home = tmp_path / name
    return home, prepare(PrepareConfig((str(source),), str(home), **settings))


def stores(home):
    return [TokenStore(home, split) for split in SPLITS]


def written(size, seed=0):
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(200)]
    return "\n".join(" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(size))


def test_documents_end_as_the_model_of_the_tokenizer_has_it(tmp_path):
    """Which only config.json beside the tokenizer says."""
    home, manifest = made(tmp_path, tokenizer="bpe", vocab_size=300)
    assert manifest.end_id is None
    own, end = load_tokenizer(home, manifest).end_id, 65
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "tokenizer.json").write_bytes((home / "tokenizer.json").read_bytes())
    (theirs / "config.json").write_text(json.dumps({"eos_token_id": [end, own]}))
    again, manifest = made(tmp_path, name="again", tokenizer=str(theirs))
    assert manifest.end_id == end == load_tokenizer(again, manifest).end_id
    assert TokenStore(again, "train").tokens_T[-1] == end and TokenStore(home, "train").tokens_T[-1] == own
    # And of what was prepared with it, another folder learns it.
    assert made(tmp_path, name="third", tokenizer=str(again))[1].end_id == end


def test_what_stands_for_nothing_is_counted(tmp_path):
    home, manifest = made(tmp_path, "a b c d e f g h i\n" * 10, tokenizer="word", vocab_size=8)
    share = share_unknown(TokenStore(home, "train"), load_tokenizer(home, manifest))
    assert share == pytest.approx(3 / 10)


@pytest.mark.parametrize("kind", ["char", "bpe", "sentencepiece"])
def test_what_is_prepared_is_the_text(tmp_path, kind):
    """Blank lines, indented and trailing ones included; SentencePiece makes one space of several, and of odd quotes."""
    text = TEXT if kind == "char" else written(300).replace("\n\n", "\n") + "\n" + ("" if kind != "bpe" else TEXT)
    sizes = {"char": None, "bpe": 300, "sentencepiece": 80}
    home, manifest = made(tmp_path, text, tokenizer=kind, vocab_size=sizes[kind])
    train, _ = stores(home)
    assert load_tokenizer(home, manifest).decode(train.tokens_T) == text
    info = train.info
    assert (info.characters, info.bytes, info.tokens) == (len(text), len(text.encode()), len(train.tokens_T))
    np.testing.assert_array_equal(train.counts_V, np.bincount(train.tokens_T, minlength=manifest.num_tokens))


def test_characters_and_the_split_are_nanogpts(tmp_path):
    """Ids in the order of code points over all of the text, the last tenth of the characters held out."""
    home, manifest = made(tmp_path, TEXT * 7, valid_fraction=0.1)
    characters = sorted(set(TEXT))
    ids = np.array([characters.index(each) for each in TEXT * 7])
    cut = int(len(ids) * 0.9)
    train, valid = stores(home)
    np.testing.assert_array_equal(train.tokens_T, ids[:cut])
    np.testing.assert_array_equal(valid.tokens_T, ids[cut:])
    assert manifest.num_tokens == len(characters)


def test_words_are_mikolovs(tmp_path):
    """Words between white space, <eos> for every line, of frequency's order, what is held out may be unknown."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(" b new a\n", encoding="utf-8")
    home, manifest = made(tmp_path, " a b a <unk>\n\n c a\n", tokenizer="word", valid=(str(held_out),))
    words = load_tokenizer(home, manifest)
    train, valid = stores(home)
    assert words.decode(train.tokens_T) == "a b a <unk>\n\nc a\n"
    assert train.info.words == train.info.tokens == 9
    known = ["<eos>", "a", "<unk>", "b", "c"]  # equally frequent ones by the alphabet
    assert [known[number] for number in train.tokens_T] == ["a", "b", "a", "<unk>", "<eos>", "<eos>", "c", "a", "<eos>"]
    assert [known[number] for number in valid.tokens_T] == ["b", "<unk>", "a", "<eos>"]
    home, manifest = made(tmp_path, "a a a b b c\n" * 9, name="few", tokenizer="word", vocab_size=8)
    assert manifest.num_tokens == 5
    with pytest.raises(UserError, match="vocab-size 3"):
        made(tmp_path, name="none", tokenizer="word", vocab_size=3)


def test_documents_end_with_their_token(tmp_path):
    home, manifest = made(tmp_path, "aa\n\nbab\n\n\nb", documents="blank-line")
    train, _ = stores(home)
    tokenizer = load_tokenizer(home, manifest)
    assert tokenizer.end_id == 3 and [*train.ends] == [4, 9, 11]
    assert [*np.flatnonzero(train.tokens_T == 3)] == [3, 8, 10]
    assert tokenizer.decode(train.tokens_T) == "aa\nbab\nb"


def test_whole_documents_are_held_out(tmp_path):
    texts = [f"document {number} " + "x" * (number % 5) for number in range(60)]
    home, _ = made(tmp_path, "\n\n".join(texts), documents="blank-line", held_out="documents", valid_fraction=0.2)
    train, valid = stores(home)
    assert train.info.documents + valid.info.documents == 60
    assert valid.info.tokens / (train.info.tokens + valid.info.tokens) == pytest.approx(0.2, abs=0.02)
    with pytest.raises(UserError, match="one document"):
        made(tmp_path, TEXT, name="one", held_out="documents", valid_fraction=0.1)


def test_workers_and_a_text_in_parts_change_nothing(tmp_path, monkeypatch):
    """Byte pairs of a document that is read in parts, blank lines at the cuts, are those of the whole."""
    text = (written(400).replace("\n", "\n\n") + "\n") * 40
    monkeypatch.setattr("core_flax.data.corpora._PART_BYTES", 1 << 30)
    whole, manifest = made(tmp_path, text, tokenizer="bpe", vocab_size=300, num_workers=1)
    monkeypatch.setattr("core_flax.data.corpora._PART_BYTES", 1 << 14)
    monkeypatch.setattr("lm_flax.prepare._BLOCK_CHARACTERS", 1 << 16)
    given = str(whole / "tokenizer.json")
    parts, _ = made(tmp_path, text, name="parts", tokenizer=given, num_workers=1)
    spread, _ = made(tmp_path, text, name="spread", tokenizer=given, num_workers=2)
    for home in (parts, spread):
        assert (home / "train.tokens").read_bytes() == (whole / "train.tokens").read_bytes()
        assert Manifest.load(home).content == manifest.content


def test_other_sources(tmp_path):
    """JSON lines, gzipped or not: a record is a document."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one\n\nand", "two"))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    names = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz"))
    manifest = prepare(PrepareConfig(names, str(tmp_path / "out"), tokenizer="char", valid_fraction=0.0))
    train = TokenStore(tmp_path / "out", "train")
    assert train.info.documents == 4
    assert load_tokenizer(tmp_path / "out", manifest).decode(train.tokens_T) == "one\n\nandtwo" * 2


def test_prepared_again(tmp_path):
    """The same asks for nothing; what would be another folder is refused, or with overwrite takes its place."""
    home, manifest = made(tmp_path)
    source, before = str(tmp_path / "data.txt"), {path: path.stat().st_mtime_ns for path in home.iterdir()}
    same = PrepareConfig((source,), str(home), tokenizer="char", valid_fraction=0.0)
    assert prepare(same) == manifest
    assert {path: path.stat().st_mtime_ns for path in home.iterdir()} == before
    other = PrepareConfig((source,), str(home), tokenizer="word", valid_fraction=0.0)
    with pytest.raises(UserError, match="prepared already, but with another tokenizer"):
        prepare(other)
    assert prepare(dataclasses.replace(other, overwrite=True)).num_tokens < manifest.num_tokens


def test_an_interrupted_run_is_not_complete(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path)
    with pytest.raises(UserError, match="data is missing"):
        TokenStore(tmp_path / "data", "train")
    monkeypatch.undo()
    assert made(tmp_path)[1].splits["train"].tokens == len(TEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "nothing.json"}, "--tokenizer nothing.json is no file"),
        ({"vocab_size": 100}, "--vocab-size does not apply to --tokenizer char"),
        ({"tokenizer": "bpe", "vocab_size": 5000}, "--vocab-size 5000 cannot be had"),
        ({"tokenizer": "sentencepiece", "vocab_size": 5000}, "--vocab-size 5000 cannot be had"),
        ({"documents": "blank-line", "document_start": "x"}, "takes the place of --documents"),
        ({"valid_fraction": 0.9}, "--valid-fraction 0.9"),
        ({"valid": ("x",), "valid_fraction": 0.2}, "not with --valid"),
        ({"valid": ("x",), "valid_fraction": 0.1, "held_out": "documents"}, "not with --valid"),
        ({"vocab_sample_mb": 5.0}, "--vocab-sample-mb is for --tokenizer bpe and sentencepiece"),
    ],
    ids=str,
)
def test_refusals(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        made(tmp_path, **settings)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_an_empty_text_and_a_damaged_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        made(tmp_path, "\n \n")
    home, _ = made(tmp_path, name="whole")
    tokens = home / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.tokens has \d+ bytes instead of"):
        TokenStore(home, "train")
    before = tokens.read_bytes()
    for settings in ({"tokenizer": str(home / "tokenizer.json")}, {"tokenizer": str(home)}, {"valid": (str(tokens),)}):
        with pytest.raises(UserError, match=r"is to be read, but lies in .*whole, which is emptied"):
            made(tmp_path, name="whole", overwrite=True, **settings)
    assert tokens.read_bytes() == before
    other = Path(home / "tokenizer.json")
    other.write_text(other.read_text().replace("F", "G"))
    with pytest.raises(UserError, match="not the tokenizer"):
        load_tokenizer(home, Manifest.load(home))
