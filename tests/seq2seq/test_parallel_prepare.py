"""``seq2seq-flax prepare``: what arrives, what is left out and counted, and what is refused in a line."""

import dataclasses
import gzip
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pair_text import sentences, write_files

import seq2seq_flax.prepare
from core_flax.data import shards
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import UserError
from seq2seq_flax.cli import main
from seq2seq_flax.pairs import Manifest, PairStore
from seq2seq_flax.prepare import PrepareConfig, prepare


def configure(tmp_path, **settings):
    return PrepareConfig(**{"output": str(tmp_path / "out"), "vocab_size": 100, **settings})


def stored(folder, split="train"):
    """(source text, target text, direction) of every pair, with language pieces and without the ends."""
    store, tokenizer = PairStore(folder, split), SentencePiece.load(folder / "tokenizer.model")
    found = []
    for (source, target), direction in zip(store.read(np.arange(len(store))), store.direction, strict=True):
        assert source[-1] == target[-1] == tokenizer.eos_id
        tag = [language for language, number in tokenizer.languages.items() if number == source[0]]
        text = " ".join([*(f"<2{language}>" for language in tag), tokenizer.decode(source)])
        found.append((text, tokenizer.decode(target), store.manifest.directions[direction]))
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_text_arrives_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 900)
    train, valid = write_files(tmp_path), write_files(tmp_path, 9, seed=1, name="valid")
    manifest = prepare(configure(tmp_path, train=tuple(train), valid=tuple(valid)))
    out = tmp_path / "out"
    assert stored(out) == [(*pair, [None, None]) for pair in sentences(60)]
    assert stored(out, "valid") == [(*pair, [None, None]) for pair in sentences(9, seed=1)]
    assert manifest == Manifest.load(out) and len(list(out.glob("train-*"))) > 2
    tokenizer, store = SentencePiece.load(out / "tokenizer.model"), PairStore(out, "train")
    assert (manifest.fingerprint, manifest.num_tokens) == (tokenizer.fingerprint, 100)
    for side, (lines, lengths) in enumerate(
        zip(zip(*sentences(60), strict=True), (store.source_lengths, store.target_lengths), strict=True)
    ):
        expected = np.array([len(ids) + 1 for ids in tokenizer.encode(lines)])
        np.testing.assert_array_equal(lengths, expected)
        about = (manifest.splits["train"].source, manifest.splits["train"].target)[side]
        assert (about.mean, about.longest) == (round(expected.mean(), 2), expected.max())
        for share, found in ((0.5, about.median), (0.9, about.percentile_90), (0.99, about.percentile_99)):
            assert found == np.quantile(expected, share, method="inverted_cdf")
    for name, data in contents(out).items():
        if name != "manifest.json":
            assert manifest.files[name]["sha256"] == hashlib.sha256(data).hexdigest()


def test_every_form_of_input_gives_the_same_bytes(tmp_path):
    source, target = write_files(tmp_path)
    lines = [Path(path).read_text(encoding="utf-8").splitlines() for path in (source, target)]
    table = tmp_path / "both.tsv"
    table.write_text("".join(f"{a}\t{b}\n" for a, b in zip(*lines, strict=True)), encoding="utf-8")
    packed = [tmp_path / "a.gz", tmp_path / "b.gz", tmp_path / "both.tsv.gz"]
    for path, plain in zip(packed, (source, target, table), strict=True):
        path.write_bytes(gzip.compress(Path(plain).read_bytes().replace(b"\n", b"\r\n")))
    forms = [(source, target), (table,), packed[:2], packed[2:]]
    found = []
    for number, form in enumerate(forms):
        prepare(configure(tmp_path, train=tuple(map(str, form)), output=str(tmp_path / str(number))))
        found.append({n: data for n, data in contents(tmp_path / str(number)).items() if n != "manifest.json"})
    assert all(each == found[0] for each in found)


