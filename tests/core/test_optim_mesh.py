"""Each optimizer ends at the same parameters whatever the mesh: the trust ratios, factors and orthogonalised matrices
are those of whole layers, however these are split.

The model is small but has every kind of parameter, and none without effect: Lion steps by signs, and the sign of a
gradient that is zero but for rounding, as those of BERT's key biases are, is anything.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax import optim, sharding
from core_flax.config import MeshConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from core_flax.losses import cross_entropy_sums
from core_flax.params import ParamRule, leaves
from core_flax.program import make_program
from core_flax.task import Task

B, D, H, K, F, V, N, C, STEPS = 16, 16, 4, 8, 24, 20, 2, 8, 3
SHAPES = {
    "token": (V, D),
    "layers": {"norm": (N, D), "query": (N, D, H, K), "out": (N, H, K, D), "up": (N, D, F), "up_bias": (N, F)}
    | {"down": (N, F, D)},
    "head": (D, C),
}
RULES = (
    ParamRule("token", "embedding", "vocab table_width"),
    ParamRule("layers/norm", "norm", "layer width"),
    ParamRule("layers/query", "matrix", "layer embed | heads head_width"),
    ParamRule("layers/out", "matrix", "layer heads head_width | embed"),
    ParamRule("layers/up", "matrix", "layer embed | mlp"),
    ParamRule("layers/up_bias", "bias", "layer mlp"),
    ParamRule("layers/down", "matrix", "layer mlp | embed"),
    ParamRule("head", "head", "embed | small"),
)
LEARNING_RATES = {"adamw": 1e-3, "lamb": 0.03, "adafactor": 0.03, "lion": 1e-3, "muon": 3e-3, "sgd": 1.0}
"""LAMB's and Adafactor's are shares of the parameters: so every optimizer moves them by about a thousandth a step."""


@pytest.fixture(autouse=True)
def small_matrices_factor(monkeypatch):
    monkeypatch.setattr(optim, "MIN_FACTORED_DIM", 5)


def start():
    """Parameters of RMS 0.1, and norms around 1."""
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: 0.1 * draw.standard_normal(shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    params["layers"]["norm"] += 1.0
    return params


def loss_sums(params, batch, key):
    def block(x_BD, layer):
        mixed_BHK = jnp.tanh(jnp.einsum("BD,DHK->BHK", x_BD * layer["norm"], layer["query"]))
        x_BD += jnp.einsum("BHK,HKD->BD", sharding.constrain(mixed_BHK, "batch", "heads", "head_width"), layer["out"])
        return x_BD + jnp.tanh(x_BD @ layer["up"] + layer["up_bias"]) @ layer["down"], None

    x_BD, _ = jax.lax.scan(block, params["token"][batch["token"]], params["layers"])
    loss, correct = cross_entropy_sums(x_BD @ params["head"], batch["label"], batch["weight"])
    return {"label": loss}, {"accuracy": (correct, batch["weight"].sum())}


TASK = Task(
    init=lambda key: jax.tree.map(jnp.asarray, start()),
    loss_weights=lambda batch: {"label": batch["weight"].sum()},
    loss_sums=loss_sums,
    batches=lambda start, rows: iter(()),
    param_rules=RULES,
)


def make_batch(step):
    draw = np.random.default_rng(step)
    return {
        "token": draw.integers(0, V, B, np.int32),
        "label": draw.integers(0, C, B, np.int32),
        "weight": draw.random(B, np.float32),
    }


@functools.cache
def run(name, **mesh):
    """(last parameters, loss of each step)."""
    # With a smaller epsilon Adam would make whole steps of the rounding errors in gradients that are nearly zero.
    epsilon = 1e-6 if name in ("adamw", "muon") else None
    config = RunConfig(
        optimizer=OptimizerConfig(name=name, learning_rate=LEARNING_RATES[name], epsilon=epsilon),
        schedule=ScheduleConfig(name="constant"),
        train=TrainConfig(num_steps=STEPS, batch_size=B),
        mesh=MeshConfig(**mesh),
    )
    program = make_program(TASK, config, jax.devices()[: np.prod([*mesh.values()])])
    losses = []
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        batches = [sharding.place_batch(make_batch(step), B, program.mesh) for step in range(STEPS)]
        # Compiled in a hurry: how XLA places and divides the work stays the same.
        step = program.step.lower(state, batches[0]).compile({"xla_backend_optimization_level": 0})
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return jax.device_get(state.params), losses


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "zero1": True}])
@pytest.mark.parametrize("name", optim.DEFAULTS)
def test_the_same_parameters_whatever_the_mesh(name, mesh):
    last, losses = run(name, data=1)
    other, other_losses = run(name, **mesh)
    np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-5)
    for (path, x), (_, y), (_, first) in zip(leaves(last), leaves(other), leaves(start()), strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5, err_msg=path)
        assert np.abs(x - first).max() > 1e-3, f"{path} hardly moved, so 1e-5 says nothing"
