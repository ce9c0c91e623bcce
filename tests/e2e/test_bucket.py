"""Runs whose workdir is a bucket: by gcsfs and TensorStore as they come, before a server of the tests' own."""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import fake_gcs
import numpy as np
import pytest
from conftest import Process
from small_tasks import arguments, in_a_hurry, right

from core_flax import lease, storage
from core_flax.checkpoint import list_steps
from core_flax.lock import only_writer
from core_flax.params import leaves
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import UserError
from lm_flax import tokenizers
from seq2seq_flax.cli import main as translate
from seq2seq_flax.runs import load_run

needs_gcsfs = pytest.mark.skipif(find_spec("gcsfs") is None, reason="gcsfs is not installed: the extra [gcs]")
RUN = "gs://bucket/runs/one"


@pytest.fixture(scope="module")
def server():
    with fake_gcs.serve() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture
def bucket(server):
    """Empty, and open to all."""
    server.objects.clear()
    server.refuse.clear()
    del server.written[:]
    return server


@pytest.fixture
def run(bucket, bert_flax, call):
    """Four steps of a run."""
    right(call(*bert_flax.pretrain(RUN, train__num_steps=4)))
    return bucket


def losses(text):
    records = [json.loads(line) for line in text.splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def text_of(bucket, name):
    return bucket.objects[f"runs/one/{name}"][1].decode()


@needs_gcsfs
def test_a_run_in_a_bucket_is_one_on_a_disk(run, bert_flax, call, finished_run):
    """What it writes, how often, that it goes on, and that it can be read."""
    names = {name.removeprefix("runs/one/").partition("/")[0] for name in run.objects}
    assert names - {"tensorboard"} == {"config.json", "vocab.txt", "metrics.jsonl", "checkpoints"}  # the lock is gone
    assert list_steps(f"{RUN}/checkpoints") == [2, 4]
    assert text_of(run, "vocab.txt") == (finished_run / "vocab.txt").read_text()
    # Four records, in an object that was written with each checkpoint and not besides.
    assert list(losses(text_of(run, "metrics.jsonl"))) == [1, 2, 3, 4]
    assert run.written.count("runs/one/metrics.jsonl") == 2

    assert "resumes at step 4: " in right(call(*bert_flax.pretrain(RUN)))
    assert list_steps(f"{RUN}/checkpoints") == [4, 6]
    local = losses((finished_run / "metrics.jsonl").read_text())
    assert losses(text_of(run, "metrics.jsonl")) == pytest.approx(local, abs=1e-5)
    curves = [len(content) for name, (_, content) in run.objects.items() if "/tensorboard/" in name]
    if find_spec("tensorboard"):
        assert len(curves) == 2 and min(curves) > 500

    table, expected = (right(call("evaluate", "--workdir", each)) for each in (RUN, finished_run))
    assert table == expected
    right(call("export-hf", "--workdir", RUN, "--output", "gs://bucket/hf"))
    assert {"hf/config.json", "hf/vocab.txt", "hf/model.safetensors"} <= set(run.objects)


@needs_gcsfs
def test_two_processes_fine_tune_in_a_bucket_as_one_does_on_a_disk(bucket, mrpc, model, glue, call, tmp_path):
    home, settings = "gs://bucket/runs/mrpc", arguments("mrpc", glue, "gs://bucket/runs/mrpc", init=model)
    job = ["local", "--processes=2", "--", sys.executable, "-m", "bert_flax.cli", *settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with in_a_hurry(), Process([sys.executable, "-m", "launch.cli", *job], env=os.environ, text=True, **pipes) as local:
        out, err = local.communicate(timeout=120)
    assert local.returncode == 0, err
    assert all(line.startswith("[0] ") for line in out.splitlines())
    stored = json.loads(bucket.objects["runs/mrpc/results.json"][1])["runs"][0]
    expected = json.loads((mrpc[0] / "results.json").read_text())["runs"][0]
    for moment in ("last", "best"):
        assert stored[moment] == pytest.approx(expected[moment], abs=1e-4)
    found, theirs = (bucket.objects["runs/mrpc/seed-0/metrics.jsonl"][1].decode(), mrpc[0] / "seed-0/metrics.jsonl")
    assert losses(found) == pytest.approx(losses(theirs.read_text()), abs=1e-4)
    said = [
        right(call("predict", "--workdir", each, "--data", glue / "MRPC" / "test.tsv", "--output", tmp_path / "said"))
        and (tmp_path / "said").read_text()
        for each in (home, mrpc[0] / "seed-0")
    ]
    assert said[0] == said[1]


TRANSLATOR = {  # without dropout and Adam, being less to compile
    "model.num-layers": 1,
    "model.width": 16,
    "model.num-heads": 2,
    "model.mlp-width": 32,
    "model.dropout": 0.0,
    "model.attention-dropout": 0.0,
    "model.remat": "none",
    "inputs.row-length": 96,
    "optimizer.name": "sgd",
    "optimizer.learning-rate": 0.1,
    "optimizer.weight-decay": 0.0,
    "schedule.warmup-steps": 2,
    "train.batch-size": 4,
    "train.eval-every-steps": 0,
    "checkpoint.every-steps": 2,
    "log.every-steps": 1,
}


def seq2seq_flax(*argv):
    """In this process, on four devices; what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        translate([str(argument) for argument in argv])
    assert (stop.value.code, err.getvalue()) == (0, ""), err.getvalue()
    return out.getvalue()


@needs_gcsfs
def test_a_translator_is_trained_in_a_bucket_as_on_a_disk(bucket, corpus, tmp_path):
    """Stopped, gone on with and averaged: what is written and read again is the same."""
    lines = corpus.read_text().strip().replace("\n\n", " ").split(". ")
    for side, words in ("source", lines), ("target", [" ".join(line.split()[::-1]) for line in lines]):
        (tmp_path / side).write_text("\n".join(words) + "\n")
    data, local = tmp_path / "data", tmp_path / "run"
    files = tmp_path / "source", tmp_path / "target"
    seq2seq_flax("prepare", "--train", *files, "--output", data, "--vocab-size", 80)
    settings = [f"--data={data}", "--log.no-tensorboard", *(f"--{name}={value}" for name, value in TRANSLATOR.items())]
    said = ""
    with in_a_hurry():
        for workdir, num_steps in (RUN, 4), (RUN, 6), (local, 6):
            command = ["train", "transformer_tiny", f"--workdir={workdir}", f"--train.num-steps={num_steps}"]
            said += seq2seq_flax(*command, *settings)
        assert said.count("starts: ") == 2 and said.count("resumes at step 4: ") == 1
        names = {name.removeprefix("runs/one/").partition("/")[0] for name in bucket.objects}
        assert names == {"config.json", "tokenizer.model", "metrics.jsonl", "checkpoints"}
        found, expected = losses(text_of(bucket, "metrics.jsonl")), losses((local / "metrics.jsonl").read_text())
        assert list(found) == [1, 2, 3, 4, 5, 6] and found == pytest.approx(expected, abs=1e-5)
    averaged = []
    for workdir in RUN, str(local):
        seq2seq_flax("average", "--workdir", workdir, "--last", 2)
        run, tokenizer = load_run(f"{workdir}/averaged-2")  # as whatever translates begins
        assert (run.data, tokenizer.num_tokens) == (data, 80)
        averaged.append(dict(leaves(run.params()[0])))
    for name, array in averaged[1].items():
        np.testing.assert_allclose(averaged[0][name], array, rtol=0, atol=1e-5, err_msg=name)


@needs_gcsfs
def test_one_writer(bucket, bert_flax, call, monkeypatch, capsys):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "LOST_SECONDS", 1.0)
    with only_writer(storage.path(RUN) / "run.lock", "refused"):
        done = call(*bert_flax.pretrain(RUN))
        assert done.returncode == 2
        assert done.stderr == f"bert-flax: error: another run is writing to {RUN}; stop it or give another --workdir\n"
    assert not bucket.objects
    # A process that was killed writes its lock no longer.
    bucket.objects["runs/one/run.lock"] = (10**6, b"someone")
    began, taken = time.monotonic(), []

    def take():
        try:
            with only_writer(storage.path(RUN) / "run.lock", "refused"):
                taken.append(time.monotonic() - began)
                time.sleep(0.5)
        except UserError as error:
            taken.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (seconds,) = (each for each in taken if each != "refused")  # of two that would take it over, one did
    assert len(taken) == 2 and seconds > 1.0
    assert "in use by someone, or was" in capsys.readouterr().err
    assert not bucket.objects


@needs_gcsfs
@pytest.mark.parametrize(
    ("folder", "refuse", "message"),
    [
        (RUN, {"GET"}, f"{RUN} could not be reached: Forbidden: "),
        (RUN, {"POST"}, f"cannot write to {RUN}: PERMISSION_DENIED: Forbidden"),
        ("gs://other/run", set(), "cannot write to gs://other/run: NOT_FOUND"),
        ("gs://bucket", set(), "--workdir gs://bucket: give a folder in a bucket, as gs://BUCKET/FOLDER"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(bucket, bert_flax, call, folder, refuse, message):
    bucket.refuse |= refuse
    done = call(*bert_flax.pretrain(folder))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


@needs_gcsfs
def test_text_that_a_run_brings_is_prepared_on_a_disk(bucket, call):
    done = call("pretrain", "--workdir", RUN)
    assert done.returncode == 2 and "give a local folder with --data" in done.stderr


@needs_gcsfs
def test_tokenizers(bucket, tmp_path):
    """Those of the other families."""
    text = "one two three four five six seven eight nine ten eleven twelve\n" * 20
    characters = tokenizers.Characters("".join(sorted(set(text))), has_end=False)
    pieces = tokenizers.train_pieces([text], 40)
    for made in (characters, pieces):
        with storage.replacing(storage.path(RUN) / made.file) as partial:
            made.save(partial)
        assert tokenizers.load(f"{RUN}/{made.file}").fingerprint == made.fingerprint
    assert SentencePiece.load(f"{RUN}/{pieces.file}").num_tokens == 40


def test_without_gcsfs(monkeypatch, call):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    done = call("evaluate", "--workdir", RUN)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"bert-flax: error: --workdir {RUN} needs the package gcsfs; install the extra [gcs]: pip install -e .[gcs]\n"
    )
