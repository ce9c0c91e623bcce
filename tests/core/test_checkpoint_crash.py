"""In a process of its own: a full disk and a kill at any moment leave whole checkpoints; damage takes one line."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import bits, make_state, opening, save
from conftest import Process

from core_flax.state import TrainState
from core_flax.types import UserError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def opened(folder):
    with opening(folder) as make:
        yield make


# A full disk.


def test_too_little_room_is_said_before_anything_is_written(opened, folder, monkeypatch):
    checkpoints, _ = opened()
    save(checkpoints, 1)
    free = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError) as error:
        checkpoints.save(make_state(2))
    size = sum(x.nbytes for x in jax.tree.leaves(make_state(2)))
    assert f"step 2 could not be written to {folder}: it needs {size / 1e6:.2f} MB, 0.00 MB are free" in str(
        error.value
    )
    assert "the checkpoint of step 1 is intact" in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(folder) == ["1"]
    monkeypatch.undo()
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]


CHILD = f"""
import os, sys, resource
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parents[1])!r}]
import conftest
import jax, jax.numpy as jnp
from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig
from core_flax.state import TrainState
from core_flax.types import UserError
def make(step, size):
    params = {{"w": jnp.arange(size) * step, "b": jnp.full(9, step)}}
    return TrainState(jnp.asarray(step), params, {{"m": jnp.ones(size) * step}})
def open_(folder, keep_last):
    return Checkpoints(folder, CheckpointConfig(keep_last=keep_last))
"""


def child_state(step, size):
    """What CHILD's make(step, size) is, in numpy."""
    return {
        "step": np.int32(step).tobytes(),
        "params/w": (np.arange(size, dtype=np.int32) * np.int32(step)).tobytes(),
        "params/b": np.full(9, step, np.int32).tobytes(),
        "opt_state/m": (np.ones(size, np.float32) * np.float32(step)).tobytes(),
    }


def child_abstract(size):
    like = jax.ShapeDtypeStruct
    params = {"w": like((size,), jnp.int32), "b": like((9,), jnp.int32)}
    return TrainState(like((), jnp.int32), params, {"m": like((size,), jnp.float32)})


FULL = """
checkpoints = open_(sys.argv[1], 3)
checkpoints.save(make(1, 100))
checkpoints.wait()
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    import shutil
else:
    import shutil
    real = shutil.disk_usage  # a file system that tells of more room than it has, as with quotas
    shutil.disk_usage = lambda path: real(path)._replace(free=10**12)
try:
    checkpoints.save(make(2, 1_000_000))
    checkpoints.wait()
except UserError as error:
    print("said:", error)
print("left:", sorted(os.listdir(sys.argv[1])))
checkpoints.save(make(3, 100))  # what is small enough can still be saved
checkpoints.close()
print("steps:", checkpoints.steps())
"""


def run_child(script, *arguments):
    command = [sys.executable, "-c", CHILD + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def check_full(folder, how, opened):
    done = run_child(FULL, folder, how)
    assert done.returncode == 0, done.stderr
    said, left, steps = done.stdout.splitlines()
    assert said.startswith(f"said: the checkpoint of step 2 could not be written to {folder}: it needs 8.00 MB, ")
    assert "the checkpoint of step 1 is intact; make room there" in said
    assert (left, steps) == ("left: ['1']", "steps: [1, 3]")
    assert done.stderr == ""
    checkpoints, _ = opened(where=folder)
    assert bits(checkpoints.restore(1, child_abstract(100))) == child_state(1, 100)
    assert bits(checkpoints.restore_latest(child_abstract(100))[0]) == child_state(3, 100)


def test_a_write_that_fails_leaves_the_checkpoint_before(folder, opened):
    check_full(folder, "limit", opened)


def test_a_disk_that_fills_leaves_the_checkpoint_before(tmp_path, opened):
    where = tmp_path / "small"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root and a mount")
    try:
        check_full(where / "checkpoints", "disk", opened)
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


DAMAGED = """
import gc, time
from orbax.checkpoint._src.serialization.serialization import _read_array_index_and_device_put as read
checkpoints = open_(sys.argv[1], 3)
like = {name: jnp.arange(100_000) for name in "abcdefgh"}
print(checkpoints.restore_latest(TrainState(jnp.asarray(0), like, {}))[1])
nothing = dict.fromkeys(["global_shape", "new_shard_shape", "dtype", "byte_limiter", "strict", "dll", "memory_kind"])
read([], [], None, **nothing)  # a read that never begins: whether the failure leaves one behind is a matter of chance
gc.collect()
time.sleep(0.2)  # for whatever goes on in the background
"""


def test_damage_takes_one_line_on_the_screen(folder, opened):
    """Orbax leaves a dozen reads of other arrays half done, which Python and asyncio would report each."""
    checkpoints, _ = opened()
    for step in (1, 2):
        checkpoints.save(TrainState(jnp.asarray(step), {name: jnp.arange(100_000) for name in "abcdefgh"}, {}))
    checkpoints.wait()
    largest = max((path for path in (folder / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    done = run_child(DAMAGED, folder)
    assert done.stdout == "1\n", done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("checkpoint of step 2 is damaged (its arrays cannot")


# A kill.

LOOP = """
checkpoints = open_(sys.argv[1], 2)
found = checkpoints.restore_latest(make(0, 100_000))
step = found[1] if found else 0
print("ready", step, flush=True)
while True:
    step += 1
    checkpoints.save(make(step, 100_000))
    if step % 2:
        checkpoints.wait()
        print("done", step, flush=True)
"""


def test_kill_at_any_moment_leaves_whole_checkpoints(folder, opened):
    seed = random.SystemRandom().randrange(10**6)
    draw, last = random.Random(seed), 0
    for saved_first in (False, False, False, False, True):
        with Process([sys.executable, "-c", CHILD + LOOP, str(folder)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == f"ready {last}\n", f"seed {seed}"
            done = child.stdout.readline() if saved_first else ""
            time.sleep(draw.uniform(0.05, 1.2))
            child.send_signal(signal.SIGKILL)
            reported = [int(line.split()[1]) for line in (done + child.stdout.read()).splitlines()]
        checkpoints, said = opened(keep_last=2)
        left = os.listdir(folder) if folder.exists() else []  # on a slow machine it may not have come to the first save
        assert all(name.isdigit() for name in left), f"seed {seed}"
        if not checkpoints.steps():
            assert not reported
            continue
        state, last = checkpoints.restore_latest(child_abstract(100_000))
        assert last >= max(reported, default=0) and said == [], f"seed {seed}"
        for step in checkpoints.steps():
            content = bits(checkpoints.restore(step, child_abstract(100_000)))
            assert content == child_state(step, 100_000), f"seed {seed}"
        assert int(state.step) == last
    assert last > 0
