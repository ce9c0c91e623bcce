import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from core_flax import snapshot
from core_flax.checkpoint import Checkpoints, list_steps, load_params
from core_flax.config import CheckpointConfig
from core_flax.snapshot import fingerprints, named_leaves
from core_flax.state import TrainState
from core_flax.types import UserError

OPTIMIZER = optax.named_chain(
    ("clip", optax.clip_by_global_norm(1.0)),
    ("adam", optax.scale_by_adam()),
    ("decay", optax.add_decayed_weights(0.1, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))),
    ("rate", optax.scale_by_schedule(lambda step: 1.0)),
)


@functools.partial(jax.jit, static_argnums=1)
def make_state(step, width=16):
    """A state that is a function of its step, with bits that are no number among its bits."""
    key = jax.random.fold_in(jax.random.key(0), step)
    params = {
        "encoder": {"kernel": jax.random.normal(key, (8, width, 4)), "bias": jnp.zeros(4).at[1].set(-0.0)},
        "scale": jnp.full(width, step, jnp.float32).at[0].set(jnp.nan),
    }
    state = TrainState(jnp.asarray(step, jnp.int32), params, OPTIMIZER.init(params))
    grads = jax.tree.map(lambda x: jnp.nan_to_num(x) * 0.01 + 0.125, params)
    return state.replace(opt_state=OPTIMIZER.update(grads, state.opt_state, params)[1])


ABSTRACT = jax.eval_shape(make_state, 0)


def bits(tree):
    return {name: np.asarray(x).tobytes() for name, x in named_leaves(tree).items()}


def assert_same(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    assert bits(state) == bits(other)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def opened(folder):
    """Makes Checkpoints in the test's folder and closes them after it; the said lines are in its attribute ``said``."""
    made = []

    def make(keep_last=3, keep_best=0, where=folder):
        said = []
        made.append(Checkpoints(where, CheckpointConfig(keep_last=keep_last, keep_best=keep_best), said.append))
        return namedtuple("Opened", "checkpoints said")(made[-1], said)

    yield make
    for checkpoints in made:
        checkpoints.close()


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(make_state(step))
    checkpoints.wait()


# The names and the fingerprints.


def test_names_are_those_of_the_state_dict():
    state = make_state(1)
    # Flax's state dict does not enter the OrderedDict that optax makes.
    state_dict = flax.serialization.to_state_dict(state.replace(opt_state=dict(state.opt_state)))
    flat = traverse_util.flatten_dict(state_dict, sep="/")
    assert set(named_leaves(state)) == set(flat)
    assert "opt_state/adam/mu/encoder/kernel" in flat


def numpy_fingerprint(x):
    raw = np.frombuffer(np.ascontiguousarray(x).tobytes(), f"uint{8 * x.dtype.itemsize}").astype(object)

    def mix(value):
        value = value * 0x9E3779B1 % 2**32
        return value ^ (value >> 16)

    return sum(mix(int(value)) * (mix(i) | 1) for i, value in enumerate(raw)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 4)])
def test_fingerprint_against_numpy(dtype, shape):
    x = (np.random.default_rng(0).normal(size=shape) * 100).astype(jnp.dtype(dtype))
    assert fingerprints({"x": jnp.asarray(x)}) == {"x": numpy_fingerprint(x)}


def test_fingerprint_shows_any_changed_byte_and_moved_rows():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    changed = [np.roll(x, 1, axis=0), x.T.copy(), np.abs(x), -x, x[:, ::-1].copy(), x[[1, 0, 2, 3]]]
    for byte in range(x.nbytes):
        copy = x.copy()
        copy.view(np.uint8).reshape(-1)[byte] ^= 1 << (byte % 8)
        changed.append(copy)
    marks = fingerprints({str(i): copy for i, copy in enumerate([x, *changed])})
    assert marks["0"] not in [marks[str(i + 1)] for i in range(len(changed))]


SPECS = [((4,), ("data", None, None)), ((2, 2), (None, "fsdp", "tensor")), ((2, 2), ("tensor", None, "fsdp"))]


