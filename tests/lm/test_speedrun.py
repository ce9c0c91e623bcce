"""The architecture that learns fast against its definition in NumPy; its cache, its cap, its table of parameters."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tokens

from core_flax.losses import vocabulary_sums
from core_flax.params import leaves, rule_for
from core_flax.types import UserError
from lm_flax.architectures import init_params, soft_cap
from lm_flax.sharding import SPEEDRUN_RULES
from lm_flax.speedrun import Speedrun, SpeedrunConfig

CONFIG = SpeedrunConfig(
    vocab_size=61, num_layers=2, width=16, num_heads=2, mlp_width=24, max_length=12, soft_cap=2.0, rope_theta=50.0
)
MODEL = Speedrun(CONFIG)
PARAMS = jax.tree.map(
    lambda x: 0.3 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
    jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0))),
)
IDS = tokens(2, 9)


def norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def turned(x_LHK):
    """Pairs (i, i + K / 2) as complex numbers, turned by position times speed."""
    length, _, width = x_LHK.shape
    half = width // 2
    speeds = CONFIG.rope_theta ** (-np.arange(half) * 2 / width)
    z = (x_LHK[..., :half] + 1j * x_LHK[..., half:]) * np.exp(1j * np.arange(length)[:, None, None] * speeds)
    return np.concatenate([z.real, z.imag], -1)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def squared_relu(x):
    return np.maximum(x, 0) ** 2


def reference(ids_L, activation):
    """Logits [L, V] in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
    x_LD, layers = norm(params["token"]["embedding"][ids_L]), params["layers"]
    allowed = np.tril(np.ones((len(ids_L), len(ids_L)), bool))
    for layer in range(CONFIG.num_layers):
        kernels = {name: value["kernel"][layer] for name, value in layers["attention"].items()}
        q, k, v = (np.einsum("LD,DHK->LHK", norm(x_LD), kernels[name]) for name in ("query", "key", "value"))
        scores = np.einsum("LHK,MHK->HLM", turned(norm(q)), turned(norm(k))) / np.sqrt(CONFIG.head_width)
        weights = np.where(allowed, np.exp(scores), 0)
        mixed = np.einsum("HLM,MHK->LHK", weights / weights.sum(-1, keepdims=True), v)
        x_LD = x_LD + np.einsum("LHK,HKD->LD", mixed, kernels["out"])
        hidden = activation(norm(x_LD) @ layers["up"]["kernel"][layer])
        x_LD = x_LD + hidden @ layers["down"]["kernel"][layer]
    logits = norm(x_LD) @ params["head"]["embedding"].T
    return CONFIG.soft_cap * np.tanh(logits / CONFIG.soft_cap)


@partial(jax.jit, static_argnames="model")
def forward(params, ids, model=MODEL):
    x_BLD = model.apply({"params": params}, ids)
    return x_BLD, model.apply({"params": params}, x_BLD, method="logits")


@pytest.mark.parametrize("activation", [gelu, squared_relu], ids=lambda each: each.__name__)
def test_logits_are_those_of_the_definition(activation):
    model = Speedrun(dataclasses.replace(CONFIG, activation=activation.__name__))
    for ids, logits in zip(IDS, forward(PARAMS, IDS, model)[1], strict=True):
        np.testing.assert_allclose(logits, reference(ids, activation), atol=2e-5)


def test_reading_piece_by_piece_is_reading_at_once():
    cache = MODEL.init_cache(2, 9)
    read = jax.jit(lambda ids, cache: MODEL.apply({"params": PARAMS}, ids, cache, method="extend"))
    parts = []
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        x_BLD, cache = read(IDS[:, start:stop], cache)
        parts.append(x_BLD)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), forward(PARAMS, IDS)[0], atol=2e-5)


def test_the_loss_in_chunks_is_that_of_the_capped_logits():
    x_BLD, logits = forward(PARAMS, IDS[:, :-1])
    told = jax.nn.log_softmax(logits)
    wanted = -np.take_along_axis(np.asarray(told), IDS[:, 1:, None], axis=2).sum()
    table, ones = MODEL.output_table(PARAMS), jnp.ones((2, 8))
    sums = vocabulary_sums(x_BLD, table, IDS[:, 1:], ones, num_chunks=3, soft_cap=soft_cap(CONFIG))
    np.testing.assert_allclose(sums.cross_entropy, wanted, rtol=1e-5)


def test_it_begins_knowing_nothing():
    """Zero-initialised projections and output layer: every block is the identity, every token as likely."""
    params = init_params(MODEL, jax.random.key(1))
    x_BLD, logits = forward(params, IDS)
    np.testing.assert_array_equal(logits, 0)
    embedded = params["token"]["embedding"][IDS]
    np.testing.assert_allclose(x_BLD, norm(norm(embedded)), atol=1e-5)


def test_every_parameter_has_one_rule_and_wrong_sizes_are_refused():
    for path, _ in leaves(PARAMS):
        rule_for(path, SPEEDRUN_RULES)
    with pytest.raises(UserError, match="heads of even width"):
        dataclasses.replace(CONFIG, num_heads=16)
