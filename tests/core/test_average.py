"""Means of parameters: over the last checkpoints of a run, and moving ones while it trains."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core_flax.average import average, mean_of
from core_flax.checkpoint import Checkpoints, list_steps, load_params
from core_flax.config import (
    CheckpointConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from core_flax.loop import train
from core_flax.params import ParamRule
from core_flax.program import first_state, make_program
from core_flax.snapshot import named_leaves
from core_flax.state import TrainState
from core_flax.step import make_train_step
from core_flax.task import Evaluator, Task
from core_flax.types import UserError

DECAY = 0.8
KIND = "family.model"
STEPS = (2, 4, 7, 9)


def drawn(step):
    draw = np.random.default_rng(step)
    return {"w": draw.normal(size=(8, 4)).astype(np.float32), "b": 1e3 * draw.normal(size=4).astype(np.float32)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with four checkpoints and data of its own."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(keep_last=4))
    for step in STEPS:
        checkpoints.save(
            TrainState(jnp.int32(step), jax.tree.map(jnp.asarray, drawn(step)), {"count": jnp.int32(step)})
        )
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps({"format": 1, "kind": KIND, "data": "data", "config": {}}))
    (folder / "tokenizer.model").write_bytes(b"model")
    (folder / "metrics.jsonl").write_text("{}")
    return folder


def test_the_mean_is_numpys(run, tmp_path):
    home, steps = average(str(run), 3, str(tmp_path / "mean"), kinds={KIND})
    assert steps == [4, 7, 9] and home == tmp_path / "mean"
    params, step = load_params(home / "checkpoints")
    assert step == 9 and params.keys() == {"w", "b"}
    for name, x in params.items():
        expected = np.mean([drawn(step)[name].astype(np.float64) for step in (4, 7, 9)], axis=0)
        np.testing.assert_array_equal(x, expected.astype(np.float32), strict=True)
    assert sorted(path.name for path in home.iterdir()) == ["checkpoints", "config.json", "tokenizer.model"]
    assert json.loads((home / "config.json").read_text())["data"] == str(run / "data")


def test_who_does_not_say_how_many_gets_all_there_are_up_to_ten(run, monkeypatch):
    assert average(str(run), None, kinds={KIND}) == (run / "averaged-4", [2, 4, 7, 9])
    monkeypatch.setattr("core_flax.average._MOST", 3)
    assert average(str(run), None, kinds={KIND}) == (run / "averaged-3", [4, 7, 9])


def test_the_mean_of_one_is_itself(run):
    for name, x in mean_of(run / "checkpoints", [7]).items():
        np.testing.assert_array_equal(x, drawn(7)[name], strict=True)


def test_what_cannot_be_averaged(run, tmp_path):
    with pytest.raises(UserError, match=r"--last 5: .* has 4 checkpoints \(steps 2, 4, 7, 9\); ask for fewer"):
        average(str(run), 5, kinds={KIND})
    with pytest.raises(UserError, match="--last 0: must be 1 or more"):
        average(str(run), 0, kinds={KIND})
    with pytest.raises(UserError, match=r"holds no run: config\.json is missing"):
        average(str(tmp_path), 1, kinds={KIND})
    with pytest.raises(UserError, match=r"describes a run of kind 'family\.model', not 'family\.other'"):
        average(str(run), 1, kinds={"family.other"})
    average(str(run), 2, str(tmp_path / "mean"), kinds={KIND})
    with pytest.raises(UserError, match="mean is the mean of 2 checkpoints already; give the --workdir of their run"):
        average(str(tmp_path / "mean"), 1, kinds={KIND})
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.json", tmp_path / "begun")
    with pytest.raises(UserError, match="begun has no checkpoint yet; train until it saves one"):
        average(str(tmp_path / "begun"), None, kinds={KIND})
    with pytest.raises(UserError, match="is there already, and not empty; give a new folder"):
        average(str(run), 1, str(run / "checkpoints"), kinds={KIND})
    shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "damaged/checkpoints/7/manifest/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"the checkpoint of step 7 in .* is damaged"):
        average(str(tmp_path / "damaged"), 2, kinds={KIND})
    assert not (tmp_path / "damaged/averaged-2").exists()


def quadratic(step):
    return np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32)


def loss_sums(params, batch, key):
    error = batch["x"] @ params["w"] - 1.0
    return {"loss": jnp.sum(error**2)}, {"error": (jnp.sum(error**2), jnp.float32(error.size))}


def held_out(params, batch):
    return {"mean": (jnp.sum(params["w"]), jnp.float32(1.0))}


TASK = Task(
    init=lambda key: {"w": jax.random.normal(key, (8, 4))},
    loss_weights=lambda batch: {"loss": jnp.float32(len(batch["x"]))},
    loss_sums=loss_sums,
    batches=lambda start, rows: ({"x": quadratic(step)[rows]} for step in range(start, 100)),
    param_rules=(ParamRule("w", "matrix", "embed | mlp"),),
    evaluators={"held_out": Evaluator(lambda: iter([{"x": quadratic(0)}]), held_out, objective="mean")},
)
CONFIG = RunConfig(
    optimizer=OptimizerConfig(learning_rate=0.1),
    schedule=ScheduleConfig(name="constant"),
    train=TrainConfig(num_steps=6, batch_size=8, eval_every_steps=3, ema_decay=DECAY),
    mesh=MeshConfig(fsdp=2, tensor=2),
    checkpoint=CheckpointConfig(every_steps=2, keep_last=9, keep_best=0),
    log=LogConfig(tensorboard=False),
)


def trained(workdir, num_steps=6):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=num_steps))
    program = make_program(TASK, config)
    return program, train(TASK, config, program, workdir)


def states(workdir, program):
    checkpoints = Checkpoints(workdir / "checkpoints", CONFIG.checkpoint)
    found = {step: checkpoints.restore(step, program.abstract_state) for step in checkpoints.steps()}
    checkpoints.close()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, *trained(workdir)


def test_moving_average_is_the_recursion():
    """Of every step's parameters, from those at the start."""
    step = jax.jit(make_train_step(TASK, optax.sgd(0.1), lambda step: 0.1, seed=0, ema_decay=DECAY))
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    state = TrainState(jnp.int32(0), params, optax.sgd(0.1).init(params), ema=params)
    expected, kept = np.asarray(params["w"], np.float64), []
    for number in range(1, 41):
        state, _ = step(state, {"x": quadratic(number)})
        kept.append(min(DECAY, (1 + number) / (10 + number)))
        expected = kept[-1] * expected + (1 - kept[-1]) * np.asarray(state.params["w"], np.float64)
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5, atol=1e-6)
    assert kept[0] < DECAY == kept[-1]
    assert not np.allclose(state.ema["w"], state.params["w"], atol=1e-4)


