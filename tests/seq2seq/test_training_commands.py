"""``seq2seq-flax train`` and ``evaluate`` as a user runs them: what they print, what a kill leaves, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import HURRY
from pair_text import write_files

from core_flax.beam import BeamSearch
from core_flax.checkpoint import list_steps
from core_flax.config import MeshConfig
from core_flax.sharding import make_mesh, replicated
from core_flax.types import UserError
from seq2seq_flax import numbers
from seq2seq_flax.architectures import make_model
from seq2seq_flax.batches import PairBatches
from seq2seq_flax.cli import main
from seq2seq_flax.decode import room_for, translate
from seq2seq_flax.evaluate import score
from seq2seq_flax.runs import load_run, open_data

TINY = {
    "model.num-layers": 1,
    "model.width": 16,
    "model.num-heads": 2,
    "model.mlp-width": 32,
    "inputs.row-length": 96,
    "schedule.warmup-steps": 2,
    "train.num-steps": 6,
    "train.batch-size": 4,
    "train.eval-every-steps": 0,
    "checkpoint.every-steps": 1,
    "checkpoint.keep-last": 9,
    "log.every-steps": 1,
}
TIMED = {"time", "sequences_per_second", "tokens_per_second", "data_wait"}


def arguments(workdir, data, preset="transformer_tiny", **changes):
    """``changes`` to the tiny run's options are ``train__num_steps=8``; None leaves one out."""
    options = {"workdir": workdir, "data": data} | TINY
    options |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return ["train", preset, *(f"--{name}={value}" for name, value in options.items() if value is not None)]


