"""On a CPU, attention takes rows in groups whose scores its caches hold; values and gradients stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax import attention
from core_flax.attention import attend
from core_flax.kernels import Mask, causal, packed
from core_flax.layers import Drop

B, L, H, G, K = 6, 8, 4, 2, 4
SEQUENCES = jnp.asarray(np.random.default_rng(0).integers(1, 3, (B, L)))
MASKS = {"none": None, "one for all": causal(), "each its own": packed(SEQUENCES)}


def arrays(num_kv_heads=H, batch_size=B):
    draws = np.random.default_rng(1)
    heads = (H, num_kv_heads, num_kv_heads)
    return [draws.normal(size=(batch_size, L, each, K)).astype(np.float32) for each in heads]


def results(mask, qkv, rate, scores, monkeypatch):
    """Value and gradients with room for so many scores, and how many rows were taken at once."""
    monkeypatch.setattr(attention, "CACHED_SCORES", scores)
    taken = []
    plainly = attention._attend_plainly
    monkeypatch.setattr(attention, "_attend_plainly", lambda q, *rest: (taken.append(len(q)), plainly(q, *rest))[1])
    # The numbers of rows are those of a part of a batch.
    drop = Drop(jax.random.key(3), jnp.arange(len(qkv[0])) + 5, rate) if rate else None

    def loss(*qkv):
        out = attend(*qkv, mask, drop)
        return (out**2).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    monkeypatch.undo()
    return [out, *gradients], set(taken)


@pytest.mark.parametrize(("mask", "num_kv_heads"), [("none", H), *((name, n) for name in [*MASKS][1:] for n in (H, G))])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_groups_of_rows_equal_all_rows(mask, rate, num_kv_heads, monkeypatch):
    qkv, mask = arrays(num_kv_heads), MASKS[mask]
    whole, taken = results(mask, qkv, rate, B * H * L * L, monkeypatch)
    assert taken == {B}
    for rows, expected in ((3, 3), (5, 3), (2, 2), (0, 2)):
        parts, taken = results(mask, qkv, rate, rows * H * L * L, monkeypatch)
        assert taken == {expected}
        for part, each in zip(parts, whole, strict=True):
            np.testing.assert_allclose(part, each, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_rows_that_do_not_divide_are_taken_at_once(batch_size, monkeypatch):
    _, taken = results(None, arrays(batch_size=batch_size), 0.0, 0, monkeypatch)
    assert taken == {batch_size}


def test_rows_on_several_devices_are_taken_at_once(monkeypatch):
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        _, taken = results(Mask(causal=True), arrays(), 0.0, 0, monkeypatch)
    assert taken == {B}
