"""Layers, attention and losses against numpy; dropout against the statistics it should have."""

import math
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.attention import MultiHeadAttention, dot_product_attention, padding_mask
from core_flax.layers import (
    SMALL,
    Dropout,
    FeedForward,
    Linear,
    gelu,
    layers_per_turn,
    linear,
    materialised,
    remat,
    row_bits,
)
from core_flax.losses import cross_entropy_sums

B, L, M, D, H, K, F, C = 3, 5, 7, 8, 2, 4, 12, 6


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Dropout. Bounds are five standard deviations of what independent bits would give.

RATE = 0.1
NUM_ROWS, SHAPE = 8, (2, 32, 64)


def dropped(step):
    """1 where an element is dropped, [NUM_ROWS, *SHAPE]; the key is made as a training step makes it."""
    rngs = {"dropout": jax.random.fold_in(jax.random.key(0), step)}
    kept = Dropout(RATE).apply({}, jnp.ones((NUM_ROWS, *SHAPE)), deterministic=False, rngs=rngs)
    return (np.asarray(kept) == 0).astype(np.float64)


@pytest.fixture(scope="module")
def masks():
    return np.stack([dropped(step) for step in range(4)])


def test_dropout_drops_its_rate_and_scales_the_rest():
    x = 1 + np.abs(normal(0, NUM_ROWS, *SHAPE))
    y = np.asarray(Dropout(0.3).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)}))
    np.testing.assert_allclose(y[y != 0], x[y != 0] / 0.7, rtol=1e-6)
    assert abs((y == 0).mean() - 0.3) < 5 * (0.3 * 0.7 / y.size) ** 0.5
    assert abs(y.mean() / x.mean() - 1) < 0.02
    np.testing.assert_array_equal(Dropout(0.3).apply({}, x), x)


@pytest.mark.parametrize("dim", range(5))
def test_dropout_drops_as_much_everywhere(masks, dim):
    """Counts over every slice of the dim (keys, rows, then the dims of a row) are those of independent draws."""
    counts = masks.sum(axis=tuple(other for other in range(5) if other != dim))
    each = masks.size / counts.size
    chi_square = ((counts - RATE * each) ** 2 / (RATE * (1 - RATE) * each)).sum()
    assert abs(chi_square - counts.size) < 5 * (2 * counts.size) ** 0.5


def test_dropout_of_keys_and_rows_is_uncorrelated(masks):
    correlation = np.corrcoef(masks.reshape(4 * NUM_ROWS, -1)) - np.eye(4 * NUM_ROWS)
    assert np.abs(correlation).max() < 5 / np.prod(SHAPE) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 31, 32, 63, 64, 65, 1024, 2048])
def test_dropout_of_elements_is_uncorrelated(masks, lag):
    x = masks.reshape(4, NUM_ROWS, -1) - RATE
    products = x[..., lag:] * x[..., :-lag]
    assert abs(products.mean()) < 5 * RATE * (1 - RATE) / products.size**0.5


def test_dropout_bits_are_uniform():
    bits = np.asarray(row_bits(jax.random.key(3), jnp.arange(4), (64, 64)))
    for shift in (0, 8, 16, 24):
        counts = np.bincount((bits.ravel() >> shift) & 255, minlength=256)
        chi_square = ((counts - bits.size / 256) ** 2 / (bits.size / 256)).sum()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
        assert len(np.unique(bits)) > 0.99 * bits.size


def test_no_two_rows_share_a_stretch():
    """Rows that walked one sequence from different places would, among as many rows as these, meet a few times."""
    bits = np.asarray(row_bits(jax.random.key(0), jnp.arange(2**13), (256,))).astype(np.uint64)
    pairs = (bits[:, 1:] << np.uint64(32)) | bits[:, :-1]
    assert len(np.unique(pairs)) == pairs.size


def test_a_row_drops_the_same_in_whatever_batch_it_is():
    x, rngs = jnp.ones((NUM_ROWS, *SHAPE)), {"dropout": jax.random.key(5)}
    whole = Dropout(RATE).apply({}, x, deterministic=False, rngs=rngs)
    rows = jnp.array([6, 1, 3])
    part = Dropout(RATE).apply({}, x[rows], row_B=rows, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(part, whole[rows])


def test_dropout_drops_the_same_going_backward():
    x, rngs = jnp.ones((NUM_ROWS, *SHAPE)), {"dropout": jax.random.key(5)}
    y, pull = jax.vjp(lambda x: Dropout(RATE).apply({}, x, deterministic=False, rngs=rngs), x)
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], y)


