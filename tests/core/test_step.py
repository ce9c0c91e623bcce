"""The step is exact: the same run whatever the microbatches and the mesh, with ragged weights and with dropout."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bert_flax.model import BertConfig, BertForPreTraining
from bert_flax.pretrain import loss_weights, pretraining_sums
from bert_flax.sharding import PARAM_RULES
from core_flax import sharding
from core_flax.config import MeshConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from core_flax.params import ParamRule
from core_flax.program import make_program
from core_flax.state import TrainState
from core_flax.step import first_bad_parameter, gradients, make_train_step, split_microbatches
from core_flax.task import Task

# A tiny BERT

B, L, P, V = 16, 12, 5, 32
MODEL = BertForPreTraining(BertConfig(vocab_size=V, num_layers=2, width=16, num_heads=4, mlp_width=32, max_length=L))
NUM_STEPS = 3


def bert_init(key):
    ids = jnp.zeros((1, L), jnp.int32)
    return MODEL.init(key, ids, ids, ids == 0, ids[:, :P])["params"]


BERT = Task(
    init=bert_init,
    loss_weights=loss_weights,
    loss_sums=lambda params, batch, key: pretraining_sums(MODEL, params, batch, key),
    batches=lambda start, rows: iter(()),
    param_rules=PARAM_RULES,
)


def ragged_batch(step):
    """Rows of 4 to L tokens, of 0 to P predictions, a few without a next-sentence label."""
    draw = np.random.default_rng(step)
    lengths_B, masked_B = draw.integers(4, L + 1, B), draw.integers(0, P + 1, B)
    return {
        "tokens": draw.integers(0, V, (B, L), np.int32),
        "segments": (np.arange(L) >= lengths_B[:, None] // 2).astype(np.int32),
        "valid": np.arange(L) < lengths_B[:, None],
        "masked_positions": draw.integers(0, 4, (B, P), np.int32),
        "masked_tokens": draw.integers(0, V, (B, P), np.int32),
        "masked_weights": (np.arange(P) < masked_B[:, None]).astype(np.float32),
        "next_is_random": draw.integers(0, 2, B, np.int32),
        "example_weights": (draw.random(B) < 0.7).astype(np.float32),
    }


def program_of(num_microbatches, **mesh):
    # With a smaller epsilon Adam would make whole steps of the rounding errors in gradients that are zero (key biases).
    config = RunConfig(
        optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1e-6),
        schedule=ScheduleConfig(name="constant"),
        train=TrainConfig(num_steps=NUM_STEPS, batch_size=B, num_microbatches=num_microbatches),
        mesh=MeshConfig(**mesh),
    )
    num_devices = np.prod([*mesh.values()], dtype=int)
    return make_program(BERT, config, jax.devices()[:num_devices])


@functools.cache
def initial_state():
    return jax.device_get(program_of(1, data=1).init(jax.random.key(0)))


@functools.cache
def run(num_microbatches, **mesh):
    """(HLO of the step, metrics of each step, last parameters)."""
    program = program_of(num_microbatches, **mesh)
    placed = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    state, metrics = jax.device_put(initial_state(), placed), []
    with jax.set_mesh(program.mesh):
        batches = [sharding.place_batch(ragged_batch(step), B, program.mesh) for step in range(NUM_STEPS)]
        # Compiled in a hurry: how XLA places and divides the work stays the same.
        step = program.step.lower(state, batches[0]).compile({"xla_backend_optimization_level": 0})
        for batch in batches:
            state, each = step(state, batch)
            metrics.append(jax.device_get(each))
    return step.as_text(), metrics, jax.device_get(state.params)


def gap(tree, other):
    """Largest difference between two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), tree, other)))


