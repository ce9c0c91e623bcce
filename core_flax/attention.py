"""Attention: the arithmetic and the module, without any notion of which architecture uses them."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import sharding
from core_flax.layers import Dropout, Linear, Weights, linear
from core_flax.types import Array


def padding_mask(valid_BM: Array) -> Array:
    """True where attention may look: [B, 1, 1, M] from the flags [B, M] of real tokens."""
    return valid_BM[:, None, None, :]


def packing_mask(sequences_BL: Array) -> Array:
    """[B, 1, L, L]: True where two tokens are of one sequence, in rows that hold several; padding sees padding."""
    return sequences_BL[:, None, :, None] == sequences_BL[:, None, None, :]


def dot_product_attention(
    q_BLHK: Array,
    k_BMHK: Array,
    v_BMHK: Array,
    mask_BHLM: Array | None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1).

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
    scale = q_BLHK.shape[-1] ** -0.5
    scores_BHLM = jnp.einsum("BLHK,BMHK->BHLM", q_BLHK * scale, k_BMHK, preferred_element_type=jnp.float32)
    if mask_BHLM is not None:
        # The lowest finite number rather than -inf: a row without any True then stays free of NaN, in gradients too.
        scores_BHLM = jnp.where(mask_BHLM, scores_BHLM, jnp.finfo(jnp.float32).min)
    probs_BHLM = jax.nn.softmax(scores_BHLM, axis=-1).astype(q_BLHK.dtype)
    if dropout is not None:
        probs_BHLM = dropout(probs_BHLM)
    return jnp.einsum("BHLM,BMHK->BLHK", probs_BHLM, v_BMHK)


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
        mask_BHLM: Array | None,
        *,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Returns [B, L, D]. ``row_B`` and ``deterministic`` are those of ``layers.Dropout``."""
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
        dropout = Dropout(self.dropout_rate)
        mixed_BLHK = dot_product_attention(
            q_BLHK,
            k_BMHK,
            v_BMHK,
            mask_BHLM,
            lambda probs_BHLM: dropout(probs_BHLM, row_B=row_B, deterministic=deterministic),
        )
        return Linear((width,), self.kernel_init, self.dtype, num_inputs=2, name="out")(mixed_BLHK)