def test_several_languages_in_both_directions(tmp_path):
    pairs = (("en-ne", *write_files(tmp_path, 5)), ("en-fr", *write_files(tmp_path, 4, seed=2, name="fr")))
    manifest = prepare(configure(tmp_path, pair=pairs, both_directions=True, valid_pair=pairs[1:]))
    assert manifest.tagged and manifest.directions == [["en", "ne"], ["en", "fr"], ["ne", "en"], ["fr", "en"]]
    expected = []
    for language, texts in (("ne", sentences(5)), ("fr", sentences(4, seed=2))):
        for source, target in texts:
            expected.append((f"<2{language}> {source}", target, ["en", language]))
            expected.append((f"<2en> {target}", source, [language, "en"]))
    assert stored(tmp_path / "out") == expected and stored(tmp_path / "out", "valid") == expected[10:]
    one = prepare(configure(tmp_path, pair=pairs[:1], output=str(tmp_path / "one")))
    assert not one.tagged and stored(tmp_path / "one")[0][0] == next(sentences(5))[0]


def test_copies_are_of_training_pairs_and_ask_for_their_own_language(tmp_path):
    pairs = (("en-ne", *write_files(tmp_path, 5)),)
    manifest = prepare(configure(tmp_path, pair=pairs, copies=True, valid_pair=pairs))
    assert manifest.tagged and manifest.directions == [["en", "ne"], ["en", "en"], ["ne", "ne"]]
    expected = []
    for source, target in sentences(5):
        expected.append((f"<2ne> {source}", target, ["en", "ne"]))
        expected.append((f"<2en> {source}", source, ["en", "en"]))
        expected.append((f"<2ne> {target}", target, ["ne", "ne"]))
    assert stored(tmp_path / "out") == expected and stored(tmp_path / "out", "valid") == expected[::3]
    with pytest.raises(UserError, match="prepared already, but with another copies"):
        prepare(configure(tmp_path, pair=pairs, valid_pair=pairs))
    again = (*pairs, ("en-de", pairs[0][1], pairs[0][2]), pairs[0])  # de: what ne is, under another name
    prepare(configure(tmp_path, pair=again, copies=True, deduplicate=True, output=str(tmp_path / "again")))
    directions = [tuple(direction) for _, _, direction in stored(tmp_path / "again")]
    counts = dict.fromkeys([("en", "ne"), ("en", "en"), ("ne", "ne"), ("en", "de"), ("de", "de")], 5)
    assert Counter(directions) == counts
    longest = manifest.splits["train"].target.longest  # of a copy the longer side is a source, too, and asks as well
    short = configure(tmp_path, pair=pairs, copies=True, max_length=longest, output=str(tmp_path / "short"))
    assert prepare(short).splits["train"].dropped[f"longer than {longest} tokens"] % 3 == 0


def test_filters_count_what_they_leave_out(tmp_path):
    same, long, uneven = ("the river", "eht revir"), ("a " * 40, "b"), ("the river " * 4, "eht")
    rows = [same, same, ("the river", "another"), ("", "eht"), long, uneven]
    files = [tmp_path / "a", tmp_path / "b"]
    for path, lines in zip(files, zip(*rows, strict=True), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines))
    tokenizer = tmp_path / "made" / "tokenizer.model"
    prepare(configure(tmp_path, train=tuple(write_files(tmp_path)), output=str(tokenizer.parent)))
    both = {side: tuple(map(str, files)) for side in ("train", "valid")}
    filters = {"max_length": 30, "max_ratio": 3.0, "deduplicate": True, "empty": "drop", "tokenizer": str(tokenizer)}
    manifest = prepare(configure(tmp_path, **both, **filters))
    assert manifest.splits["train"].dropped == {
        "seen before": 1,
        "empty": 1,
        "longer than 30 tokens": 1,
        "lengths more than 3 : 1": 1,
    }
    assert [pair[0] for pair in stored(tmp_path / "out")] == ["the river", "the river"]
    assert manifest.splits["valid"].dropped == {"empty": 1, "longer than 30 tokens": 1}
    assert manifest.fingerprint == SentencePiece.load(tokenizer).fingerprint


