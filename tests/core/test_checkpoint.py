"""What is saved comes back bit by bit, on any devices; which checkpoints stay; what another model gets."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import ABSTRACT, assert_same, bits, make_state, opening, save
from jax.sharding import NamedSharding, PartitionSpec

from core_flax.checkpoint import list_steps, load_params
from core_flax.config import CheckpointConfig
from core_flax.state import TrainState
from core_flax.types import UserError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def opened(folder):
    with opening(folder) as make:
        yield make


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
