"""Attention: the arithmetic and the module, without any notion of which architecture uses them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import hardware, kernels, sharding
from core_flax.cache import KeyValueCache
from core_flax.kernels import Mask
from core_flax.layers import Drop, Dropout, Linear, Weights, linear
from core_flax.types import Array

CACHED_SCORES = 2**20
"""Scores, of four bytes each, among which a CPU goes to and fro without going to memory."""


def padding_mask(valid_BM: Array) -> Array:
    """True where attention may look: [B, 1, 1, M] from the flags [B, M] of real tokens."""
    return valid_BM[:, None, None, :]


def packing_mask(sequences_BL: Array) -> Array:
    """[B, 1, L, L]: True where two tokens are of one sequence, in rows that hold several; padding sees padding."""
    return sequences_BL[:, None, :, None] == sequences_BL[:, None, None, :]


def causal_mask(length: int, sequences_BL: Array | None = None) -> Array:
    """[1, 1, L, L], or [B, 1, L, L] of packed rows: True where a token may look, at itself and at those before it."""
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    return mask if sequences_BL is None else mask & packing_mask(sequences_BL)


def dot_product_attention(
    q_BLHK: Array,
    k_BMHK: Array,
    v_BMHK: Array,
    mask_BHLM: Array | None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1).

    Keys and values may have fewer rows than the queries, B / F: then each row serves F rows of queries, one after
    another, which to them are one row of F * L queries; the mask is one for that.

    Args:
      q_BLHK: queries.
      k_BMHK: keys.
      v_BMHK: values.
      mask_BHLM: bool, broadcastable to [B, H, L, M]; True where a query may look at a key. None: everywhere. A query
        that may look nowhere gets the mean of all values: give such rows zero weight in the loss.
      dropout: function applied to the probabilities [B, H, L, M], or None.

    Returns:
      [B, L, H, K] in the dtype of the queries; the softmax is computed in float32.
    """
    shape, scale = q_BLHK.shape, q_BLHK.shape[-1] ** -0.5
    q_BLHK = _fold(q_BLHK, k_BMHK)
    scores_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK * scale, k_BMHK, preferred_element_type=jnp.float32)
    if mask_BHLM is not None:
        # The lowest finite number rather than -inf: a row without any True then stays free of NaN, in gradients too.
        scores_BHLM = jnp.where(mask_BHLM, scores_BHLM, jnp.finfo(jnp.float32).min)
    probs_BHLM = jax.nn.softmax(scores_BHLM, axis=-1).astype(q_BLHK.dtype)
    if dropout is not None:
        probs_BHLM = dropout(probs_BHLM)
    out = jnp.float32 if hardware.platform() == "cpu" else None  # as in layers.linear
    mixed_BHLK = jnp.einsum("BHLM,BMHK->BHLK", probs_BHLM, v_BMHK, preferred_element_type=out).astype(q_BLHK.dtype)
    if shape[0] != len(k_BMHK):
        # Else XLA folds what follows into the product, which on a CPU then takes ten times as long.
        mixed_BHLK = jax.lax.optimization_barrier(mixed_BHLK)
    return mixed_BHLK.swapaxes(1, 2).reshape(shape)


def _fold(q_BLHK: Array, k_BMHK: Array) -> Array:
    """Queries with as many rows as the keys."""
    return q_BLHK.reshape(len(k_BMHK), -1, *q_BLHK.shape[2:])