def test_the_piece_that_asks_for_a_language_counts_where_it_stands(tmp_path):
    """It begins sources: a target may have its place, unless it is a source as well."""
    source, target = write_files(tmp_path)
    prepare(configure(tmp_path, train=(source, target), output=str(tmp_path / "made")))
    tokenizer = SentencePiece.load(tmp_path / "made" / "tokenizer.model")
    longest = max(len(tokenizer.encode([pair[1]])[0]) for pair in sentences(60)) + 1
    short = tmp_path / "short"
    short.write_text("the\n" * 60)
    pairs = tuple((direction, str(short), target) for direction in ("en-de", "en-fr"))
    settings = {"pair": pairs, "tokenizer": str(tmp_path / "made" / "tokenizer.model"), "max_length": longest}
    one = prepare(configure(tmp_path, **settings, output=str(tmp_path / "one")))
    both = prepare(configure(tmp_path, **settings, output=str(tmp_path / "both"), both_directions=True))
    assert one.splits["train"].dropped == {} and one.splits["train"].target.longest == longest
    assert f"longer than {longest} tokens" in both.splits["train"].dropped


def test_the_same_words_in_another_language_were_not_seen_before(tmp_path):
    """Names and numbers, which are to be learned in every language."""
    files = write_files(tmp_path)
    pairs = tuple((direction, *files) for direction in ("en-de", "en-fr", "en-de"))
    manifest = prepare(configure(tmp_path, pair=pairs, deduplicate=True))
    assert manifest.splits["train"].pairs == 120 and manifest.splits["train"].dropped == {"seen before": 60}
    assert [direction for _, _, direction in stored(tmp_path / "out")] == [["en", "de"]] * 60 + [["en", "fr"]] * 60


def test_a_pair_the_other_way_round_was_seen_before_where_both_are_used(tmp_path):
    source, target = write_files(tmp_path)
    pairs = (("en-de", source, target), ("de-en", target, source))
    manifest = prepare(configure(tmp_path, pair=pairs, deduplicate=True, both_directions=True))
    assert manifest.splits["train"].pairs == 120 and manifest.splits["train"].dropped == {"seen before": 120}


def test_run_again_does_nothing_and_other_settings_are_refused(tmp_path, monkeypatch):
    config = configure(tmp_path, train=tuple(write_files(tmp_path)))
    manifest, before = prepare(config), contents(tmp_path / "out")
    monkeypatch.setattr(seq2seq_flax.prepare, "_encode", None)
    assert prepare(config) == manifest and contents(tmp_path / "out") == before
    monkeypatch.undo()
    other = dataclasses.replace(config, max_length=20)
    with pytest.raises(UserError, match="prepared already, but with another max_length"):
        prepare(other)
    bad = dataclasses.replace(other, max_length=4, overwrite=True)
    with pytest.raises(UserError, match="no pair of the train input is left"):
        prepare(bad)
    assert contents(tmp_path / "out") == before  # bad input lost nothing
    prepare(dataclasses.replace(other, overwrite=True))
    assert PairStore(tmp_path / "out", "train").target_lengths.max() <= 20


def test_an_interrupted_run_leaves_nothing_that_reads_as_complete(tmp_path):
    """Killed while it encodes; then the same command gives what it would have given at once."""
    files = write_files(tmp_path, 3000)
    script = (
        "import os, sys, seq2seq_flax.pairs as pairs; from seq2seq_flax.cli import main\n"
        "write, left = pairs.PairWriter.write, [1500]\n"
        "def die(self, *pair):\n"
        "    left[0] -= 1\n"
        "    os._exit(9) if left[0] == 0 else write(self, *pair)\n"
        "pairs.PairWriter.write = die; main(sys.argv[1:])"
    )
    arguments = ["prepare", "--train", *files, "--vocab-size", "100", "--output"]
    done = subprocess.run([sys.executable, "-c", script, *arguments, str(tmp_path / "out")], capture_output=True)
    assert done.returncode == 9, done.stderr
    assert (tmp_path / "out" / "train.index.partial").exists()
    with pytest.raises(UserError, match="is not complete"):
        PairStore(tmp_path / "out", "train")
    for name in ("out", "whole"):
        prepare(configure(tmp_path, train=tuple(files), output=str(tmp_path / name)))
    again, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert again == whole