@pytest.fixture
def call(capsys):
    """Runs a command in this process, on four devices and with warnings as errors, to its end."""

    def call(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in argv])
        return subprocess.CompletedProcess(argv, stop.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def refuse(call):
    """Runs a command that must be refused; returns its one line."""

    def refuse(*argv):
        done = call(*argv)
        assert done.returncode == 2, done
        assert done.stderr.startswith("seq2seq-flax: error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    return refuse


def run_main(*argv):
    """To its end, and well."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Folder of train.en, train.ne, valid.en and valid.ne."""
    folder = tmp_path_factory.mktemp("text")
    write_files(folder, 60)
    write_files(folder, 20, seed=1, name="valid")
    return folder


@pytest.fixture(scope="module")
def data(text):
    """Prepared pairs of two directions."""
    pairs = {split: [text / f"{split}.{side}" for side in ("en", "ne")] for split in ("train", "valid")}
    pairs = "--pair", "en-ne", *pairs["train"], "--valid-pair", "en-ne", *pairs["valid"], "--both-directions"
    run_main("prepare", *pairs, "--output", text / "d", "--vocab-size=80")
    return text / "d"


@pytest.fixture(scope="module")
def other_data(text):
    """Prepared pairs of one direction, with a vocabulary of their own."""
    run_main("prepare", "--train", text / "train.en", text / "train.ne", "--output", text / "o", "--vocab-size=70")
    return text / "o"


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A workdir in which six steps were taken. For reading: copy it to change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run_main(*arguments(workdir, data))
    return workdir


# Training


def curve(workdir):
    """What metrics.jsonl says of each step, without times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    return [{name: x for name, x in json.loads(line).items() if name not in TIMED} for line in lines]


def test_a_killed_run_ends_where_it_would_have_ended(data, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "NPROC"} | {"XLA_FLAGS": HURRY}

    def start(workdir):
        command = [
            sys.executable,
            "-m",
            "seq2seq_flax.cli",
            *arguments(workdir, data, train__num_steps=20, checkpoint__every_steps=3),
        ]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with start(tmp_path / "whole") as process:
        whole = process.communicate(timeout=120)
    assert (process.returncode, whole[1]) == (0, ""), whole
    with start(tmp_path / "killed") as process:
        while not list_steps(tmp_path / "killed" / "checkpoints"):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with start(tmp_path / "killed") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumes at step" in out, (out, err)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 21


def test_another_architecture_trains_and_is_told_apart(call, refuse, data, finished, tmp_path):
    sizes = {"model__width": 16, "model__num_heads": None, "model__mlp_width": None}
    sizes |= {"train__num_steps": 2, "schedule__warmup_steps": 1}
    command = arguments(tmp_path / "run", data, "lstm_attention_small", **sizes)
    done = call(*command)
    assert done.returncode == 0 and "step 2 held_out: " in done.stdout, done
    assert "nothing to train: step 2 of 2 was reached before" in call(*command).stdout
    line = refuse(*arguments(finished, data, "lstm_attention_small", **sizes))
    assert f"{finished} holds a run of seq2seq_flax.transformer, not of seq2seq_flax.lstm_attention;" in line


def test_presets_are_listed_with_their_sizes(call):
    done = call("presets")
    assert done.returncode == 0
    sizes = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in done.stdout.splitlines()[1:]}
    # Vaswani et al. 2017, table 3: 65 and 213 million with a vocabulary of about 37,000.
    assert 62e6 < sizes["transformer_base"] < 66e6 and 208e6 < sizes["transformer_big"] < 215e6
    assert sizes["lstm_attention"] == 182_032_000


def test_number_words_are_learned_from_nothing(call, monkeypatch, tmp_path):
    monkeypatch.setattr(numbers, "_NUM_TRAINED", 60)
    monkeypatch.setattr(numbers, "_NUM_HELD_OUT", 8)
    command = [
        word
        for word in arguments(tmp_path, None, train__num_steps=2, schedule__warmup_steps=1)
        if word != "transformer_tiny"
    ]
    done = call(*command)
    assert done.returncode == 0, done
    assert "exact match, beam 4: 0.0% of 8 numbers" in done.stdout and done.stdout.count("->") == 5
    trained, held_out = ((tmp_path / f"numbers.{split}.de").read_text().split() for split in ("train", "held_out"))
    assert len(trained) == 160 and len(held_out) == 8 and not set(trained) & set(held_out)
    assert {"einundzwanzig", "zwölf"} <= set(trained)
    run, tokenizer = load_run(tmp_path)
    pairs = PairBatches(open_data(run.data)[0], run.config.inputs, run.config.train.batch_size, tokenizer.bos_id)
    padding = pairs.share_of_padding(run.config.seed, pairs.steps_per_epoch)
    rows = f"steps of {pairs.num_rows} rows of {pairs.capacity[0]} + {pairs.capacity[1]} tokens"
    assert f"{rows}, {padding:.0%} of them padding\n" in done.stdout
    again = call("evaluate", "--workdir", tmp_path)
    assert again.returncode == 0 and "of 8 numbers" in again.stdout and "held out, step 2: loss" in again.stdout


# Scores


def test_bleu_by_hand():
    """Six words of which five are right: precisions 5/6, 3/5, 2/4 and 1/3."""
    hypothesis, reference = ["The cat sat on a mat"], ["the cat sat on the mat"]
    lower = score(hypothesis, reference, "none", lowercase=True)
    assert lower.bleu == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert lower.bleu_signature.startswith("nrefs:1|case:lc|eff:no|tok:none|smooth:exp|version:")
    cased = score(hypothesis, reference)
    assert cased.bleu == pytest.approx(100 * (4 / 6 * 2 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25)  # no four: half a match
    assert "case:mixed" in cased.bleu_signature and "tok:13a" in cased.bleu_signature
    short = score(["the cat sat on"], reference, "none")
    assert short.bleu == pytest.approx(100 * np.exp(1 - 6 / 4)) and short.reference_length == 6


def test_evaluate_scores_what_it_writes(call, text, finished, tmp_path):
    files = "--reference", text / "valid.ne", "--tokenize", "none", "--lowercase"
    model = "evaluate", "--workdir", finished, "--input", text / "valid.en", "--output", tmp_path / "out"
    done = call(*model, *files, "--target-lang", "ne", "--beam-size", 2)
    assert done.returncode == 0, done
    assert done.stdout.startswith("held out, step 6: loss ")
    assert "signature nrefs:1|case:lc|eff:no|tok:none" in done.stdout and "\nchrF2 = " in done.stdout
    reference = (text / "valid.ne").read_text()
    assert f"reference length {len(reference.split())}," in done.stdout
    assert (tmp_path / "out").read_text().count("\n") == 20
    again = call("evaluate", "--hypotheses", tmp_path / "out", *files)
    assert again.stdout and done.stdout.endswith(again.stdout)
    perfect = call("evaluate", "--hypotheses", text / "valid.ne", *files)
    assert perfect.stdout.startswith("BLEU = 100.00 ") and "chrF2 = 100.00" in perfect.stdout


def test_evaluate_reads_all_that_is_held_out(call, finished, tmp_path):
    """However little of it training looked at."""
    expected, run = call("evaluate", "--workdir", finished).stdout, shutil.copytree(finished, tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["train"]["eval_batches"] = 1
    (run / "config.json").write_text(json.dumps(stored))
    assert call("evaluate", "--workdir", run).stdout == expected and "held out, step 6: loss" in expected


def test_evaluate_without_the_data_says_so(call, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    stored = json.loads((run / "config.json").read_text()) | {"data": str(tmp_path / "gone")}
    (run / "config.json").write_text(json.dumps(stored))
    done = call("evaluate", "--workdir", run)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert f"held-out loss not measured: data folder {tmp_path / 'gone'} is not there" in done.stdout


@pytest.mark.parametrize("num_devices", [4, 1])
def test_a_translation_depends_on_no_other_and_no_order(finished, num_devices):
    """However many sentences go together, in whatever order: the same translations, each beside its source."""
    run, tokenizer = load_run(finished)
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])  # on one, sentences change places
    params = run.params(None, replicated(mesh))[0]
    sentences = ["river song", "the old garden window market letter winter" * 2, "dog", "teacher road 17 doctor"] * 3
    sources = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode(sentences)]
    assert len({room_for(len(source)) for source in sources}) > 1

    def found(sources, batch_size):
        ends = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        search, told = BeamSearch(beam_size=2, n_best=2), []
        model = make_model(run.config.model)
        best = translate(
            model, params, sources, **ends, search=search, mesh=mesh, batch_size=batch_size, done=told.append
        )
        assert sum(told) == len(sources)
        return [[each.tokens for each in several] for several in best], [several[0].score for several in best]

    tokens, scores = found(sources, 64)
    assert all(len(several) == 2 for several in tokens) and len({several[0] for several in tokens}) > 1
    order = np.random.default_rng(0).permutation(12)
    again, their_scores = found([sources[number] for number in order], 4)
    assert again == [tokens[number] for number in order]
    np.testing.assert_allclose(their_scores, [scores[number] for number in order], rtol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "other does not exist"),
        (b"", "other has 0:"),
        (b"one\n" * 19, "has 19: line by line one must be the translation of the other"),
        (b"one\n" * 3 + b"\n" + b"one\n" * 16, "other:4: the line is empty"),
        (b"caf\xe9\n" * 20, "other:1 is not UTF-8"),
    ],
    ids=["missing", "empty", "shorter", "an empty line", "latin-1"],
)
def test_references_that_cannot_be(refuse, text, finished, tmp_path, content, message):
    if content is not None:
        (tmp_path / "other").write_bytes(content)
    reference = "--reference", tmp_path / "other"
    assert message in refuse("evaluate", "--workdir", finished, "--input", text / "valid.en", *reference)
    assert message in refuse("evaluate", "--hypotheses", text / "valid.en", *reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --workdir, to score a model, or --hypotheses, to score a file"),
        (("--workdir", "run", "--hypotheses", "file"), "one of them"),
        (("--workdir", "run", "--input", "file"), "--reference must be given"),
        (("--workdir", "run", "--reference", "file"), "--input must be given"),
        (("--hypotheses", "file"), "--reference must be given"),
        (("--hypotheses", "a", "--reference", "b", "--target-lang", "de"), "--target-lang is about a model"),
        (("--workdir", "run", "--beam-size", "0"), "--beam-size 0: must be 1 or more"),
        (("--workdir", "run", "--length-penalty", "nan"), "--length-penalty nan: must be -10 or more"),
        (("--workdir", "nowhere"), "nowhere is no folder"),
        (("--workdir", "run", "--tokenize", "words"), "words"),
        (("--workdir", "run", "--output", "file"), "--output is about translations: it goes with --input and"),
        (("--workdir", "run", "--lowercase"), "--lowercase is about translations"),
        (("--hypotheses", "a", "--reference", "b", "--step", "0"), "--step is about a model"),
        (("--hypotheses", "a", "--reference", "b", "--beam-size", "5"), "--beam-size is about a model"),
        (("--workdir", "run", "--input", "a", "--reference", "b", "--output", "./b"), "--output ./b is to be read"),
        (("--workdir", "run", "--input", "a", "--reference", "b", "--output", "o.gz"), "give a name without .gz"),
        (("--workdir", "run", "--input", "a", "--reference", "b", "--output", "-"), "--output -: give the name of"),
        (("--workdir", "run", "--beam-size", "1", "--length-penalty", "1"), "leave that out"),
        (("--hypotheses", "-", "--reference", "-"), "the standard input can be one of the texts"),
        (("--hypotheses", "a", "--reference", "b", "--reference", "c"), "--reference is given twice; it takes one"),
        (("--hypotheses", "a", "--reference", "b.tsv"), "b.tsv is a table; give two files of plain text"),
    ],
    ids=str,
)
def test_options_that_cannot_be(refuse, options, message):
    assert message in refuse("evaluate", *options)


def test_a_folder_that_is_not_there_is_told_before_anything_is_translated(call, text, finished):
    model = "evaluate", "--workdir", finished, "--input", text / "valid.en", "--reference", text / "valid.ne"
    done = call(*model, "--target-lang", "ne", "--output", "/proc/out")
    assert (done.returncode, done.stdout) == (2, "") and "/proc/out could not be written: " in done.stderr


@pytest.mark.parametrize("size", [5, 4])
def test_a_search_where_nothing_is_translated(call, finished, size):
    """Be it the search that there is anyway; before anything is measured."""
    done = call("evaluate", "--workdir", finished, "--beam-size", size)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--beam-size is about translations: it goes with --input and --reference" in done.stderr


def test_languages(refuse, text, finished, tmp_path):
    files = "--input", text / "valid.en", "--reference", text / "valid.ne"
    several = "evaluate", "--workdir", finished, *files
    assert f"--target-lang must be given: the run in {finished} translates into ne, en" in refuse(*several)
    assert f"--target-lang fr: the run in {finished} translates into ne, en" in refuse(*several, "--target-lang", "fr")
    unnamed = shutil.copytree(finished, tmp_path / "run")
    stored = json.loads((unnamed / "config.json").read_text()) | {"directions": [[None, None]], "tagged": False}
    (unnamed / "config.json").write_text(json.dumps(stored))
    line = refuse("evaluate", "--workdir", unnamed, *files, "--target-lang", "ne")
    assert "has one target language without a name" in line


def test_a_vocabulary_that_is_another(refuse, data, other_data, finished, tmp_path):
    line = refuse(*arguments(finished, other_data))
    assert f"data folder {other_data} was made with another tokenizer than the run in {finished}" in line
    assert "was made with another tokenizer" in refuse("evaluate", "--workdir", finished, "--data", other_data)
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.copy(other_data / "tokenizer.model", run / "tokenizer.model")
    assert "tokenizer.model is not the tokenizer that this run was started with" in refuse("evaluate", "--workdir", run)
    line = refuse(*arguments(tmp_path / "small", data, model__vocab_size=50))
    assert "--model.vocab-size 50 is smaller than the data's vocabulary of 82 tokens" in line
    assert not (tmp_path / "small" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 6}, "--train.batch-size 6 does not divide by 1 microbatches x 4 devices"),
        ({"inputs__row_length": 8}, "--inputs.row-length 8 is shorter than the longest sentence"),
        ({"inputs__label_smoothing": 1}, "--inputs.label-smoothing 1.0: must be 0 or more and less than 1"),
        ({"model__num_heads": 3}, "--model.width 16 must be even and divide by --model.num-heads 3"),
        ({"model__score": "dot"}, "unknown option --model.score"),
        ({"data": "nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(refuse, data, tmp_path, changes, message):
    assert message in refuse(*arguments(tmp_path / "run", **{"data": data, **changes}))
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_run_is_refused_with_the_difference(refuse, data, finished):
    line = refuse(*arguments(finished, data, inputs__label_smoothing=0.2, seed=1))
    assert "cannot continue: seed: 0 -> 1; inputs.label_smoothing: 0.1 -> 0.2;" in line


def test_a_language_without_number_words():
    with pytest.raises(UserError, match="cannot write numbers in the language 'xx'"):
        numbers.in_words(7, "xx")
