"""What prepare refuses, and what it leaves behind then: nothing of its own, everything of others."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from bert_flax.prepare import PrepareConfig, Terminated, prepare
from core_flax.text.wordpiece import SPECIALS, WordPiece
from core_flax.types import UserError

PHRASE = "the of river mountain people north city small great built water and in was by under lower stone"
WORDS = PHRASE.split(" ")


def make_text(num_documents=40, seed=0, sentences=(2, 12)):
    """Documents separated by blank lines, one sentence a line."""
    rng = random.Random(seed)

    def sentence():
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
        return f"{words.capitalize()} {rng.randrange(99)}."

    return "\n\n".join("\n".join(sentence() for _ in range(rng.randint(*sentences))) for _ in range(num_documents))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text())
    return path


def configure(tmp_path, *inputs, **settings):
    defaults = {"output": str(tmp_path / "out"), "vocab_size": 200, "num_workers": 1}
    return PrepareConfig(tuple(map(str, inputs)), **{**defaults, **settings})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folders_of_others_are_left_alone(tmp_path, text_file):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
            prepare(configure(tmp_path, text_file, overwrite=overwrite))
    assert contents(folder) == {"thesis.tex": b"years of work"}
    with pytest.raises(UserError, match="cannot write"):
        prepare(configure(tmp_path, text_file, output=str(text_file)))


def test_leftovers_of_an_interrupted_run_are_cleared(tmp_path, text_file):
    expected = prepare(configure(tmp_path, text_file, output=str(tmp_path / "other")))
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("train-00000.arrayrecord.partial", "train-00007-of-00008.arrayrecord", "train.index.partial"):
        (folder / name).write_text("half")
    for name in ("vocab.txt", "manifest.json.partial", "valid.unigram.npy", "prepare.lock"):
        (folder / name).write_text("half")
    assert prepare(configure(tmp_path, text_file)) == expected
    assert contents(folder) == contents(tmp_path / "other")


def test_two_at_once_are_refused(tmp_path, text_file):
    (tmp_path / "out").mkdir()
    lock = "import fcntl, sys\nlock = open(sys.argv[1], 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\nprint('locked')\n"
    command = [sys.executable, "-u", "-c", lock + "input()", str(tmp_path / "out" / "prepare.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another prepare is writing"):
            prepare(configure(tmp_path, text_file))
        other.communicate("\n")
    prepare(configure(tmp_path, text_file))


def test_few_documents(tmp_path):
    for count, message in ((1, "is 1 document;.*--documents"), (3, "3 documents are too few.*--valid-fraction 0")):
        path = tmp_path / f"{count}.txt"
        path.write_text(make_text(count))
        with pytest.raises(UserError, match=message):
            prepare(configure(tmp_path, path))
        assert not (tmp_path / "out").exists()
    assert prepare(configure(tmp_path, path, valid_fraction=0.0)).splits["train"].documents == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": ()}, "nothing to prepare"),
        ({"input": ("absent.txt",)}, "absent.txt does not exist"),
        ({"valid_fraction": 0.9}, "--valid-fraction 0.9: must be 0 or more and at most 0.5"),
        ({"valid_fraction": float("nan")}, "--valid-fraction nan: must be"),
        ({"num_workers": 0}, "--num-workers 0"),
        ({"vocab_sample_mb": 0.0}, "--vocab-sample-mb 0.0: must be more than 0"),
        ({"vocab_sample_mb": float("nan")}, "--vocab-sample-mb nan: must be more than 0"),
        ({"vocab_sample_mb": float("inf")}, "--vocab-sample-mb inf: must be more than 0"),
        ({"vocab": "absent"}, "cannot read the vocabulary absent"),
        ({"documents": "file", "document_start": "="}, "--document-start takes the place of --documents"),
        ({"input": ("python:docs",), "documents": "file"}, "apply to plain text"),
        ({"vocab_size": 50}, "--vocab-size 50 is too small"),
        ({"document_start": "("}, "not a regular expression"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, text_file, settings, message):
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(configure(tmp_path, text_file), **settings))
    assert not (tmp_path / "out").exists()


def test_vocabulary_size_and_vocabulary_may_not_contradict(tmp_path, text_file):
    WordPiece([*SPECIALS, *WORDS]).save(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="--vocab-size 77 contradicts --vocab"):
        prepare(configure(tmp_path, text_file, vocab=str(tmp_path / "vocab.txt"), vocab_size=77))


def test_bad_text_far_into_the_input_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(make_text(10))
    (tmp_path / "b.txt").write_bytes(make_text(10).encode() + b"\n\xff")
    vocabulary = WordPiece([*SPECIALS, *WORDS])
    vocabulary.save(tmp_path / "vocab.txt")
    config = configure(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt")
    for settings in ({}, {"vocab": str(tmp_path / "vocab.txt"), "vocab_size": 30522}, {"num_workers": 2}):
        with pytest.raises(UserError, match=r"b.txt:\d+ is not UTF-8"):
            prepare(dataclasses.replace(config, **settings))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "train-00000-of-00001.arrayrecord"])
def test_a_file_that_only_has_a_name_of_ours_is_left_alone(tmp_path, text_file, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("years of work")
    with pytest.raises(UserError, match=f"holds other files .{name}.; give an empty"):
        prepare(configure(tmp_path, text_file))
    assert contents(tmp_path / "out") == {name: b"years of work"}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("what", ["input", "vocab"])
def test_what_is_to_be_read_is_not_cleared(tmp_path, text_file, what, linked):
    """Also beside leftovers of ours, and where only a link to it lies elsewhere."""
    folder = tmp_path / "out"
    folder.mkdir()
    WordPiece([*SPECIALS, *WORDS, "."]).save(folder / "vocab.txt")
    (folder / "train.index.partial").write_text("half")
    (tmp_path / "link").symlink_to(folder / "vocab.txt")
    given = str(tmp_path / "link" if linked else folder / "vocab.txt")
    settings = {"input": (given,)} if what == "input" else {"vocab": given, "vocab_size": 30522}
    before = contents(folder)
    with pytest.raises(UserError, match=r"is to be read, but lies in .*out, which is emptied; give another --output"):
        prepare(dataclasses.replace(configure(tmp_path, text_file), **settings))
    assert contents(folder) == before


def test_overwrite_takes_no_files_of_others_along(tmp_path, text_file):
    config = configure(tmp_path, text_file)
    prepare(config)
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        prepare(dataclasses.replace(config, overwrite=True))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("num_workers", [1, 2])
def test_sigterm_ends_it_with_one_line_and_leaves_nothing(tmp_path, num_workers):
    (tmp_path / "text.txt").write_text("\n\n".join([make_text(2000)] * 20))
    WordPiece([*SPECIALS, *WORDS, *".0123456789"]).save(tmp_path / "vocab.txt")
    folder = tmp_path / "out"
    options = ["--input", tmp_path / "text.txt", "--output", folder, "--vocab", tmp_path / "vocab.txt"]
    command = [sys.executable, "-m", "bert_flax.cli", "prepare", *map(str, options), "--num-workers", str(num_workers)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    ) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("*.partial")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "bert-flax: terminated; nothing is left of this run\n")
    assert not folder.exists()


def test_sigterm_is_not_lost_in_a_finalizer(tmp_path, text_file, monkeypatch):
    """Python lets no exception out of one."""

    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def encode(*_):
        Last()
        time.sleep(10)
        pytest.fail("it went on")

    monkeypatch.setattr("bert_flax.prepare._encode", encode)
    with pytest.raises(Terminated, match="nothing is left"):
        prepare(configure(tmp_path, text_file))
    assert not (tmp_path / "out").exists()


def test_sigterm_is_not_lost_where_every_exception_is_caught(tmp_path, text_file, monkeypatch):
    def encode(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("a library would have gone on")

    monkeypatch.setattr("bert_flax.prepare._encode", encode)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="nothing is left"):
        prepare(configure(tmp_path, text_file))
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == before