@pytest.fixture
def call(capsys):
    def call(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(each) for each in argv])
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_command_prints_what_there_is(tmp_path, call):
    source, target = write_files(tmp_path)
    code, out, _ = call(
        "prepare", "--pair", "en-ne", source, target, "--pair", "ne-en", target, source,
        "--valid-pair", "en-ne", source, target, "--output", tmp_path / "out",
        "--vocab-size", 50, "--model", "unigram", "--max-ratio", 1.2,
    )  # fmt: skip
    assert code == 0 and "vocabulary of 52 pieces, asking for ne, en" in out
    assert "left out:" in out and "lengths more than 1.2 : 1" in out and "valid: 60 pairs" in out
    code, out, _ = call(
        "prepare", "--pair", "en-ne", source, target, "--valid-pair", "en-ne", source, target, "--copies",
        "--output", tmp_path / "copies", "--vocab-size", 50,
    )  # fmt: skip
    assert code == 0 and "train: 180 pairs\n    60 en -> ne, 60 en -> en, 60 ne -> ne\n" in out
    assert "valid: 60 pairs\n    60 en -> ne\n" in out


LATIN1 = "Straße\n".encode("latin-1")


@pytest.mark.parametrize(
    ("files", "arguments", "says"),
    [
        ({"a": b"x\ny\nz\n", "b": b"x\n"}, ["--train", "a", "b"], r"a has 3 lines and .*b has 1: line by line"),
        ({"a": b"x\n", "b": b"x\ny\n"}, ["--train", "a", "b"], r"a has 1 lines and .*b has 2: line by line"),
        ({"a": b"x\n\nz\n", "b": b"x\ny\nz\n"}, ["--train", "a", "b"], r"a:2: the source of the pair is empty; .*drop"),
        ({"a": b"x\ny\n", "b": b"x\n \n"}, ["--train", "a", "b"], r"a:2: the target of the pair is empty; .*drop"),
        ({"a": b"x\n" + LATIN1, "b": b"x\ny\n"}, ["--train", "a", "b"], r"a:2 is not UTF-8: byte 0xdf at position 5"),
        ({"a": b"", "b": b""}, ["--train", "a", "b"], r"b: no pairs, not a line"),
        ({"a": b"x\n"}, ["--train", "a", "nowhere"], r"input .*nowhere does not exist"),
        ({"a": b"x\n"}, ["--train", "a"], r"pairs come from two files \(SRC TGT\), from one table"),
        ({"a.tsv": b"x\ty\nx\n"}, ["--train", "a.tsv"], r"a.tsv:2 has 1 column; a row is a sentence, a tab"),
        ({"a.tsv": b"x\ty\nx\ty\tz\n"}, ["--train", "a.tsv"], r"a.tsv:2 has 3 columns"),
        ({"a.tsv": b"x\ty\n", "b": b""}, ["--train", "a.tsv", "b"], r"a.tsv has both sides .*give it alone"),
        ({"a.gz": b"no gzip", "b": b"x\n"}, ["--train", "a.gz", "b"], r"a.gz is not a whole gzip file"),
        ({"a": b"x\n", "b": b"y\n"}, ["--pair", "ende", "a", "b"], r"--pair ende: write SOURCE-TARGET"),
        ({}, ["--pair", "en-pt-BR", "a", "b"], r"--pair en-pt-BR: write SOURCE-TARGET .* such as en-de or en-pt_BR"),
        ({}, ["--pair", "en-de"], r"no files given: pairs come from two files"),
        ({}, ["--pair"], r"--pair : write SOURCE-TARGET with the two languages"),
        ({}, ["--pair", "a-d<", "a", "b", "--pair", "a-c", "a", "b"], r"'d<' is no language name"),
        ({"a": b"x\n", "b": b"y\n"}, ["--train", "a", "b", "--both-directions"], r"which languages .* give --pair"),
        ({"a": b"x\n", "b": b"y\n"}, ["--train", "a", "b", "--copies"], r"which languages .* give --pair"),
        ({"a": b"x\n", "b": b"y\n"}, ["--train", "a", "b", "--pair", "a-b", "a", "b"], r"--train or --pair, not both"),
        (
            {"a": b"x\n", "b": b"y\n"},
            ["--pair", "en-de", "a", "b", "--valid-pair", "en-fr", "a", "b"],
            r"no training pair has the target language fr",
        ),
        ({"a": b"x\n", "b": b"y\n"}, [], r"nothing to prepare; give --train SRC TGT"),
        ({"a": b"x\n", "b": b"y\n"}, ["--train", "a", "b"], r"--vocab-size 50 cannot be had"),
        (
            {"a": b"x\n", "b": b"y\n"},
            ["--train", "a", "b", "--max-ratio", "0.5"],
            r"--max-ratio 0.5: must be 1",
        ),
        ({"a": b"x\n", "b": b"y\n"}, ["--train", "a", "b", "--tokenizer", "a"], r"a is no SentencePiece model"),
        (
            {"a": b"x\n", "b": b"y\n"},
            ["--train", "a", "b", "--tokenizer", "a", "--model", "unigram"],
            r"--model is for a vocabulary that is trained: it does not go with --tokenizer",
        ),
        (
            {"a": b"x\n", "b": b"y\n"},
            ["--train", "a", "b", "--tokenizer", "a", "--model", "bpe"],  # and be it what holds anyway
            r"--model is for a vocabulary that is trained: it does not go with --tokenizer",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, call, files, arguments, says):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / each) if each in files or each == "nowhere" else each for each in arguments]
    code, _, err = call("prepare", *paths, "--output", tmp_path / "out", "--vocab-size", 50)
    assert code == 2 and err.count("\n") == 1, err
    assert re.search(says, err), err
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("what", ["train", "tokenizer"])
def test_what_is_to_be_read_is_not_cleared(tmp_path, what):
    """Not even beside leftovers of ours, under a name of ours."""
    out, files = tmp_path / "out", write_files(tmp_path)
    prepare(configure(tmp_path, train=tuple(files), output=str(tmp_path / "other")))
    out.mkdir()
    (out / "train.index.partial").write_text("half")
    (out / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    given = str(out / "tokenizer.model")
    before = contents(out)
    settings = {"train": (given, given)} if what == "train" else {"train": tuple(files), "tokenizer": given}
    with pytest.raises(UserError, match=r"tokenizer.model is to be read, but lies in .*out, which is emptied"):
        prepare(configure(tmp_path, **settings))
    assert contents(out) == before


def test_a_failed_run_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("x\n" * 40 + "\n")
    files = write_files(tmp_path, 41)
    prepare(configure(tmp_path, train=tuple(files), output=str(tmp_path / "other"), vocab_size=60))
    tokenizer = str(tmp_path / "other" / "tokenizer.model")  # so it is found when pairs are written
    with pytest.raises(UserError, match="a:41: the source of the pair is empty"):
        prepare(configure(tmp_path, train=(str(tmp_path / "a"), files[1]), vocab_size=60, tokenizer=tokenizer))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("output", "says"), [("", "--output is empty"), ("gs://here/data", "only local folders")])
