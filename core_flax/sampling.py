"""Choosing the next token by chance: temperature, top-k, top-p, min-p; and the largest of many numbers, quickly."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from core_flax.config import check_range
from core_flax.types import Array

_BLOCK = 64
"""Scores looked at together, where only a few of very many matter."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the filters apply in the order of the fields, each to what the one before has left."""

    temperature: float = 1.0
    """What scores are divided by before they become probabilities; 0: no chance, always the most probable token."""
    top_k: int | None = None
    """Draw from this many most probable tokens; None: from all."""
    top_p: float | None = None
    """Draw from the fewest tokens whose probabilities sum to at least this (Holtzman et al. 2020, arXiv 1904.09751),
    and from those as probable as the last of them; None: from all."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the probability of the most probable one (Nguyen et al. 2024, arXiv
    2407.01082); None: from all."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "temperature", least=0)
        check_range("", self, "top_k", least=1)
        check_range("", self, "top_p", above=0, most=1)
        check_range("", self, "min_p", least=0, most=1)


GREEDY = Sampling(temperature=0.0)
SMALLEST = float(jnp.finfo(jnp.float32).tiny)
"""A temperature below it is taken for it: float32 would make it 0, and 0 / 0 is no number."""


def draw(logits_BV: Array, keys_B: Array, sampling: Sampling) -> Array:
    """Tokens [B], row by row: what is drawn depends on the row's logits and key alone.

    Args:
      logits_BV: float32; -inf for tokens that must not come.
      keys_B: jax.random keys; with temperature 0 nothing depends on them.
      sampling: how.
    """
    if sampling.temperature == 0:
        return top_k(logits_BV, 1)[1][:, 0]
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)  # 0 for the best, whatever divides it
    scores, tokens = below_BV / max(sampling.temperature, SMALLEST), None
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        scores, tokens = top_k(scores, sampling.top_k)
    probs = jnp.exp(scores)
    probs = jnp.where(_kept(probs, sampling), probs, 0.0)
    places = jax.vmap(_categorical)(keys_B, probs)
    return places if tokens is None else jnp.take_along_axis(tokens, places[:, None], axis=1)[:, 0]


def _kept(probs: Array, sampling: Sampling) -> Array:
    """Which of the probabilities [B, V], of which the largest is 1, top-p and min-p keep."""
    kept = jnp.ones(probs.shape, bool)
    if sampling.top_p is not None:
        kept = probs >= _nucleus(probs, sampling.top_p)[:, None]
    return kept if sampling.min_p is None else kept & (probs >= sampling.min_p)


def _nucleus(probs: Array, top_p: float) -> Array:
    """The largest number [B] such that the probabilities not below it have the share ``top_p`` of the whole.

    By bisection on the bits of the number: floats that are not negative are ordered as the integers with their bits.
    That is exact after 31 passes over the probabilities, which on accelerators and CPUs take less time than to sort.
    """
    wanted = top_p * jnp.sum(probs, axis=-1)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough lies above the one, and too little above the other
        middle = low + (high - low) // 2
        number = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(probs >= number[:, None], probs, 0.0), axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    above = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
    bounds = jnp.zeros(len(probs), jnp.int32), jnp.full(len(probs), above)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[0], jnp.float32)


def _categorical(key: Array, weights_V: Array) -> Array:
    """An index drawn in proportion to the weights: first its block, then its place there.

    Two random numbers, while jax.random.categorical takes one for each of V, which on a CPU costs as much as a model.
    """
    weights = jnp.pad(weights_V, (0, -len(weights_V) % _BLOCK)).reshape(-1, _BLOCK)
    chances = jax.random.uniform(key, (2,))
    block = _inverse(jnp.cumsum(jnp.sum(weights, axis=1)), chances[0])
    return (block * _BLOCK + _inverse(jnp.cumsum(weights[block]), chances[1])).astype(jnp.int32)


def _inverse(sums: Array, chance: Array) -> Array:
    """The first index whose sum exceeds this share of the last one."""
    return jnp.sum(sums <= chance * sums[-1])


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The k largest of x [..., V] and their indices, largest first, the lower index first where they are equal.

    As jax.lax.top_k of floats, which on a CPU takes longer for one row of a vocabulary than a small model.
    """
    assert jnp.issubdtype(x.dtype, jnp.floating) and k <= x.shape[-1]
    rows = x.reshape(-1, 1, x.shape[-1])
    nothing = jnp.zeros_like(rows[..., 0]), jnp.zeros_like(rows[0, 0])
    values, _, indices = top_k_of_rows(rows, *nothing, k)
    return values.reshape(*x.shape[:-1], -1), indices.reshape(*x.shape[:-1], -1)


def top_k_of_rows(x_BKV: Array, row_BK: Array, column_V: Array, k: int) -> tuple[Array, Array, Array]:
    """The k largest of x + row_BK + column_V among K rows together: (values, rows, columns), each [B, k], in order.

    Where they are equal the lower row comes first, then the lower column. The k largest lie in the k blocks with the
    largest maxima, so that most of the work is to find maxima, and nothing as large as x is written.
    """
    (batch_size, num_rows, size), dtype = x_BKV.shape, x_BKV.dtype
    width = size
    if num_rows * size >= 4 * k * _BLOCK:
        # Blocks that come out even need no copy.
        width = max((each for each in range(_BLOCK // 2, 2 * _BLOCK) if size % each == 0), default=_BLOCK)
    padding = -size % width
    if padding:
        x_BKV = jnp.pad(x_BKV, ((0, 0), (0, 0), (0, padding)))
        column_V = jnp.pad(column_V, (0, padding), constant_values=-jnp.inf)
    columns = column_V.astype(dtype).reshape(-1, width)
    blocks, num_blocks = x_BKV.reshape(batch_size, num_rows, -1, width), len(columns)
    maxima = (jnp.max(blocks + columns, axis=-1) + row_BK[..., None]).reshape(batch_size, -1)
    best = jax.lax.top_k(maxima, min(k, maxima.shape[1]))[1]
    best = jnp.sort(best, axis=-1)  # so that equal values stay in the order of their indices
    # Summed as the maxima are, to the last bit.
    near = _take(blocks.reshape(batch_size, -1, width), best[..., None]) + columns[best % num_blocks]
    near += _take(row_BK, best // num_blocks)[..., None]
    values, places = jax.lax.top_k(near.reshape(batch_size, -1), min(k, near[0].size))
    block = _take(best, places // width)
    column = jnp.minimum(block % num_blocks * width + places % width, size - 1)  # what is -inf may lie in the padding
    return values, (block // num_blocks).astype(jnp.int32), column.astype(jnp.int32)


def _take(x: Array, indices: Array) -> Array:
    return jnp.take_along_axis(x, indices, axis=1, mode="promise_in_bounds")