def test_evaluators_and_readers_take_the_average(whole):
    workdir, program, metrics = whole
    state = states(workdir, program)[6]
    np.testing.assert_allclose(metrics["mean"], np.asarray(state.ema["w"]).sum(), rtol=1e-5)
    assert abs(np.asarray(state.ema["w"]).sum() - np.asarray(state.params["w"]).sum()) > 1e-3
    params, _ = load_params(workdir / "checkpoints")
    np.testing.assert_array_equal(params["w"], state.ema["w"])


def test_it_lies_where_the_parameters_lie(whole):
    _, program, _ = whole
    abstract = program.abstract_state
    assert abstract.ema["w"].sharding == abstract.params["w"].sharding
    assert not abstract.params["w"].sharding.is_fully_replicated


def test_a_resumed_run_has_the_same_bits(whole, tmp_path):
    workdir, program, _ = whole
    trained(tmp_path, 4)
    trained(tmp_path)
    expected, found = (states(folder, program)[6] for folder in (workdir, tmp_path))
    for name, x in named_leaves(expected).items():
        np.testing.assert_array_equal(x, named_leaves(found)[name], err_msg=name)
    assert list_steps(tmp_path / "checkpoints") == [2, 4, 6]


def test_without_it_the_state_is_as_it_was():
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, ema_decay=None))
    names = {name for name in named_leaves(make_program(TASK, config).abstract_state)}
    with_it = {name for name in named_leaves(make_program(TASK, CONFIG).abstract_state)}
    assert with_it - names == {"ema/w"}
    assert names == {
        "step",
        "params/w",
        "opt_state/schedule/count",
        *(f"opt_state/adam/{x}" for x in ("count", "mu/w", "nu/w")),
    }


def test_it_starts_from_what_the_run_starts_from():
    """Parameters that the task gives rather than draws included, and in memory of its own."""
    given = np.full((8, 4), 3.0, np.float32)
    task = dataclasses.replace(TASK, initial={"w": given})
    program = make_program(task, CONFIG)
    with jax.set_mesh(program.mesh):
        state = first_state(task, program, 0)
        np.testing.assert_array_equal(state.ema["w"], given)
        program.step(state, {"x": quadratic(1)})  # gives up both
        program.step(program.init(jax.random.key(0)), {"x": quadratic(1)})


def test_decays_out_of_range():
    for decay in (0.0, 1.0):
        with pytest.raises(UserError, match=r"--train.ema-decay .*: must be more than 0 and less than 1, or None"):
            TrainConfig(ema_decay=decay)
