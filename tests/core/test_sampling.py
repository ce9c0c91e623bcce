"""Drawing tokens: frequencies beside numpy's sorted softmax, and the largest of many numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.decode import row_keys
from core_flax.sampling import Sampling, draw, top_k, top_k_of_rows
from core_flax.types import UserError

V, DRAWS = 200, 20_000


def expected_probs(logits, sampling):
    """Sorted, cut and normalised again by each filter in turn."""
    scores = logits.astype(np.float64) / sampling.temperature
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if sampling.top_k is not None:
        probs[order[sampling.top_k :]] = 0
        probs /= probs.sum()
    if sampling.top_p is not None:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[before >= sampling.top_p]] = 0
        probs /= probs.sum()
    if sampling.min_p is not None:
        probs[probs < sampling.min_p * probs.max()] = 0
        probs /= probs.sum()
    return probs


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=7),
    Sampling(top_p=0.6),
    Sampling(min_p=0.2),
    Sampling(temperature=1.7, top_k=40, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_frequencies_are_those_of_the_filtered_softmax(sampling):
    logits = 1.5 * np.random.default_rng(0).normal(size=V).astype(np.float32)
    drawn = jax.jit(draw, static_argnums=2)(jnp.tile(logits, (DRAWS, 1)), row_keys(1, np.arange(DRAWS)), sampling)
    counts, probs = np.bincount(drawn, minlength=V), expected_probs(logits, sampling)
    assert (counts[probs == 0] == 0).all()
    possible = probs > 0
    expected = DRAWS * probs[possible]
    deviations = (counts[possible] - expected) / np.sqrt(expected * (1 - probs[possible]))
    assert np.abs(deviations).max() < 4.5
    # Chi square over its degrees of freedom: a shape that is a little wrong everywhere shows here.
    freedom = possible.sum() - 1
    assert abs((deviations**2 * (1 - probs[possible])).sum() - freedom) < 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_the_nucleus_is_exact(top_p):
    """Every token of it can come, and no other: seen by drawing from it with all its probabilities made equal."""
    logits = np.random.default_rng(2).normal(size=(4, 31)).astype(np.float32) * [[0.1], [1], [3], [9]]
    found = [set() for _ in logits]
    tokens = jax.vmap(
        lambda number: draw(jnp.asarray(logits), row_keys(number, np.arange(4)), Sampling(1.0, top_p=top_p))
    )
    for row, drawn in enumerate(np.asarray(jax.jit(tokens)(jnp.arange(4000))).T):
        found[row] = set(drawn.tolist())
    for row, values in enumerate(logits):
        probs = expected_probs(values, Sampling(top_p=top_p))
        assert found[row] <= set(np.flatnonzero(probs))
        assert found[row] >= set(np.flatnonzero(probs > 0.005))


def test_no_temperature_is_no_chance():
    logits = np.random.default_rng(0).normal(size=(5, V)).astype(np.float32)
    np.testing.assert_array_equal(draw(logits, None, Sampling(temperature=0.0)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-300])
def test_a_temperature_near_zero_draws_the_best(temperature):
    logits_BV = jax.random.normal(jax.random.key(0), (8, 50))
    drawn_B = draw(logits_BV, row_keys(0, jnp.arange(8)), Sampling(temperature=temperature))
    np.testing.assert_array_equal(drawn_B, jnp.argmax(logits_BV, axis=-1))


@pytest.mark.parametrize(("size", "k"), [(640, 2), (1001, 3), (50, 5), (64, 64), (4096, 10)])
def test_the_largest_of_many(size, k):
    x = np.random.default_rng(size).integers(0, 50, (3, 2, size)).astype(np.float32)  # most of them equal others
    x[0, 0, : size - 1] = -np.inf
    values, indices = top_k(x, k)
    expected = np.argsort(-x, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, -1))


@pytest.mark.parametrize(("size", "k"), [(5, 3), (5, 20), (300, 7), (9000, 7), (9001, 30)])
def test_the_largest_of_several_rows(size, k):
    draw = np.random.default_rng(size)
    x, rows = draw.integers(0, 9, (2, 4, size)).astype(np.float32), draw.integers(0, 20, (2, 4)).astype(np.float32)
    rows[1, 2:] = -np.inf
    columns = np.where(draw.random(size) < 0.3, -np.inf, 0.0).astype(np.float32)
    sums = (x + rows[..., None] + columns).reshape(2, -1)
    values, row, column = top_k_of_rows(jnp.asarray(x), jnp.asarray(rows), jnp.asarray(columns), k)
    expected = np.argsort(-sums, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(values, np.take_along_axis(sums, expected, -1))
    real = np.asarray(values) > -np.inf
    np.testing.assert_array_equal((row * size + column)[real], expected[real])
    assert (column < size).all() and real.any(axis=1).all()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2.0}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong)).replace('_', '-')} "):
        Sampling(**wrong)