# Linear maps


def test_linear_is_the_matrix_it_stands_for():
    x_BLHK, kernel_HKD, bias_D = normal(0, B, L, H, K), normal(1, H, K, D), normal(2, D)
    y_BLD = Linear((D,), num_inputs=2).apply({"params": {"kernel": kernel_HKD, "bias": bias_D}}, x_BLHK)
    expected = x_BLHK.reshape(B, L, H * K) @ kernel_HKD.reshape(H * K, D) + bias_D
    np.testing.assert_allclose(y_BLD, expected, atol=1e-5)


def test_linear_starts_from_what_the_initializer_gives_the_matrix():
    x_BHK = jnp.ones((1, 16, 32))
    kernel = Linear((8, 64), num_inputs=2).init(jax.random.key(0), x_BHK)["params"]["kernel"]
    assert kernel.shape == (16, 32, 8, 64)
    np.testing.assert_allclose(kernel.std(), (16 * 32) ** -0.5, rtol=0.02)  # lecun: 1 / sqrt(inputs)

    init = nn.initializers.truncated_normal(0.02)
    kernel = Linear((8, 64), num_inputs=2, kernel_init=init).init(jax.random.key(0), x_BHK)["params"]["kernel"]
    assert 0.039 < abs(kernel).max() <= 0.04  # cut at two standard deviations, which leaves 0.88 of the deviation
    np.testing.assert_allclose(kernel.std(), 0.02 * 0.8796, rtol=0.02)


def test_gelu_by_the_definition():
    x = np.linspace(-6, 6, 241)
    expected = [0.5 * each * (1 + math.erf(each / 2**0.5)) for each in x]
    np.testing.assert_allclose(gelu(jnp.float32(x)), expected, atol=1e-6)


# Attention


def attention_numpy(q_BLHK, k_BMHK, v_BMHK, mask_BHLM):
    mixed_BLHK = np.zeros_like(q_BLHK)
    for b, i, h in np.ndindex(q_BLHK.shape[:3]):
        scores_M = k_BMHK[b, :, h] @ q_BLHK[b, i, h] / np.sqrt(q_BLHK.shape[-1])
        probs_M = np.exp(scores_M - scores_M.max()) * mask_BHLM[b, h, i]
        mixed_BLHK[b, i, h] = probs_M / probs_M.sum() @ v_BMHK[b, :, h]
    return mixed_BLHK


PADDING = np.arange(M) < np.array([7, 3, 1])[:, None]
MASKS = {
    "none": None,
    "padding": padding_mask(PADDING),
    "causal": (np.arange(M) <= np.arange(L)[:, None])[None, None],
    "each": np.random.default_rng(0).random((B, H, L, M)) < 0.5,
}
MASKS["each"][..., 0] = True


@pytest.mark.parametrize("mask", MASKS)
def test_attention_against_numpy(mask):
    q, k, v = 2 * normal(0, B, L, H, K), 2 * normal(1, B, M, H, K), normal(2, B, M, H, K)
    where = np.broadcast_to(True if MASKS[mask] is None else MASKS[mask], (B, H, L, M))
    expected = attention_numpy(q, k, v, where)
    np.testing.assert_allclose(dot_product_attention(q, k, v, MASKS[mask]), expected, atol=1e-5)
    half = dot_product_attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), MASKS[mask])
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=0.05)


def test_a_query_that_may_look_nowhere_gets_the_mean_and_no_nan():
    q, k, v = normal(0, B, L, H, K), normal(1, B, M, H, K), normal(2, B, M, H, K)
    mask = np.zeros((B, 1, 1, M), bool)
    y, pull = jax.vjp(lambda *qkv: dot_product_attention(*qkv, mask), q, k, v)
    np.testing.assert_allclose(y, np.broadcast_to(v.mean(axis=1, keepdims=True), y.shape), atol=1e-6)
    assert all(np.isfinite(x).all() for x in pull(y))