def grouped_query_attention(
    q_BLHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    mask_B1LM: Array,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Attention in which H / G consecutive heads of queries share one of keys and values (Ainslie et al. 2023).

    Source: arXiv 2305.13245, section 2.2. Otherwise as dot_product_attention; the mask is the same for every head.
    """
    shape, q_BLHK = q_BLHK.shape, _fold(q_BLHK, k_BMGK)
    batch_size, length, num_heads, head_width = q_BLHK.shape
    num_kv_heads = k_BMGK.shape[2]
    share = num_heads // num_kv_heads
    if share == 1:
        return dot_product_attention(q_BLHK, k_BMGK, v_BMGK, mask_B1LM, dropout).reshape(shape)
    # To its keys, a group is one head with as many more queries.
    grouped = q_BLHK.reshape(batch_size, length, num_kv_heads, share, head_width).transpose(0, 3, 1, 2, 4)
    q_BTGK = grouped.reshape(batch_size, share * length, num_kv_heads, head_width)
    mixed_BTGK = dot_product_attention(q_BTGK, k_BMGK, v_BMGK, jnp.tile(mask_B1LM, (1, 1, share, 1)), dropout)
    mixed = mixed_BTGK.reshape(batch_size, share, length, num_kv_heads, head_width).transpose(0, 2, 3, 1, 4)
    return mixed.reshape(shape)


def attend(
    q_BLHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    mask: Array | Mask | None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Attention by the ablest kernel that honours the mask and the dropout (``core_flax.kernels``).

    Args:
      q_BLHK: queries.
      k_BMGK: keys, whose heads divide those of the queries.
      v_BMGK: values.
      mask: as for dot_product_attention, the same for every head: then the plain way is taken; or what it follows from.
      dropout: as for dot_product_attention; None where nothing is dropped.
    """
    # Said for its gradient: what comes next may be split along the length, and that would reach back into the heads.
    return sharding.constrain(_attend(q_BLHK, k_BMGK, v_BMGK, mask, dropout), "batch", "length", "heads", "head_width")


def _attend(
    q_BLHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    mask: Array | Mask | None,
    dropout: Callable[[Array], Array] | None,
) -> Array:
    if isinstance(mask, Mask):
        if kernel := kernels.choose(q_BLHK, k_BMGK, mask, dropout is not None):
            return kernel.run(q_BLHK, k_BMGK, v_BMGK, mask)
        mask = mask.array(q_BLHK.shape[1], k_BMGK.shape[1])
    return _attend_in_groups(q_BLHK, k_BMGK, v_BMGK, mask, dropout)


def _attend_in_groups(
    q_BLHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    mask: Array | None,
    dropout: Callable[[Array], Array] | None,
) -> Array:
    size = _rows_at_a_time(q_BLHK, k_BMGK)
    if size == len(q_BLHK) or not (dropout is None or isinstance(dropout, Drop)):
        return _attend_plainly(q_BLHK, k_BMGK, v_BMGK, mask, dropout)
    is_shared = mask is None or mask.shape[0] == 1

    def group(rows: tuple[Array, Array, Array, Array | None, Array | None]) -> Array:
        q, k, v, own_mask, row_B = rows
        drop = None if row_B is None else dataclasses.replace(cast(Drop, dropout), row_B=row_B)
        return _attend_plainly(q, k, v, mask if is_shared else own_mask, drop)

    rows = q_BLHK, k_BMGK, v_BMGK, None if is_shared else mask, None if dropout is None else dropout.row_B
    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
    # Computing the scores again in the backward pass takes less time than reading them from memory.
    return jax.lax.map(jax.checkpoint(group), groups).reshape(q_BLHK.shape)


def _rows_at_a_time(q_BLHK: Array, k_BMGK: Array) -> int:
    """Rows that the plain way takes at once: on a CPU as many as have scores that its caches hold, and divide B.

    Passes over the scores, from the softmax to the dropout, take longer than the products where they go to memory.
    """
    (batch_size, length, num_heads, _), memory = q_BLHK.shape, k_BMGK.shape[1]
    most = CACHED_SCORES // (num_heads * length * memory)
    if hardware.platform() != "cpu" or sharding.is_split() or batch_size <= most or batch_size != len(k_BMGK):
        return batch_size
    # Not one row: products of one are slower.
    divisors = [size for size in range(2, batch_size) if batch_size % size == 0] or [batch_size]
    return max((size for size in divisors if size <= most), default=divisors[0])


def _attend_plainly(
    q_BLHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    mask: Array | None,
    dropout: Callable[[Array], Array] | None,
) -> Array:
    if q_BLHK.shape[2] == k_BMGK.shape[2]:
        return dot_product_attention(q_BLHK, k_BMGK, v_BMGK, mask, dropout)
    assert mask is not None, "attention with groups of heads that looks everywhere"
    return grouped_query_attention(q_BLHK, k_BMGK, v_BMGK, mask, dropout)


class MultiHeadAttention(nn.Module):
    """Multi-head attention with biases (Vaswani et al. 2017, section 3.2.2), from queries ``x`` to ``memory``.

    Attributes:
      num_heads: H; must divide the width of the queries.
      dropout_rate: share of attention probabilities that is dropped in training.
      kernel_init: initialiser of the four projections.
      dtype: type of the computation; parameters are float32.
    """

    num_heads: int
    dropout_rate: float = 0.0
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        memory_BMD: Array,
        mask: Array | Mask | None,
        *,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Returns [B, L, D]; the mask as for ``attend``, ``row_B`` and ``deterministic`` as in ``layers.Dropout``."""
        width = x_BLD.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        names = ("query", "key", "value")
        inputs = (x_BLD, memory_BMD, memory_BMD)
        weights = [
            Weights(heads, self.kernel_init, self.dtype, name=name)(source.shape[-1:])
            for name, source in zip(names, inputs, strict=True)
        ]
        if memory_BMD is x_BLD:
            # One product instead of three: narrow matrices leave cores and matrix units idle.
            kernel, bias = (jnp.stack(parts, axis=-3) for parts in zip(*weights, strict=True))
            qkv = sharding.constrain(linear(x_BLD, kernel, bias), "batch", "length", "small", "heads", "head_width")
            q_BLHK, k_BMHK, v_BMHK = (qkv[:, :, part] for part in range(3))
        else:
            q_BLHK, k_BMHK, v_BMHK = (
                sharding.constrain(linear(source, *each), "batch", "length", "heads", "head_width")
                for source, each in zip(inputs, weights, strict=True)
            )
        dropout = Dropout(self.dropout_rate).draw(len(x_BLD), row_B=row_B, deterministic=deterministic)
        mixed_BLHK = attend(q_BLHK, k_BMHK, v_BMHK, mask, dropout)
        return Linear((width,), self.kernel_init, self.dtype, num_inputs=2, name="out")(mixed_BLHK)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, as decoders want it: grouped queries, prepared keys, a cache.

    Attributes:
      num_heads: H.
      num_kv_heads: G, of keys and values; must divide H.
      head_width: K.
      use_bias: whether the four projections have biases.
      dropout_rate: share of attention probabilities that is dropped in training.
      kernel_init: initialiser of the projections.
      out_init: initialiser of the last one, if it is another.
      dtype: type of the computation; parameters are float32.
    """

    num_heads: int
    num_kv_heads: int
    head_width: int
    use_bias: bool = True
    dropout_rate: float = 0.0
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_init: nn.initializers.Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        mask: Array | Mask,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        *,
        prepare: Callable[[Array], Array] = lambda heads: heads,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, KeyValueCache | None]:
        """Returns ([B, L, D], the cache with these tokens or None).

        Args:
          x_BLD: hidden states of the tokens.
          mask: [B, 1, L, M], True where they may look: at M slots of the cache, or without one at each other; or what
            that follows from.
          cache: keys and values of the tokens before them.
          layer: which layer of the cache is this one's.
          prepare: what is done to queries [B, L, H, K] and to keys [B, L, G, K] before they meet, such as rotation.
          row_B: as in layers.Dropout.
          deterministic: as in layers.Dropout.
        """
        q_BLHK, k_BLGK, v_BLGK = self._project(x_BLD)
        q_BLHK, k_BLGK = prepare(q_BLHK), prepare(k_BLGK)
        dropout = Dropout(self.dropout_rate).draw(len(x_BLD), row_B=row_B, deterministic=deterministic)
        if cache is None:
            mixed_BLHK = attend(q_BLHK, k_BLGK, v_BLGK, mask, dropout)
        else:
            cache = cache.write(layer, k_BLGK, v_BLGK)
            look = partial(attend, q_BLHK, dropout=dropout)
            mixed_BLHK = cache.look(layer, cast(Array, mask), look, x_BLD.shape[1])
        out = Linear(
            x_BLD.shape[-1:], self.out_init or self.kernel_init, self.dtype, self.use_bias, num_inputs=2, name="out"
        )
        return out(mixed_BLHK), cache

    def _project(self, x_BLD: Array) -> list[Array]:
        """Queries [B, L, H, K], keys and values [B, L, G, K], in as few products as there are widths."""
        weights = {
            name: Weights((number, self.head_width), self.kernel_init, self.dtype, self.use_bias, name=name)
            for name, number in (("query", self.num_heads), ("key", self.num_kv_heads), ("value", self.num_kv_heads))
        }
        products = [("heads", ["query", "key", "value"])]
        if self.num_kv_heads < self.num_heads:
            products = [("heads", ["query"]), ("kv_heads", ["key", "value"])]
        projected = []
        for axis, names in products:
            kernels, biases = zip(*(weights[name](x_BLD.shape[-1:]) for name in names), strict=True)
            bias = jnp.stack(biases, axis=-3) if self.use_bias else None
            y = linear(x_BLD, jnp.stack(kernels, axis=-3), bias)
            y = sharding.constrain(y, "batch", "length", "small", axis, "head_width")
            projected += [y[:, :, part] for part in range(len(names))]
        return projected