def test_outputs_that_are_no_folder(tmp_path, output, says):
    with pytest.raises(UserError, match=says):
        prepare(configure(tmp_path, train=tuple(write_files(tmp_path)), output=output))


def test_a_damaged_or_foreign_folder(tmp_path):
    files = write_files(tmp_path)
    config = configure(tmp_path, train=tuple(files))
    prepare(config)
    shard = next((tmp_path / "out").glob("train-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=r"arrayrecord has \d+ bytes instead of \d+; run prepare again"):
        prepare(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        prepare(dataclasses.replace(config, output=str(tmp_path / "mine")))
    (tmp_path / "out" / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"holds data of kind None, not 'seq2seq_flax\.pairs'"):
        PairStore(tmp_path / "out", "train")


def test_what_the_vocabulary_cannot_spell_is_counted(call, tmp_path):
    code, out, err = call(
        "prepare", "--output", tmp_path / "one", "--vocab-size", 100, "--train", *write_files(tmp_path)
    )
    assert code == 0 and "<unk>" not in out + err
    files = [tmp_path / "a", tmp_path / "b"]
    for path, lines in zip(files, (["the river", "a road"], ["eht Ω revir", "Ω Ω"]), strict=True):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    tokenizer = tmp_path / "one" / "tokenizer.model"
    code, out, err = call("prepare", "--output", tmp_path / "two", "--tokenizer", tokenizer, "--train", *files)
    info = Manifest.load(tmp_path / "two").splits["train"]
    assert code == 0 and (info.source_unknown, info.target_unknown) == (0, 3), err
    assert out.count("<unk>") == 1 and f"      3 of them ({3 / info.target_tokens:.2%}) are <unk>" in out