@pytest.mark.parametrize("to", ["memory", "self"])
def test_multi_head_attention_against_numpy(to):
    memory_BMD = normal(1, B, M, D)
    x_BLD = normal(0, B, L, D) if to == "memory" else memory_BMD
    module = MultiHeadAttention(H)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BLD, memory_BMD, None)
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(tree, [normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])

    def project(name, x):
        kernel_DHK, bias_HK = params["params"][name]["kernel"], params["params"][name]["bias"]
        return np.einsum("BLD,DHK->BLHK", x, kernel_DHK) + bias_HK

    qkv = project("query", x_BLD), project("key", memory_BMD), project("value", memory_BMD)
    mixed_BLHK = attention_numpy(*qkv, np.broadcast_to(MASKS["padding"], (B, H, x_BLD.shape[1], M)))
    out = params["params"]["out"]
    expected = np.einsum("BLHK,HKD->BLD", mixed_BLHK, out["kernel"]) + out["bias"]
    np.testing.assert_allclose(module.apply(params, x_BLD, memory_BMD, MASKS["padding"]), expected, atol=1e-4)


def test_attention_dropout_drops_probabilities():
    """Each value counts by its probability, doubled or dropped, and nothing is normalised again."""
    q, k, v, keep = normal(0, B, L, H, K), normal(1, B, M, H, K), normal(2, B, M, H, K), MASKS["each"]
    probs_BHLM = jax.nn.softmax(np.einsum("BLHK,BMHK->BHLM", q, k) / K**0.5)
    expected = np.einsum("BHLM,BMHK->BLHK", 2 * probs_BHLM * keep, v)
    y = dot_product_attention(q, k, v, None, lambda probs_BHLM: 2 * probs_BHLM * keep)
    np.testing.assert_allclose(y, expected, atol=1e-5)


# Rematerialisation


class Block(nn.Module):
    @nn.compact
    def __call__(self, x_BLD, mask, row_B, deterministic):
        x_BLD += MultiHeadAttention(H, RATE)(x_BLD, x_BLD, mask, row_B=row_B, deterministic=deterministic)
        x_BLD += Dropout(RATE)(FeedForward(F, gelu)(x_BLD), row_B=row_B, deterministic=deterministic)
        return nn.LayerNorm()(x_BLD), None


@pytest.mark.parametrize("unroll", [1, 2])
def test_remat_changes_no_value(unroll):
    x_BLD, mask = normal(0, B, M, D), MASKS["padding"]

    def stack(policy):
        scan = nn.scan(
            remat(Block, policy, unroll),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=2,
            unroll=unroll,
        )
        module = scan()

        def loss(variables):
            y_BLD, _ = module.apply(variables, x_BLD, mask, jnp.arange(B), False, rngs={"dropout": jax.random.key(1)})
            return jnp.sum(y_BLD * normal(9, B, M, D))

        return module, jax.value_and_grad(loss)

    params = stack("none")[0].init(jax.random.key(0), x_BLD, mask, None, True)
    programs = [jax.jit(stack(policy)[1]).lower(params).compile() for policy in ("none", "elementwise", "block")]
    expected, *others = (program(params) for program in programs)
    for other in others:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), other, expected)

    # And it does compute again: elementwise no matrix product but the softmax, block both.
    texts = [str(jax.make_jaxpr(stack(policy)[1])(params)) for policy in ("none", "elementwise", "block")]
    products, exps = ([len(re.findall(rf"= {name}\b", text)) for text in texts] for name in ("dot_general", "exp"))
    assert products[0] == products[1] < products[2]
    assert exps[0] < exps[1] == exps[2]
    # XLA too: it has not found out that it did so before.
    none, elementwise, block = (program.as_text().count(" exponential(") for program in programs)
    assert none < elementwise == block


# Losses


