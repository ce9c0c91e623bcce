"""A run that is killed, at any moment, ends where it would have ended."""

import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from flax import traverse_util

from core_flax import snapshot
from core_flax.checkpoint import list_steps

NUM_STEPS = 16


def arrays(workdir, step):
    """Bytes of every array of a checkpoint, parameters and optimizer state, by name."""
    folder = workdir / "checkpoints" / str(step)
    entries = snapshot.read_manifest(folder)["arrays"].items()
    abstract = {name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"]) for name, entry in entries}
    state = snapshot.read_state(folder, traverse_util.unflatten_dict(abstract, sep="/"))
    return {name: jax.device_get(x).tobytes() for name, x in snapshot.named_leaves(state).items()}


def curve(workdir):
    """What metrics.jsonl says of each step, without times."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = {"time", "sequences_per_second", "tokens_per_second", "data_wait"}
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def losses(workdir):
    return [record["loss"] for record in curve(workdir) if "loss" in record]


def num_records(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saving(workdir):
    """Steps whose checkpoints are being written, or were when the run was killed."""
    return [int(path.name.split(".")[0]) for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def kill_when(process, moment, delay=0.0):
    with process:
        while not moment():
            assert process.poll() is None, process.communicate()
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def uninterrupted(bert_flax, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = bert_flax.run(*bert_flax.pretrain(workdir, train__num_steps=NUM_STEPS))
    assert done.returncode == 0, done.stderr
    return workdir


def test_killed_runs_end_bitwise_equal(bert_flax, uninterrupted, tmp_path):
    draw = random.Random(20181011)
    command = bert_flax.pretrain(tmp_path, train__num_steps=NUM_STEPS, checkpoint__every_steps=1)
    torn = 0
    for number in range(4):
        records, saved = num_records(tmp_path), max(list_steps(tmp_path / "checkpoints"), default=0)
        process = bert_flax.start(*command)
        if number % 2:  # in a save, or as it ends
            kill_when(process, lambda: max(saving(tmp_path), default=0) > saved, delay=draw.random() * 0.02)  # noqa: B023
        else:  # at a step
            records += draw.randint(1, 3)
            kill_when(process, lambda: num_records(tmp_path) >= records)  # noqa: B023
        torn += bool(saving(tmp_path))
    assert torn, "no kill came while a checkpoint was being written"
    done = bert_flax.run(*command)
    assert done.returncode == 0 and not done.stderr
    assert "resumes at step" in done.stdout
    assert curve(tmp_path) == curve(uninterrupted)
    assert arrays(tmp_path, NUM_STEPS) == arrays(uninterrupted, NUM_STEPS)


@pytest.mark.parametrize("stop", [2, 3])
def test_averages_over_several_steps_do_not_show_where_a_run_was_stopped(call, bert_flax, tmp_path, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(*bert_flax.pretrain(whole, log__every_steps=4))
    call(*bert_flax.pretrain(parts, log__every_steps=4, checkpoint__every_steps=1, checkpoint__keep_last=9))
    for step in range(stop + 1, 7):  # as if it had been killed
        shutil.rmtree(parts / "checkpoints" / str(step))
    assert call(*bert_flax.pretrain(parts, log__every_steps=4)).returncode == 0
    assert curve(parts) == curve(whole) and len(losses(whole)) == 2


def test_another_mesh_and_microbatches_go_on_alike(bert_flax, call, tmp_path):
    first = {"mesh__data": 4}
    second = {"mesh__fsdp": 2, "mesh__tensor": 2, "train__num_microbatches": 2, "model__remat": "block"}
    here, there = tmp_path / "here", tmp_path / "there"
    call(*bert_flax.pretrain(here, train__num_steps=2, **first))
    shutil.copytree(here, there)
    for workdir, split in ((here, first), (there, second)):
        done = call(*bert_flax.pretrain(workdir, train__num_steps=5, **split))
        assert done.returncode == 0, done.stderr
        assert "resumes at step 2" in done.stdout
    assert len(losses(here)) == 5
    np.testing.assert_allclose(losses(there), losses(here), rtol=0, atol=1e-5)
