"""Leaves that every architecture shares: linear map, norm, dropout, feed-forward."""

import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import sharding
from core_flax.types import Array

Norm = nn.LayerNorm
"""Layer normalisation (Ba et al. 2016, arXiv 1607.06450); Flax takes its statistics in float32 whatever the dtype."""


class Weights(nn.Module):
    """Kernel and bias of a linear map from ``inputs`` to ``features``.

    The kernel keeps the shape of what it maps ([D, H, K], [H, K, D], [D, F]), so that heads can be sharded, yet is
    initialised as the matrix it stands for.

    Attributes:
      features: dims of the output, e.g. (H, K).
      kernel_init: initialiser, given the shape of the matrix.
      dtype: type of the computation; parameters are float32.
    """

    features: tuple[int, ...]
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: tuple[int, ...]) -> tuple[Array, Array]:
        """Returns (kernel [*inputs, *features], bias [*features]) for inputs of the given dims, e.g. (D,)."""
        return self.weights(inputs)

    def weights(self, inputs: tuple[int, ...]) -> tuple[Array, Array]:
        """As __call__, for use inside a compact method of a subclass."""

        def init(key: Array) -> Array:
            matrix = self.kernel_init(key, (math.prod(inputs), math.prod(self.features)), jnp.float32)
            return matrix.reshape(*inputs, *self.features)

        kernel, bias = self.param("kernel", init), self.param("bias", nn.initializers.zeros, self.features)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class Linear(Weights):
    """A linear map with bias over the last ``num_inputs`` dims of its input to ``features``."""

    num_inputs: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., *inputs] to [..., *features]."""
        return linear(x, *self.weights(x.shape[-self.num_inputs :]))


def linear(x: Array, kernel: Array, bias: Array) -> Array:
    """x [..., *inputs] times kernel [*inputs, *features] plus bias [*features], in the kernel's type."""
    num_inputs = kernel.ndim - bias.ndim
    dims = tuple(range(x.ndim - num_inputs, x.ndim))
    return jax.lax.dot_general(x.astype(kernel.dtype), kernel, ((dims, tuple(range(num_inputs))), ((), ()))) + bias


def row_bits(key: Array, row_B: Array, shape: tuple[int, ...]) -> Array:
    """Random bits [B, *shape], uint32, that depend on the key, on each row's number and on the place in the row alone.

    So an example gets the same bits in whatever microbatch or on whatever device it is computed, which no generator
    that hands out bits by position in the array can do; and being a few integer operations on counters, the bits are
    recomputed in the backward pass rather than stored. Each element is hashed with C. Wellons' ``lowbias32`` finaliser
    (Hash Prospector, 2018), entered with an offset and an odd multiplier of its row's own. Good enough for dropout; not
    for anything that needs long streams.
    """

    def mix(x: Array) -> Array:
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    words = jax.random.bits(key, (2,), jnp.uint32)
    expand = (..., *(None,) * len(shape))
    offset_B = mix(row_B.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + words[0])
    multiplier_B = mix(offset_B ^ words[1]) | jnp.uint32(1)
    place = jnp.zeros((), jnp.uint32)
    for dim, stride in enumerate(math.prod(shape[dim + 1 :]) for dim in range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), dim + 1) * jnp.uint32(stride)
    return mix(place * multiplier_B[expand] + offset_B[expand])


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) drawn per example, so that splitting a batch does not change it.

    Uses the rng stream "dropout". Attributes: rate, the share of elements that becomes zero.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, row_B: Array | None = None, deterministic: bool = True) -> Array:
        """Drops elements of x, [B, ...], and scales the others by 1 / (1 - rate).

        Args:
          x: any array whose first dim is the example.
          row_B: the example's number in the global batch; None: 0, 1, 2 ...
          deterministic: True to return x as it is.
        """
        if deterministic or self.rate == 0.0:
            return x
        if row_B is None:
            row_B = jnp.arange(x.shape[0])
        bits = row_bits(self.make_rng("dropout"), row_B, x.shape[1:])
        keep = bits >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype))


def gelu(x: Array) -> Array:
    """The exact Gaussian error linear unit, x * P(N(0, 1) < x) (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    # By erf, as the definition has it: jax.nn.gelu goes by erfc, which costs twice as much on a CPU.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


class FeedForward(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3).

    Attributes:
      width: F, of the hidden layer.
      activation: its nonlinearity.
    """

    width: int
    activation: Callable[[Array], Array]
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Maps [B, L, D] to [B, L, D]."""
        hidden_BLF = Linear((self.width,), kernel_init=self.kernel_init, dtype=self.dtype, name="up")(x_BLD)
        hidden_BLF = sharding.constrain(self.activation(hidden_BLF), "batch", "length", "mlp")
        return Linear((x_BLD.shape[-1],), kernel_init=self.kernel_init, dtype=self.dtype, name="down")(hidden_BLF)


Remat = Literal["none", "elementwise", "block"]


def remat(block: type[nn.Module], policy: Remat, unroll: int = 1) -> type[nn.Module]:
    """A block class whose backward pass computes again what ``policy`` does not keep (Chen et al. 2016, 1604.06174).

    Args:
      block: module class with ``__call__(x, mask, row_B, deterministic)``, to be scanned.
      unroll: blocks to a turn of the scan. Between turns XLA cannot see that it computes something twice; within one it
        would keep the first result after all, unless barriers forbid it.
      policy: "none" keeps every intermediate value; "elementwise" keeps the matrix products and computes norms,
        activations, softmax and dropout again, which is little work and much memory; "block" keeps each block's input.
    """
    if policy == "none":
        return block
    keep = jax.checkpoint_policies.dots_saveable if policy == "elementwise" else None
    return nn.remat(block, policy=keep, prevent_cse=unroll > 1, static_argnums=(4,))


def layers_per_turn(unroll: int | None, num_layers: int) -> int:
    """How many layers one turn of a scan over them computes; None: all of them on a CPU, one on an accelerator.

    A turn slices its layers' parameters out of the stacked arrays and writes their gradients into others: copies, which
    a CPU feels, while one turn for all compiles for as long as it has layers.
    """
    return unroll or (num_layers if jax.default_backend() == "cpu" else 1)