def test_cross_entropy_sums_against_numpy():
    logits, weights = 3 * normal(0, B, L, C), np.abs(normal(1, B, L))
    labels = np.random.default_rng(2).integers(0, C, (B, L))
    weights[0, :2] = 0
    labels[1] = logits[1].argmax(-1)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    onehot = np.eye(C)[labels]
    (loss, correct), pull = jax.vjp(lambda logits: cross_entropy_sums(logits, labels, weights), logits)
    (grad,) = pull((jnp.ones(()), jnp.zeros(())))
    np.testing.assert_allclose(loss, -(weights[..., None] * onehot * log_probs).sum(), rtol=1e-5)
    np.testing.assert_allclose(correct, (weights * (logits.argmax(-1) == labels)).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad, weights[..., None] * (np.exp(log_probs) - onehot), atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1.0, 1.0, 0.0], np.log(2 + np.exp(-1))),  # a tie is no prediction
        ([-1e4, 1e4, 0.0], 2e4),
    ],
)
def test_cross_entropy_of_ties_large_logits_and_bfloat16(logits, expected):
    logits = jnp.array(logits, jnp.bfloat16)
    loss, correct = cross_entropy_sums(logits, jnp.array(0), jnp.array(0.5, jnp.bfloat16))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected / 2, rtol=2e-3 if expected > 1e3 else 1e-6)  # 1e4 is rounded to bfloat16
    assert correct == 0


# bfloat16 on a CPU.


@pytest.mark.parametrize(("inputs", "features"), [((D,), (H, K)), ((H, K), (D,))])
def test_bfloat16_products_of_a_cpu_are_those_of_others(inputs, features):
    """Sums in float32, then rounded: within a rounding, of each sum and of what the tested product is made of."""
    x = jnp.asarray(normal(0, B, L, *inputs), jnp.bfloat16)
    kernel = jnp.asarray(normal(1, *inputs, *features), jnp.bfloat16)
    weight = jnp.asarray(normal(2, B, L, *features), jnp.bfloat16)

    def sums(product):
        return jax.vjp(product, x, kernel)[1](weight)

    on_cpu = partial(linear, num_inputs=len(inputs))
    for found, wanted in zip((on_cpu(x, kernel), *sums(on_cpu)), exact(x, kernel, weight, len(inputs)), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=1e-6)


def exact(x, kernel, weight, num_inputs):
    """The product and both gradients, in float64."""
    shape, (x, kernel, weight) = kernel.shape, (np.asarray(each, np.float64) for each in (x, kernel, weight))
    x_ND, weight_NF = x.reshape(B * L, -1), weight.reshape(B * L, -1)
    kernel_DF = kernel.reshape(x_ND.shape[1], -1)
    product = (x_ND @ kernel_DF).reshape(weight.shape)
    return product, (weight_NF @ kernel_DF.T).reshape(x.shape), (x_ND.T @ weight_NF).reshape(shape)


def test_bfloat16_products_of_a_cpu_have_operands_in_bfloat16():
    """Of two bfloat16 numbers, with a result in float32: what the CPU's instructions are for."""
    x, kernel = jnp.ones((B, L, D), jnp.bfloat16), jnp.ones((D, F), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda *args: linear(*args).astype(jnp.float32).sum(), argnums=(0, 1)))
    products = [line for line in step.lower(x, kernel).as_text().splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert all(re.search(r"\(tensor<\S+xbf16>, tensor<\S+xbf16>\) -> tensor<\S+xf32>", line) for line in products)


def test_layers_per_turn_on_a_cpu():
    """All of them, if nothing else is asked for."""
    assert [layers_per_turn(None, 12), layers_per_turn(3, 12)] == [12, 3]


def test_materialised_is_the_identity():
    """Values and gradients are handed on bit for bit, whatever stands in the first place."""
    x = np.random.default_rng(0).standard_normal((2, SMALL)).astype(np.float32)
    for first in (0.5, -0.0, 0.0, np.inf, -np.inf, np.nan):
        x[0, :2] = first, -0.0
        value, pull = jax.vjp(jax.jit(materialised), jnp.asarray(x))
        np.testing.assert_array_equal(np.asarray(value).view(np.uint32), x.view(np.uint32))
        np.testing.assert_array_equal(np.asarray(pull(jnp.asarray(x))[0]).view(np.uint32), x.view(np.uint32))


def test_materialised_keeps_sums_apart():
    """XLA has a conditional where the hidden states are added up, and none where they are few."""

    def compiled(size: int) -> str:
        return jax.jit(lambda x: jnp.tanh(materialised(x + 1.0))).lower(jnp.ones(size)).compile().as_text()

    assert "conditional(" in compiled(SMALL)
    assert "conditional(" not in compiled(SMALL - 1)


def test_materialised_leaves_split_arrays_alone():
    """With rows on several devices nothing is done: the choice would be made by an element of one of them."""
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))):
        assert "cond" not in str(jax.make_jaxpr(materialised)(jnp.ones(SMALL)))