@pytest.mark.parametrize(
    ("num_microbatches", "mesh"),
    [
        (2, {"data": 1}),
        (4, {"data": 1}),
        (1, {"data": 4}),
        (4, {"data": 4}),
        (1, {"fsdp": 4}),
        (1, {"data": 2, "fsdp": 2}),
        (2, {"data": 2, "tensor": 2}),
    ],
)
def test_the_same_run_whatever_the_microbatches_and_the_mesh(num_microbatches, mesh):
    _, expected, params = run(1, data=1)
    _, metrics, other = run(num_microbatches, **mesh)
    for step in range(NUM_STEPS):
        assert metrics[step].keys() == expected[step].keys()
        for name in expected[step]:
            np.testing.assert_allclose(metrics[step][name], expected[step][name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert gap(params, other) < 1e-5
    assert gap(params, initial_state().params) > 2e-3  # it did move


def test_microbatches_add_no_collectives():
    pattern = (
        r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
    )
    whole, split = (Counter(re.findall(pattern, run(n, data=4)[0])) for n in (1, 4))
    assert whole["all-reduce"] > 0 == whole["all-gather"]
    assert split <= whole


def test_these_batches_tell_exact_from_inexact():
    """Half of the rows have other weights than the other half, so a mean of their means is off; dropout matters too."""
    params, batch, key = initial_state().params, ragged_batch(0), jax.random.key(1)
    step = jax.jit(lambda batch, key: gradients(BERT, params, batch, key, 1)[0])

    def means(first):
        half = np.arange(B) % 2 == first
        weights = {name: x * half.reshape(-1, *[1] * (x.ndim - 1)) for name, x in batch.items() if "weights" in name}
        return step(batch | weights, key)

    exact = step(batch, key)
    for other in (jax.tree.map(lambda x, y: (x + y) / 2, means(0), means(1)), step(batch, jax.random.key(2))):
        assert optax.tree.norm(optax.tree.sub(other, exact)) > 0.02 * optax.tree.norm(exact)


# A linear model, small enough to be worked out by hand

LINEAR = Task(
    init=lambda key: {"slope": jnp.zeros(2), "offset": jnp.zeros(())},
    loss_weights=lambda batch: {"fit": jnp.sum(batch["weight"]), "size": jnp.sum(batch["weight"] > 0)},
    loss_sums=lambda params, batch, key: linear_sums(params, batch),
    batches=lambda start, rows: iter(()),
    param_rules=(ParamRule("slope", "head", "small"), ParamRule("offset", "bias", "")),
)


def linear_sums(params, batch):
    error_B = batch["x"] @ params["slope"] + params["offset"] - batch["y"]
    sums = {"fit": jnp.sum(batch["weight"] * error_B**2), "size": jnp.sum((batch["weight"] > 0) * jnp.abs(error_B))}
    return sums, {"mean_error": (jnp.sum(batch["weight"] * error_B), jnp.sum(batch["weight"]))}


def linear_batch():
    draw = np.random.default_rng(0)
    return {"x": draw.normal(size=(8, 2)), "y": draw.normal(size=8), "weight": np.array([3.0, 0, 1, 0, 0.5, 0, 2, 1])}


def linear_step(params, batch, num_microbatches=1):
    optimizer = optax.sgd(0.1)
    step = make_train_step(LINEAR, optimizer, lambda step: 0.1, seed=0, num_microbatches=num_microbatches)
    return jax.jit(step)(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)), batch)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_terms_gradients_and_metrics_are_divided_by_the_weights_of_the_whole_batch(num_microbatches):
    batch, slope, offset = linear_batch(), np.array([0.5, -1.0]), 0.25
    x, y, weight = batch.values()
    error = x @ slope + offset - y
    by_error = 2 * weight * error / weight.sum() + (weight > 0) * np.sign(error) / (weight > 0).sum()
    fit, size = (weight * error**2).sum() / weight.sum(), np.abs(error)[weight > 0].mean()

    state, metrics = linear_step({"slope": slope, "offset": offset}, batch, num_microbatches)
    found = {name: float(metrics[name]) for name in ("fit_loss", "size_loss", "loss", "mean_error", "gradient_norm")}
    gradient = np.array([by_error.sum(), *(by_error @ x)])
    expected = {
        "fit_loss": fit,
        "size_loss": size,
        "loss": fit + size,
        "mean_error": (weight * error).sum() / weight.sum(),
        "gradient_norm": np.linalg.norm(gradient),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(state.params["slope"], slope - 0.1 * gradient[1:], rtol=1e-5)
    np.testing.assert_allclose(state.params["offset"], offset - 0.1 * gradient[0], rtol=1e-5)
    assert state.step == 1 and metrics["learning_rate"] == np.float32(0.1)


def test_a_batch_without_weight_changes_nothing():
    batch = linear_batch() | {"weight": np.zeros(8)}
    params = {"slope": jnp.ones(2), "offset": jnp.ones(())}
    state, metrics = linear_step(params, batch, 2)
    assert metrics["loss"] == metrics["mean_error"] == 0
    assert gap(state.params, params) == 0


def test_microbatches_take_every_nth_row():
    parts = split_microbatches({"x": np.arange(6), "y": np.arange(12).reshape(6, 2)}, 3)
    np.testing.assert_array_equal(parts["x"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(parts["y"][1], [[2, 3], [8, 9]])


def test_randomness_is_a_function_of_seed_and_step():
    """A task whose loss is its random number shows which one each step drew."""

    def draws(seed, step):
        task = Task(
            init=lambda key: {"x": jnp.zeros(())},
            loss_weights=lambda batch: {"draw": jnp.ones(())},
            loss_sums=lambda params, batch, key: ({"draw": jax.random.uniform(key) + 0 * params["x"]}, {}),
            batches=lambda start, rows: iter(()),
            param_rules=(ParamRule("x", "bias", ""),),
        )
        train_step = make_train_step(task, optax.identity(), lambda step: 0.0, seed)
        _, metrics = train_step(TrainState(jnp.int32(step), task.init(None), optax.EmptyState()), {"x": jnp.zeros(2)})
        return float(metrics["loss"])

    assert draws(0, 5) == draws(0, 5)
    assert len({draws(seed, step) for seed in (0, 1) for step in (0, 1, 2)}) == 6


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({}, None),
        ({"y": np.nan}, "offset"),  # both gradients are NaN
        ({"x": 3e38, "y": -100}, "slope"),  # the error is finite, its product with x is not
    ],
)
def test_the_first_parameter_whose_gradient_is_not_finite(bad, named):
    batch = linear_batch()
    for name, value in bad.items():
        batch[name].flat[0] = value
    state, metrics = linear_step({"slope": jnp.zeros(2), "offset": jnp.zeros(())}, batch)
    assert first_bad_parameter(state.params, metrics["gradient_squares"]) == named
