"""Attention to a source, whose keys and values can be computed beforehand, and the masks of encoder-decoders."""

import flax.linen as nn
import jax.numpy as jnp

from core_flax import sharding
from core_flax.attention import attend
from core_flax.kernels import Mask
from core_flax.layers import Dropout, Linear, Weights, linear
from core_flax.types import Array

LOOKED_AT = "looked_at"
"""Collection in which models leave the probabilities of attention to the source if it is mutable (``align`` asks)."""


def cross_mask(sequences_BL: Array, memory_BM: Array) -> Array:
    """[B, 1, L, M]: True where a token and a token of the memory are of sequences with the same number."""
    return sequences_BL[:, None, :, None] == memory_BM[:, None, None, :]


class CrossAttention(nn.Module):
    """Multi-head attention to a memory, whose keys and values may be computed beforehand.

    Otherwise core's MultiHeadAttention (Vaswani et al. 2017, section 3.2.2), with the same parameters.

    Attributes:
      width: D, of queries, memory and result.
      num_heads: H; must divide the width.
      dropout_rate: share of attention probabilities that is dropped in training.
      kernel_init: initialiser of the four projections.
      dtype: type of the computation; parameters are float32.
      use_bias: whether they have biases.
    """

    width: int
    num_heads: int
    dropout_rate: float
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True

    def setup(self) -> None:
        """Creates the projections."""
        heads = (self.num_heads, self.width // self.num_heads)
        self.query, self.key, self.value = (
            Weights(heads, self.kernel_init, self.dtype, self.use_bias) for _ in range(3)
        )
        self.out = Linear((self.width,), self.kernel_init, self.dtype, self.use_bias, num_inputs=2)
        self.dropout = Dropout(self.dropout_rate)

    def keys_values(self, memory_BMD: Array) -> tuple[Array, Array]:
        """Keys and values [B, H, M, K] of a memory: in the order that products want, in which caches keep them."""
        k_BMHK, v_BMHK = self._project(memory_BMD, self.key, self.value)
        return k_BMHK.swapaxes(1, 2), v_BMHK.swapaxes(1, 2)

    def __call__(
        self,
        x_BLD: Array,
        keys_values: tuple[Array, Array],
        mask: Array | Mask,
        *,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Returns [B, L, D]; the mask as for ``attend``, ``row_B`` and ``deterministic`` as in ``layers.Dropout``."""
        (q_BLHK,) = self._project(x_BLD, self.query)

        drop = self.dropout.draw(len(x_BLD), row_B=row_B, deterministic=deterministic)

        def seen(probs_BHLM: Array) -> Array:
            self.sow(LOOKED_AT, "probs", probs_BHLM)
            return probs_BHLM if drop is None else drop(probs_BHLM)

        k_BMHK, v_BMHK = (x.swapaxes(1, 2) for x in keys_values)
        wanted = self.is_mutable_collection(LOOKED_AT)
        return self.out(attend(q_BLHK, k_BMHK, v_BMHK, mask, seen if wanted else drop))

    def _project(self, x_BLD: Array, *projections: Weights) -> tuple[Array, ...]:
        """x mapped by each of the projections: one product, as narrow matrices leave cores idle."""
        weights = [projection(x_BLD.shape[-1:]) for projection in projections]
        kernels, biases = zip(*weights, strict=True)
        kernel, bias = jnp.stack(kernels, axis=-3), jnp.stack(biases, axis=-3) if self.use_bias else None
        y = sharding.constrain(linear(x_BLD, kernel, bias), "batch", "length", "small", "heads", "head_width")
        return tuple(y[:, :, part] for part in range(len(projections)))
