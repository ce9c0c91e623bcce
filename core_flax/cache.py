"""Incremental decoding: what a model keeps of the tokens that it has read, and how decoders and models meet.

A model that generates has three methods; ``core_flax/decode.py`` needs no more, and knows no architecture:

- ``init_cache(batch_size, length) -> cache``: a plain method. An empty cache with room for ``length`` tokens a row. A
  cache is a pytree; the first dim of every array in it is the row. So a decoder can choose and repeat rows (beams) by
  ``take_rows`` without knowing what a cache holds.
- ``apply(variables, tokens_BL, cache, num_tokens_B, method="extend") -> (x_BLD, cache)``: reads L more tokens of each
  row and returns their hidden states and the new cache; the old one stays valid. Only the first ``num_tokens_B`` tokens
  of a row are real (None: all). The others, at its end, leave no trace in the cache, and what is returned for them is
  not to be looked at. So prompts of different length sit in one batch, padded on the right with anything, and each row
  goes on exactly as it would alone; a row that has ended is given ``num_tokens`` 0 and stays as it is. The caller sees
  to it that no row gets more tokens than there is room for.
- ``apply(variables, x, method="logits") -> [..., V]``: scores of the next token, float32, from hidden states [..., D].
  A decoder wants them at each row's last real token alone: ``last_token``.

The model is pure: caches go in and come out, so all of it can be jitted, with the cache donated, and put in a
``lax.while_loop``.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from core_flax.types import Array


@flax.struct.dataclass
class KeyValueCache:
    """Keys and values of the tokens that N layers of attention have read.

    A row's tokens fill the slots from 0 on, in order, so a slot's number is its token's position. What lies beyond
    ``num_tokens_B`` is left over from padding: it is overwritten before any query can see it.

    Attributes:
      keys_BNGMK: M slots a row.
      values_BNGMK: likewise.
      num_tokens_B: how many slots hold tokens, int32.
    """

    keys_BNGMK: Array
    values_BNGMK: Array
    num_tokens_B: Array

    def positions(self, length: int) -> Array:
        """The slots [B, L] of the next ``length`` tokens."""
        return self.num_tokens_B[:, None] + jnp.arange(length)

    def mask(self, length: int) -> Array:
        """[B, 1, L, M]: True where the next ``length`` tokens may look, each at those before it and at itself."""
        return (jnp.arange(self.keys_BNGMK.shape[3]) <= self.positions(length)[..., None])[:, None]

    def write(self, layer: Array | int, k_BLGK: Array, v_BLGK: Array) -> "KeyValueCache":
        """With the keys and values that a layer has for the next L tokens; padding that finds no slot is dropped."""
        batch_size, length = k_BLGK.shape[:2]
        at = jnp.arange(batch_size)[:, None], layer, slice(None), self.positions(length)
        return dataclasses.replace(
            self,
            keys_BNGMK=self.keys_BNGMK.at[at].set(k_BLGK.astype(self.keys_BNGMK.dtype), mode="drop"),
            values_BNGMK=self.values_BNGMK.at[at].set(v_BLGK.astype(self.values_BNGMK.dtype), mode="drop"),
        )

    def read(self, layer: Array | int) -> tuple[Array, Array]:
        """A layer's keys and values, [B, M, G, K] both."""
        keys, values = (
            jax.lax.dynamic_index_in_dim(x, layer, axis=1, keepdims=False) for x in (self.keys_BNGMK, self.values_BNGMK)
        )
        return keys.swapaxes(1, 2), values.swapaxes(1, 2)

    def advance(self, num_tokens_B: Array | int) -> "KeyValueCache":
        """With the tokens counted that every layer has written."""
        return dataclasses.replace(self, num_tokens_B=self.num_tokens_B + num_tokens_B)


def init_cache(
    batch_size: int, num_layers: int, num_kv_heads: int, length: int, head_width: int, dtype: jnp.dtype
) -> KeyValueCache:
    """An empty cache for ``length`` tokens a row."""
    shape = (batch_size, num_layers, num_kv_heads, length, head_width)
    return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32))


def take_rows(cache: Any, rows_B: Array) -> Any:
    """The cache of other rows, in any order and number: row i of the result is row ``rows_B[i]`` of what is given."""
    return jax.tree.map(lambda x: jnp.take(x, rows_B, axis=0), cache)


def last_token(x_BLD: Array, num_tokens_B: Array | None = None) -> Array:
    """The hidden states [B, D] of each row's last real token; a row without any gets those of its first."""
    if num_tokens_B is None:
        return x_BLD[:, -1]
    return jnp.take_along_axis(x_BLD, jnp.maximum(num_tokens_B - 1, 0)[:, None, None], axis=1)[:, 0]
