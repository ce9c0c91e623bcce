"""What decoders are made of: rotary positions, grouped queries, the gated network, the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.attention import SelfAttention, causal_mask, dot_product_attention, grouped_query_attention
from core_flax.cache import init_cache, last_token, take_rows
from core_flax.layers import GatedFeedForward, gelu_tanh
from core_flax.rotary import rotate, rotation

B, L, M, D, H, G, K, F = 3, 5, 7, 8, 6, 2, 4, 12


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rotation_is_a_product_with_complex_numbers():
    """Elements i and i + K/2 are real and imaginary part; position p turns them by p * theta^(-2i/K)."""
    x, positions = normal(0, 1, L, H, K), np.array([[0, 1, 5, 900, 2]])
    whole = x[..., : K // 2] + 1j * x[..., K // 2 :]
    angles = positions[0][:, None] * 100.0 ** (-2.0 * np.arange(K // 2) / K)
    expected = whole * np.exp(1j * angles)[None, :, None]
    found = rotate(x, rotation(positions, K, 100.0))
    np.testing.assert_allclose(found, np.concatenate([expected.real, expected.imag], -1), atol=2e-4)
    np.testing.assert_array_equal(found[:, 0], x[:, 0])
    assert rotate(x.astype(jnp.bfloat16), rotation(positions, K)).dtype == jnp.bfloat16


def test_rotated_products_depend_on_the_distance_alone():
    q, k = normal(0, 1, 1, 1, K), normal(1, 1, 1, 1, K)

    def product(at, to):
        turned = (rotate(x, rotation(np.array([[p]]), K)) for x, p in ((q, at), (k, to)))
        return np.vdot(*turned)

    np.testing.assert_allclose([product(9, 4), product(105, 100)], product(5, 0), rtol=1e-4)
    assert abs(product(5, 0) - product(0, 5)) > 1e-2


@pytest.mark.parametrize("mask_rows", [1, B])
def test_grouped_queries_share_repeated_heads(mask_rows):
    q, k, v = normal(0, B, L, H, K), normal(1, B, M, G, K), normal(2, B, M, G, K)
    mask = np.random.default_rng(3).random((mask_rows, 1, L, M)) < 0.6
    mask[..., 0] = True
    expected = dot_product_attention(q, *(np.repeat(x, H // G, axis=2) for x in (k, v)), mask)
    np.testing.assert_allclose(grouped_query_attention(q, k, v, mask), expected, atol=1e-6)


def test_causal_mask_of_packed_rows():
    sequences_BL = np.array([[4, 4, 4, 9, 9], [0, 1, 1, 1, 0]])
    expected = [
        [[b == a and j <= i for j, a in enumerate(row)] for i, b in enumerate(row)] for row in sequences_BL.tolist()
    ]
    np.testing.assert_array_equal(causal_mask(5, sequences_BL), np.array(expected)[:, None])
    np.testing.assert_array_equal(causal_mask(3), np.tri(3, dtype=bool)[None, None])


def test_gated_feed_forward_against_numpy():
    x_BLD, module = normal(0, B, L, D), GatedFeedForward(F, jnp.tanh)
    gate, up, down = normal(1, D, F), normal(2, D, F), normal(3, F, D)
    params = {name: {"kernel": kernel} for name, kernel in (("gate", gate), ("up", up), ("down", down))}
    assert jax.tree.map(jnp.shape, module.init(jax.random.key(0), x_BLD)["params"]) == jax.tree.map(np.shape, params)
    expected = (np.tanh(x_BLD @ gate) * (x_BLD @ up)) @ down
    np.testing.assert_allclose(module.apply({"params": params}, x_BLD), expected, atol=1e-4)


def test_gelu_tanh_by_its_formula():
    x = np.linspace(-6, 6, 241)
    expected = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gelu_tanh(jnp.float32(x)), expected, atol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [G, H])
@pytest.mark.parametrize("use_bias", [False, True])
def test_self_attention_against_numpy(num_kv_heads, use_bias):
    x_BLD, mask = normal(0, B, L, D), np.tri(L, dtype=bool)[None, None]
    module = SelfAttention(H, num_kv_heads, K, use_bias)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x_BLD, mask)
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(tree, [normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])

    def project(name):
        layer = params["params"][name]
        assert ("bias" in layer) == use_bias
        return np.einsum("BLD,DHK->BLHK", x_BLD, layer["kernel"]) + layer.get("bias", 0)

    q, k, v = project("query"), project("key"), project("value")
    k, v = (np.repeat(x, H // num_kv_heads, axis=2) for x in (2 * k, v))
    mixed_BLHK = dot_product_attention(2 * q, k, v, mask)
    out = params["params"]["out"]
    expected = np.einsum("BLHK,HKD->BLD", mixed_BLHK, out["kernel"]) + out.get("bias", 0)
    found, cache = module.apply(params, x_BLD, mask, prepare=lambda heads: 2 * heads)
    assert cache is None
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)


def test_a_cache_holds_each_rows_tokens_in_order():
    cache = init_cache(2, 3, G, M, K, jnp.float32)
    first, second = normal(0, 2, 4, G, K), normal(1, 2, 4, G, K)
    cache = cache.write(1, first, -first).advance(jnp.array([4, 1]))
    np.testing.assert_array_equal(cache.positions(2), [[4, 5], [1, 2]])
    cache = cache.write(1, second, -second)  # of the first row, three find room
    keys, values = (x[1].swapaxes(1, 2) for x in (cache.keys, cache.values))
    np.testing.assert_array_equal(keys[0], np.concatenate([first[0], second[0, :3]]))
    np.testing.assert_array_equal(keys[1], np.concatenate([first[1, :1], second[1], np.zeros((2, G, K))]))
    np.testing.assert_array_equal(values, -keys)
    assert not np.any(cache.keys[0]) and not np.any(cache.values[2])
    expected = [[[slot <= at for slot in range(M)] for at in (start, start + 1)] for start in (4, 1)]
    np.testing.assert_array_equal(cache.mask(2), np.array(expected)[:, None])


@pytest.mark.parametrize("num_read", [1, 4, 7, 13, 16])
def test_a_cache_is_looked_at_as_far_as_it_is_in_use(num_read):
    """Of a forked one: what cannot be in use is not read, and nothing else is left out."""
    rows, forks, room = 2, 3, 16
    cache = init_cache(rows, 1, G, room, K, jnp.float32).fork(forks)
    for number in range(num_read - 1):
        new = (normal(2 * number + each, rows * forks, 1, G, K) for each in range(2))
        cache = cache.write(0, *new).advance(1)
    cache = cache.write(0, normal(90, rows * forks, 1, G, K), normal(91, rows * forks, 1, G, K))
    q, mask = normal(92, rows * forks, 1, G, K), cache.mask(1)
    keys, values = cache.keys[0].swapaxes(1, 2), cache.values[0].swapaxes(1, 2)
    expected = dot_product_attention(q, keys, values, mask)
    in_use = -(-num_read // 4) * 4 * forks
    broken = cache.replace(values=(cache.values[0].at[:, :, in_use:].set(jnp.nan),))
    found = broken.look(0, mask, lambda *given: dot_product_attention(q, *given), 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rows_of_a_cache_and_last_tokens():
    cache = init_cache(2, 1, G, M, K, jnp.float32).write(0, normal(0, 2, M, G, K), normal(1, 2, M, G, K))
    taken = take_rows(cache.advance(jnp.array([2, 5])), jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(taken.num_tokens_B, [5, 5, 2])
    np.testing.assert_array_equal(taken.keys[0], cache.keys[0][np.array([1, 1, 0])])
    x_BLD = normal(2, B, L, D)
    np.testing.assert_array_equal(last_token(x_BLD), x_BLD[:, -1])
    np.testing.assert_array_equal(last_token(x_BLD, jnp.array([2, 0, 5])), [x_BLD[0, 1], x_BLD[1, 0], x_BLD[2, 4]])