def put(x, mesh_shape, spec):
    axes = ("data",) if len(mesh_shape) == 1 else ("fsdp", "tensor")
    mesh = jax.make_mesh(mesh_shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def test_fingerprint_is_the_same_on_any_mesh():
    x = jax.random.normal(jax.random.key(0), (4, 8, 12))
    marks = [fingerprints({"x": put(x, *spec)})["x"] for spec in SPECS]
    assert marks == [numpy_fingerprint(np.asarray(x))] * len(SPECS)


def test_fingerprint_gathers_nothing():
    x = put(jnp.ones((4, 8, 12)), *SPECS[1])
    text = snapshot._fingerprints.lower([x]).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


# Saving and keeping.


def test_round_trip_is_bitwise_and_silent(opened, capfd):
    checkpoints, said = opened()
    assert checkpoints.restore_latest(ABSTRACT) is None
    save(checkpoints, 1, 2)
    state, step = checkpoints.restore_latest(ABSTRACT)
    assert step == 2
    assert_same(state, make_state(2))
    assert_same(checkpoints.restore(1, ABSTRACT), make_state(1))
    checkpoints.close()
    assert capfd.readouterr() == ("", "") and said == []


def test_keeps_the_last_and_the_best(opened, folder):
    checkpoints, _ = opened(keep_last=2, keep_best=2)
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 9.0, 6: None, 7: 8.0, 8: None}
    for step, loss in losses.items():
        checkpoints.save(make_state(step), None if loss is None else {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == list_steps(folder) == [2, 4, 7, 8]
    assert checkpoints.best_step == 2 and checkpoints.best_loss == 1.0
    assert sorted(os.listdir(folder)) == ["2", "4", "7", "8"]
    reopened, _ = opened(keep_last=1, keep_best=1)
    save(reopened, 9)
    assert reopened.steps() == [2, 9]
    assert_same(reopened.restore(2, ABSTRACT), make_state(2))


def test_best_is_none_without_losses(opened):
    checkpoints, _ = opened(keep_last=1, keep_best=1)
    save(checkpoints, 1, 2)
    assert checkpoints.steps() == [2] and checkpoints.best_step is checkpoints.best_loss is None


def test_saving_a_step_again_adds_only_metrics(opened, folder):
    checkpoints, _ = opened()
    save(checkpoints, 1, 2)
    before = (folder / "1" / "arrays" / "_METADATA").stat().st_mtime_ns
    checkpoints.save(make_state(1).replace(params=make_state(9).params), {"loss": 3.0, "accuracy": 0.5})
    checkpoints.save(make_state(1), {"loss": 4.0})
    checkpoints.save(make_state(2))
    checkpoints.wait()
    assert (folder / "1" / "arrays" / "_METADATA").stat().st_mtime_ns == before
    assert checkpoints.best_step == 1
    assert json.loads((folder / "1/manifest/manifest.json").read_text())["metrics"] == {"loss": 3.0, "accuracy": 0.5}
    assert_same(checkpoints.restore(1, ABSTRACT), make_state(1))


def test_state_may_be_donated_after_save(opened):
    step_fn = jax.jit(
        lambda state: state.replace(
            step=state.step + 1,
            params=jax.tree.map(lambda x: x * 1.5 + 1, state.params),
            opt_state=jax.tree.map(lambda x: x + 1, state.opt_state),
        ),
        donate_argnums=0,
    )
    checkpoints, _ = opened(keep_last=9)
    state = step_fn(make_state(0, 40_000))  # 15 MB: the files are being written while the next steps run
    expected = {}
    for _ in range(3):
        expected[int(state.step)] = {name: bytes(x) for name, x in bits(state).items()}
        checkpoints.save(state)
        for _ in range(3):
            state = step_fn(state)
    checkpoints.wait()
    abstract = jax.eval_shape(lambda: make_state(0, 40_000))
    assert checkpoints.steps() == list(expected)
    for step, content in expected.items():
        assert bits(checkpoints.restore(step, abstract)) == content


@pytest.mark.parametrize("setting", [{"keep_last": 0}, {"keep_best": -1}])
def test_a_setting_that_keeps_nothing_is_refused(setting):
    with pytest.raises(UserError, match=r"--checkpoint\.keep-(last|best)"):
        CheckpointConfig(**setting)


# Other device layouts.


def sharded(state, mesh, axes):
    """Places dim i of every array over axes[i] where it divides."""

    def place(x):
        fits = [a if a and x.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(axes[: x.ndim])]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(place, state)


def test_restores_onto_another_mesh_and_one_device(opened):
    auto = jax.sharding.AxisType.Auto
    data = jax.make_mesh((4,), ("data",), axis_types=(auto,))
    grid = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(auto, auto))
    state = jax.device_put(make_state(3), sharded(ABSTRACT, data, ("data",)))
    checkpoints, _ = opened()
    checkpoints.save(state)
    target = sharded(ABSTRACT, grid, ("fsdp", "tensor"))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), ABSTRACT, target)
    restored, _ = checkpoints.restore_latest(abstract)
    assert_same(restored, make_state(3))
    assert jax.tree.map(lambda x: x.sharding, restored) == target
    assert restored.params["encoder"]["kernel"].sharding.shard_shape((8, 16, 4)) == (4, 8, 4)
    single, _ = checkpoints.restore_latest(ABSTRACT)
    assert_same(single, make_state(3))
    assert {x.sharding.device_set == {jax.devices()[0]} for x in jax.tree.leaves(single)} == {True}
    checkpoints.save(restored.replace(step=jnp.asarray(4)))  # and back again
    back, _ = checkpoints.restore_latest(state)
    assert bits(back.params) == bits(state.params)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.replace(params=s.params | {"new": s.step}), "it lacks params/new;"),
        (lambda s: s.replace(params={"scale": s.params["scale"]}), "it has params/encoder/bias besides, it has"),
        (
            lambda s: s.replace(params=s.params | {"scale": jax.ShapeDtypeStruct((2, 4), jnp.float32)}),
            r"it has params/scale as float32\[16\], not float32\[2, 4\];",
        ),
        (
            lambda s: s.replace(params=s.params | {"scale": jax.ShapeDtypeStruct((16,), jnp.bfloat16)}),
            r"it has params/scale as float32\[16\], not bfloat16\[16\];",
        ),
        (lambda s: s.replace(opt_state={}), r"it has opt_state/adam/count besides, it has .* and 5 more; run with"),
    ],
)
def test_another_model_is_refused(opened, change, text):
    checkpoints, said = opened()
    save(checkpoints, 1)
    for restore in (checkpoints.restore_latest, functools.partial(checkpoints.restore, 1)):
        with pytest.raises(UserError, match=text) as error:
            restore(change(ABSTRACT))
        assert "\n" not in str(error.value)
    assert checkpoints.steps() == [1] and said == []


