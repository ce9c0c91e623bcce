"""Incremental decoding: what a model keeps of the tokens that it has read, and how decoders and models meet.

A model that generates has three methods; ``core_flax/decode.py`` and ``beam.py`` need no more and know no architecture:

- ``init_cache(batch_size, length) -> cache``: a plain method. An empty cache with room for ``length`` tokens a row.
  (A model that reads a source first has a method of its own instead, which takes the source.) A cache is a pytree; the
  first dim of every array in it is the row.
- ``apply(variables, tokens_BL, cache, num_tokens_B, method="extend") -> (x_BLD, cache)``: reads L more tokens of each
  row and returns their hidden states and the new cache; the old one stays valid. Only the first ``num_tokens_B`` tokens
  of a row are real (None: all). The others, at its end, leave no trace in the cache, and what is returned for them is
  not to be looked at. So prompts of different length sit in one batch, padded on the right with anything, and each row
  goes on exactly as it would alone; a row that has ended is given ``num_tokens`` 0 and stays as it is. The caller sees
  to it that no row gets more tokens than there is room for.
- ``apply(variables, x, method="logits") -> [..., V]``: scores of the next token, float32, from hidden states [..., D].
  A decoder wants them at each row's last real token alone: ``last_token``.

It may have a fourth, a plain one:

- ``unstack(params) -> params``: what ``extend`` takes in place of the parameters, with stacked layers in parts
  (``core_flax.layers.unstack``). Without it a loop would cut them anew for every token, which on a CPU are copies.

Beams: ``fork`` makes F rows of each row, one after another, and ``reorder`` then lets them go on from one another's
past, without knowing what a cache holds. All arrays are taken row by row, but for two kinds of parts. What lies in
``Shared`` depends on the source alone: it keeps one row for the F rows of a fork, and a model folds its queries to them
(``core_flax.attention`` does it by itself). ``KeyValueCache`` moves nothing: see there.

The model is pure: caches go in and come out, so all of it can be jitted, with the cache donated, and put in a
``lax.while_loop``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from core_flax import hardware
from core_flax.types import Array

_PARTS = 4
"""A CPU looks at as many of so many parts of a cache as are in use ..."""
_SMALL_PART = 2
"""... unless they would have fewer positions than this."""


@flax.struct.dataclass
class Shared:
    """A part of a cache that no token changes and that is the same for all rows of a fork, such as the source's keys.

    Attributes:
      value: a pytree of arrays [B, ...], or [B / F, ...] after a fork into F.
    """

    value: Any


@flax.struct.dataclass
class KeyValueCache:
    """Keys and values of the tokens that N layers of attention have read.

    A row's tokens fill the slots from 0 on, in order, so a slot's number is its token's position. What lies beyond
    ``num_tokens_B`` is left over from padding: it is overwritten before any query can see it.

    After a fork into F, the F rows have their slots in common: slot ``position * F + place`` is written by the row at
    that place of the fork, and stays. A row sees, of every position, the slot of that row which its past was at then.
    So to reorder beams is to reorder a table of small numbers, and attention reads each key once for all beams. But the
    rows of a fork must go on together, each by as many tokens as the others.

    Attributes:
      keys: of each layer [B, G, M, K], M slots a row; after a fork [B / F, G, M * F, K]. Not one array: to read a layer
        of it would be to copy that.
      values: likewise.
      num_tokens_B: how many slots hold tokens, int32.
      writer_BM: after a fork, the place (0 to F - 1) of the row that wrote what a row sees at a position; else None.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    num_tokens_B: Array
    writer_BM: Array | None = None

    @property
    def num_forks(self) -> int:
        """F: rows that have their slots in common."""
        return len(self.num_tokens_B) // len(self.keys[0])

    def positions(self, length: int) -> Array:
        """The positions [B, L] of the next ``length`` tokens."""
        return self.num_tokens_B[:, None] + jnp.arange(length)

    def mask(self, length: int) -> Array:
        """[B, 1, L, M]: True where the next ``length`` tokens may look, each at those before it and at itself.

        After a fork [B / F, 1, F * L, M * F], as attention wants it.
        """
        (num_rows, _, num_slots, _), forks = self.keys[0].shape, self.num_forks
        earlier = jnp.arange(num_slots // forks) <= self.positions(length)[..., None]
        if self.writer_BM is None:
            return earlier[:, None]
        seen = earlier[..., None] & (self.writer_BM[:, None, :, None] == jnp.arange(forks))
        return seen.reshape(num_rows, 1, forks * length, num_slots)

    def write(self, layer: int, k_BLGK: Array, v_BLGK: Array) -> "KeyValueCache":
        """With the keys and values that a layer has for the next L tokens; padding that finds no slot is dropped."""
        num_rows, forks, length = len(self.keys[0]), self.num_forks, k_BLGK.shape[1]
        slots = self.positions(length) * forks + self._places()[:, None]
        at = jnp.arange(num_rows)[:, None], slice(None), slots.reshape(num_rows, -1)

        def written(layers: tuple[Array, ...], x_BLGK: Array) -> tuple[Array, ...]:
            x = x_BLGK.reshape(num_rows, -1, *x_BLGK.shape[2:]).astype(layers[layer].dtype)
            return (*layers[:layer], layers[layer].at[at].set(x, mode="drop"), *layers[layer + 1 :])

        return dataclasses.replace(self, keys=written(self.keys, k_BLGK), values=written(self.values, v_BLGK))

    def look(self, layer: int, mask: Array, attend: Callable[[Array, Array, Array], Array], length: int) -> Array:
        """What ``attend`` makes of a layer's keys, values and the mask, where the next ``length`` tokens may look.

        Keys and values are [B, M, G, K]; after a fork [B / F, M * F, G, K]. On a CPU, M is not all there is room for
        but what is in use, rounded up to a fourth of that: empty slots take as long to be read as others.

        Args:
          layer: which one.
          mask: that of ``mask(length)``, or one with as many slots.
          attend: from keys, values and mask to an array whose shape depends on none of their lengths.
          length: tokens a row that have been written since the last ``advance``.
        """
        num_positions = self.keys[layer].shape[2] // self.num_forks
        ends = [num_positions]
        if hardware.platform() == "cpu" and num_positions >= _PARTS * _SMALL_PART:
            ends = [-(-num_positions * (part + 1) // _PARTS) for part in range(_PARTS)]

        def up_to(end: int) -> Callable[[], Array]:
            def attended() -> Array:
                slots = end * self.num_forks
                keys, values = (x[layer][:, :, :slots].swapaxes(1, 2) for x in (self.keys, self.values))
                return attend(keys, values, mask[..., :slots])

            return attended

        in_use = jnp.max(self.num_tokens_B) + length
        return jax.lax.switch(jnp.sum(in_use > jnp.array(ends[:-1], jnp.int32)), [up_to(end) for end in ends])

    def advance(self, num_tokens_B: Array | int) -> "KeyValueCache":
        """With the tokens counted that every layer has written."""
        return dataclasses.replace(self, num_tokens_B=self.num_tokens_B + num_tokens_B)

    def fork(self, num: int) -> "KeyValueCache":
        """``num`` rows from each row: what it has read is seen by all of them, in the slots of the first."""
        assert self.writer_BM is None, "a cache is forked once"
        rows = len(self.num_tokens_B)

        def spread(x_BGMK: Array) -> Array:
            between = jnp.pad(x_BGMK[:, :, :, None], ((0, 0),) * 3 + ((0, num - 1), (0, 0)))
            return between.reshape(*x_BGMK.shape[:2], -1, x_BGMK.shape[-1])

        num_tokens_B = jnp.repeat(self.num_tokens_B, num, total_repeat_length=rows * num)
        keys, values = jax.tree.map(spread, (self.keys, self.values))
        seen = jnp.zeros((rows * num, self.keys[0].shape[2]), jnp.int32)
        return KeyValueCache(keys, values, num_tokens_B)._seen_by(seen)

    def reorder(self, parents_BF: Array) -> "KeyValueCache":
        """See ``core_flax.cache.reorder``."""
        return dataclasses.replace(self, num_tokens_B=_take(self.num_tokens_B, parents_BF))._seen_by(
            _take(self.writer_BM, parents_BF)
        )

    def _places(self) -> Array:
        """Each row's place in its fork, int32 [B]."""
        return jnp.arange(len(self.num_tokens_B)) % self.num_forks

    def _seen_by(self, writer_BM: Array) -> "KeyValueCache":
        """With this table for the positions that have been read; a row writes those to come by itself."""
        read = jnp.arange(writer_BM.shape[1]) < self.num_tokens_B[:, None]
        return dataclasses.replace(self, writer_BM=jnp.where(read, writer_BM, self._places()[:, None]))


def init_cache(
    batch_size: int, num_layers: int, num_kv_heads: int, length: int, head_width: int, dtype: jnp.dtype
) -> KeyValueCache:
    """An empty cache for ``length`` tokens a row."""
    shape = (batch_size, num_kv_heads, length, head_width)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in range(2))
    return KeyValueCache(keys, values, jnp.zeros(batch_size, jnp.int32))


def take_rows(cache: Any, rows_B: Array) -> Any:
    """The cache of other rows, in any order and number: row i of the result is row ``rows_B[i]`` of what is given.

    Not for caches that have been forked.
    """
    return jax.tree.map(lambda x: jnp.take(x, rows_B, axis=0), cache)


def fork(cache: Any, num: int) -> Any:
    """``num`` rows from each row: rows i * num to i * num + num - 1 have the past of row i."""
    return _map(lambda x: jnp.repeat(x, num, axis=0, total_repeat_length=len(x) * num), lambda x: x.fork(num), cache)


def reorder(cache: Any, parents_BF: Array) -> Any:
    """Of a forked cache, each row with the past of a row of the same fork.

    Args:
      cache: of B * F rows, by ``fork(cache, F)``.
      parents_BF: places (0 to F - 1) in the fork: row b * F + f goes on from row b * F + parents_BF[b, f].
    """
    return _map(lambda x: _take(x, parents_BF), lambda x: x.reorder(parents_BF), cache)


def _map(array: Callable[[Array], Array], whole: Callable[[KeyValueCache], KeyValueCache], cache: Any) -> Any:
    """The cache with its arrays and its KeyValueCaches mapped, what is shared as it is."""

    def mapped(part: Any) -> Any:
        if isinstance(part, Shared):
            return part
        return whole(part) if isinstance(part, KeyValueCache) else array(part)

    return jax.tree.map(mapped, cache, is_leaf=lambda part: isinstance(part, Shared | KeyValueCache))


def _take(x: Array, parents_BF: Array) -> Array:
    """The rows of x [B * F, ...] that ``reorder`` says; within forks, so that rows on different devices stay there."""
    x_BF = x.reshape(*parents_BF.shape, *x.shape[1:])
    at = parents_BF.reshape(*parents_BF.shape, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x_BF, at, axis=1).reshape(x.shape)


def last_token(x_BLD: Array, num_tokens_B: Array | None = None) -> Array:
    """The hidden states [B, D] of each row's last real token; a row without any gets those of its first."""
    if num_tokens_B is None:
        return x_BLD[:, -1]
    return jnp.take_along_axis(x_BLD, jnp.maximum(num_tokens_B - 1, 0)[:, None, None], axis=1)[:, 0]
