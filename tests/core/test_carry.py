"""What steps hand to each other: row to row, whatever the microbatches and the mesh, saved and gone on with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.checkpoint import Checkpoints, load_params
from core_flax.config import CheckpointConfig, LogConfig, MeshConfig, OptimizerConfig, RunConfig, ScheduleConfig
from core_flax.config import TrainConfig as Train
from core_flax.evaluate import make_evaluate
from core_flax.loop import train
from core_flax.params import ParamRule
from core_flax.program import make_program
from core_flax.sharding import make_mesh
from core_flax.state import TrainState
from core_flax.task import Evaluator, Task

B, NUM_STEPS = 8, 6
CONFIG = RunConfig(
    optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.0, clip_norm=None),
    schedule=ScheduleConfig(name="constant"),
    train=Train(num_steps=NUM_STEPS, batch_size=B, eval_every_steps=0),
    checkpoint=CheckpointConfig(every_steps=0),
    log=LogConfig(every_steps=1, tensorboard=False),
)


def batch_of(step):
    return {"x": np.random.default_rng(step).normal(size=B).astype(np.float32)}


def sums(params, batch):
    """Each row's sum so far is to be 1 when weighed; of the sum before, no gradient is taken."""
    total_B = 0.5 * batch["carry"]["total"] + batch["x"]
    return jnp.sum((params["weight"][0] * total_B - 1) ** 2), {"total": total_B}


def loss_sums(params, batch, key):
    loss, carry = sums(params, batch)
    return {"square": loss}, {}, carry


def metric_sums(params, batch):
    loss, carry = sums(params, batch)
    return {"loss": (loss, jnp.float32(len(batch["x"])))}, carry


def carry():
    return {"total": jnp.zeros(B)}


def batches(start, rows):
    for step in range(start, NUM_STEPS):
        yield {name: x[rows] for name, x in batch_of(step).items()}


TASK = Task(
    init=lambda key: {"weight": jnp.full(1, 0.3)},
    loss_weights=lambda batch: {"square": jnp.float32(batch["x"].shape[0])},
    loss_sums=loss_sums,
    batches=batches,
    param_rules=(ParamRule("weight", "bias", "small"),),
    carry=carry,
)
EVALUATOR = Evaluator(lambda: (batch_of(step) for step in range(NUM_STEPS)), metric_sums, objective="loss", carry=carry)


def totals(num_steps):
    """By hand: the sums after so many steps."""
    total_B = np.zeros(B)
    for step in range(num_steps):
        total_B = 0.5 * total_B + batch_of(step)["x"]
    return total_B


def run(num_microbatches, mesh):
    config = dataclasses.replace(
        CONFIG, train=dataclasses.replace(CONFIG.train, num_microbatches=num_microbatches), mesh=mesh
    )
    program = make_program(TASK, config, jax.devices()[: mesh.data * mesh.fsdp])
    state, losses = program.init(jax.random.key(0)), []
    for batch in batches(0, range(B)):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize(
    ("num_microbatches", "mesh"),
    [(1, MeshConfig(data=1)), (4, MeshConfig(data=1)), (2, MeshConfig(data=2, fsdp=2))],
    ids=["whole", "in portions", "on a mesh"],
)
def test_each_row_goes_on_where_it_was(num_microbatches, mesh):
    state, losses = run(num_microbatches, mesh)
    np.testing.assert_allclose(state.carry["total"], totals(NUM_STEPS), rtol=1e-6)
    np.testing.assert_allclose(losses[0], np.mean((0.3 * batch_of(0)["x"] - 1) ** 2), rtol=1e-6)
    np.testing.assert_allclose(losses, run(1, MeshConfig(data=1))[1], rtol=1e-6)
    assert state.carry["total"].sharding.shard_shape((B,)) == (B // (mesh.data * mesh.fsdp),)


def test_a_resumed_run_goes_on_with_it(tmp_path):
    program = make_program(TASK, CONFIG)
    train(TASK, CONFIG, program, tmp_path / "whole")
    shorter = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=3))
    train(TASK, shorter, make_program(TASK, shorter), tmp_path / "resumed")
    checkpoints = Checkpoints(tmp_path / "resumed" / "checkpoints", CONFIG.checkpoint)
    saved = checkpoints.restore(3, program.abstract_state)
    checkpoints.close()
    np.testing.assert_allclose(saved.carry["total"], totals(3), rtol=1e-6)
    train(TASK, CONFIG, program, tmp_path / "resumed")
    whole, resumed = (load_params(tmp_path / name / "checkpoints")[0] for name in ("whole", "resumed"))
    np.testing.assert_array_equal(whole["weight"], resumed["weight"])


def test_evaluation_hands_it_on_and_begins_anew_each_time():
    evaluate = make_evaluate(EVALUATOR, make_mesh(MeshConfig()))
    expected = np.mean([(0.3 * totals(step + 1) - 1) ** 2 for step in range(NUM_STEPS)])
    for _ in range(2):
        np.testing.assert_allclose(evaluate({"weight": jnp.full(1, 0.3)})["loss"], expected, rtol=1e-6)


def test_a_state_without_one_has_no_array_for_it():
    assert len(jax.tree.leaves(TrainState(jnp.int32(0), {"w": jnp.zeros(1)}, {}))) == 2