# Parameters alone.


def test_load_params(opened, folder, capfd):
    checkpoints, _ = opened()
    with pytest.raises(UserError, match="holds no checkpoint; give the --workdir"):
        load_params(folder)
    save(checkpoints, 1, 2)
    params, step = load_params(folder)
    assert step == 2 and bits(params) == bits(make_state(2).params)
    params, step = load_params(str(folder), 1)
    assert step == 1 and bits(params) == bits(make_state(1).params)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, _ = load_params(folder, sharding=NamedSharding(mesh, PartitionSpec()))
    assert len(params["scale"].sharding.device_set) == 4 and bits(params) == bits(make_state(2).params)
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 2"):
        load_params(folder, 7)
    (folder / "2" / "manifest" / "manifest.json").unlink()
    assert load_params(folder)[1] == 1
    assert "step 2" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"the checkpoint of step 2 .* is damaged .*; others: 1"):
        load_params(folder, 2)
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_load_params_does_not_read_the_optimizer(opened, folder):
    checkpoints, _ = opened()
    marker = jnp.full((64, 64), 1234.5678)
    state = TrainState(jnp.asarray(1), {"w": jnp.ones((64, 64))}, {"adam": marker})
    checkpoints.save(state)
    checkpoints.wait()
    pattern, hits = np.asarray(marker[0, :8]).tobytes(), 0
    for path in (folder / "1").rglob("*"):
        if path.is_file() and pattern in (content := path.read_bytes()):
            path.write_bytes(content.replace(pattern, bytes(len(pattern))))
            hits += 1
    assert hits
    assert bits(load_params(folder)[0]) == bits(state.params)
    with pytest.raises(UserError, match="opt_state/adam does not have the bits"):
        checkpoints.restore(1, state)


# Damage.


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_bytes(random.Random(0).randbytes(max(64, path.stat().st_size)))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(folder, CheckpointConfig())
    save(checkpoints, 1, 2)
    checkpoints.close()
    return folder


@pytest.mark.parametrize("harm", [flip, truncate, garble, Path.unlink])
def test_no_damage_to_any_file_goes_unseen(opened, folder, two_steps, harm):
    """Whatever happens to one file of the newest: its right content or the one before, never anything else."""
    files = sorted(path.relative_to(two_steps) for path in (two_steps / "2").rglob("*") if path.is_file())
    outcomes = {}
    for file in files:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(two_steps, folder)
        harm(folder / file)
        checkpoints, said = opened()
        state, step = checkpoints.restore_latest(ABSTRACT)
        assert_same(state, make_state(step))
        assert (step, len(said), (folder / "2.corrupt").exists()) in [(2, 0, False), (1, 1, True)], file
        outcomes[str(file)] = step
    assert outcomes["2/manifest/manifest.json"] == 1
    assert [step for file, step in outcomes.items() if "/d/" in file].count(1) >= 1


def test_every_byte_of_the_arrays_is_guarded(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    kernel = np.asarray(make_state(2).params["encoder"]["kernel"]).tobytes()
    path, start = next(
        (path, found)
        for path in (folder / "2").rglob("*")
        if path.is_file() and (found := path.read_bytes().find(kernel[:64])) >= 0
    )
    content = path.read_bytes()
    checkpoints, _ = opened()
    for byte in random.Random(0).sample(range(len(kernel)), 8):
        changed = bytearray(content)
        changed[start + byte] ^= 0x80
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"step 2 .* is damaged .*; others: 1"):
            checkpoints.restore(2, ABSTRACT)
    path.write_bytes(content)
    assert_same(checkpoints.restore(2, ABSTRACT), make_state(2))


def test_a_wrong_fingerprint_is_damage(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    path = folder / "2" / "manifest" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["arrays"]["params/scale"]["fingerprint"] ^= 1
    path.write_text(json.dumps(snapshot.seal(manifest)))
    checkpoints, said = opened()
    assert checkpoints.restore_latest(ABSTRACT)[1] == 1
    assert len(said) == 1 and "\n" not in said[0]
    assert "step 2 is damaged (params/scale does not have the bits that were saved): going back to step 1" in said[0]


def test_what_is_damaged_is_set_aside_and_blocks_no_save(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    for number in ("", "-2"):
        flip(folder / "2" / "manifest" / "manifest.json")
        checkpoints, _ = opened()
        assert checkpoints.restore_latest(ABSTRACT)[1] == 1
        assert (folder / f"2.corrupt{number}" / "arrays").is_dir()
        save(checkpoints, 2)
        state, step = checkpoints.restore_latest(ABSTRACT)
        assert step == 2
        assert_same(state, make_state(2))
    assert sorted(os.listdir(folder)) == ["1", "2", "2.corrupt", "2.corrupt-2"]
    flip(folder / "1" / "manifest" / "manifest.json")
    save(checkpoints, 1)
    assert_same(checkpoints.restore(1, ABSTRACT), make_state(1))


def test_an_empty_folder_is_damage(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    (folder / "3").mkdir()
    checkpoints, said = opened()
    assert checkpoints.restore_latest(ABSTRACT)[1] == 2
    assert "its manifest cannot be read" in said[0]


def test_all_damaged_is_an_error_and_nothing_is_moved(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    for step in ("1", "2"):
        truncate(folder / step / "manifest" / "manifest.json")
    for _ in range(2):  # a second try must not take the folder for an empty one
        checkpoints, said = opened()
        with pytest.raises(UserError, match=f"no checkpoint in {folder} is intact .step 2: .*step 1: ") as error:
            checkpoints.restore_latest(ABSTRACT)
        assert "\n" not in str(error.value) and said == []
    with pytest.raises(UserError, match="is intact"):
        load_params(folder)
    assert sorted(os.listdir(folder)) == ["1", "2"]


def test_another_schema_is_refused(opened, folder, two_steps):
    shutil.copytree(two_steps, folder)
    path = folder / "2" / "manifest" / "manifest.json"
    path.write_text(json.dumps(snapshot.seal(json.loads(path.read_text()) | {"schema": 2})))
    checkpoints, _ = opened()
    with pytest.raises(UserError, match="has schema 2 and this version reads 1"):
        checkpoints.restore_latest(ABSTRACT)


def test_leftovers_go_and_the_users_files_stay(opened, folder):
    for name in ("7.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-17", "3.deleted", "5.corrupt", "notes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    checkpoints, _ = opened()
    assert sorted(os.listdir(folder)) == ["5.corrupt", "notes"]
    save(checkpoints, 7)
    assert checkpoints.steps() == [7]


def test_a_deletion_that_is_interrupted_leaves_no_checkpoint(opened, folder, monkeypatch):
    checkpoints, _ = opened(keep_last=1)
    save(checkpoints, 1)
    monkeypatch.setattr(
        type(checkpoints.directory), "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2)
    assert list_steps(folder) == [2] and sorted(os.listdir(folder)) == ["1.deleted", "2"]
    monkeypatch.undo()
    opened()
    assert os.listdir(folder) == ["2"]


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
checkpoints = open_(sys.argv[1], 3)
like = {name: jnp.arange(100_000) for name in "abcdefgh"}
print(checkpoints.restore_latest(TrainState(jnp.asarray(0), like, {}))[1])
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
    truncate(largest)
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
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD + LOOP, str(folder)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout.readline() == f"ready {last}\n", f"seed {seed}"
            time.sleep(draw.uniform(0.05, 1.2))
            child.send_signal(signal.SIGKILL)
            reported = [int(line.split()[1]) for line in child.stdout.read().splitlines()]
        checkpoints, said = opened(keep_last=2)
        assert all(name.isdigit() for name in os.listdir(folder)), f"seed {seed}"
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
