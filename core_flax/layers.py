"""Leaves that every architecture shares: linear map, embedding, norm, dropout, feed-forward."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from core_flax import hardware, sharding
from core_flax.kernels import RESIDUALS
from core_flax.types import Array, Params

Norm = nn.LayerNorm
"""Layer normalisation (Ba et al. 2016, arXiv 1607.06450); Flax takes its statistics in float32 whatever the dtype."""

RMSNorm = nn.RMSNorm
"""Division by the root mean square, and a scale (Zhang and Sennrich 2019, arXiv 1910.07467); statistics as in Norm."""


class Weights(nn.Module):
    """Kernel and bias of a linear map from ``inputs`` to ``features``.

    The kernel keeps the shape of what it maps ([D, H, K], [H, K, D], [D, F]), so that heads can be sharded, yet is
    initialised as the matrix it stands for.

    Attributes:
      features: dims of the output, e.g. (H, K).
      kernel_init: initialiser, given the shape of the matrix.
      dtype: type of the computation; parameters are float32.
      use_bias: whether there is a bias.
    """

    features: tuple[int, ...]
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: tuple[int, ...]) -> tuple[Array, Array | None]:
        """Returns (kernel [*inputs, *features], bias [*features] or None) for inputs of the given dims, e.g. (D,)."""
        return self.weights(inputs)

    def weights(self, inputs: tuple[int, ...]) -> tuple[Array, Array | None]:
        """As __call__, for use inside a compact method of a subclass."""

        def init(key: Array) -> Array:
            matrix = self.kernel_init(key, (math.prod(inputs), math.prod(self.features)), jnp.float32)
            return matrix.reshape(*inputs, *self.features)

        kernel = self.param("kernel", init).astype(self.dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, self.features).astype(self.dtype)


class Linear(Weights):
    """A linear map over the last ``num_inputs`` dims of its input to ``features``."""

    num_inputs: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., *inputs] to [..., *features]."""
        return linear(x, *self.weights(x.shape[-self.num_inputs :]), self.num_inputs)


def linear(x: Array, kernel: Array, bias: Array | None = None, num_inputs: int = 1) -> Array:
    """x [..., *inputs] times kernel [*inputs, *features], plus bias [*features] if any, in the kernel's type."""
    product = _product
    if hardware.platform() == "cpu":
        product = _half_product_on_cpu if kernel.dtype == jnp.bfloat16 else _product_on_cpu
    y = product(x.astype(kernel.dtype), kernel, num_inputs)
    return y if bias is None else y + bias


def _product(x: Array, kernel: Array, num_inputs: int, out: jnp.dtype | None = None) -> Array:
    dims = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    return jax.lax.dot_general(x, kernel, (dims, ((), ())), preferred_element_type=out)


def _product_on_cpu(x: Array, kernel: Array, num_inputs: int) -> Array:
    """The product as one of two matrices: else XLA has the gradient of the kernel transposed, at half the speed."""
    if sharding.is_split():  # one matrix of all rows would lose how they are divided
        return _product(x, kernel, num_inputs)
    rows, features = x.shape[: x.ndim - num_inputs], kernel.shape[num_inputs:]
    matrix = kernel.reshape(-1, math.prod(features))
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(*rows, *features)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _half_product_on_cpu(x: Array, kernel: Array, num_inputs: int) -> Array:
    """The product in bfloat16 by the CPU's own instructions (AVX512-BF16, AMX), which take half the time of float32's.

    XLA has them for results in float32 alone; for others, and for operands of two types, as the gradient of that would
    have, it first makes the operands float32.
    """
    return _product(x, kernel, num_inputs, jnp.float32).astype(x.dtype)


def _half_forward_on_cpu(x: Array, kernel: Array, num_inputs: int) -> tuple[Array, tuple[Array, Array]]:
    return _half_product_on_cpu(x, kernel, num_inputs), (x, kernel)


def _half_backward_on_cpu(num_inputs: int, operands: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = operands
    rows, features = tuple(range(x.ndim - num_inputs)), tuple(range(num_inputs, kernel.ndim))
    dims = tuple(range(len(rows), grad.ndim)), features
    grad_x = jax.lax.dot_general(grad, kernel, (dims, ((), ())), preferred_element_type=jnp.float32)
    grad_kernel = jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return grad_x.astype(x.dtype), grad_kernel.astype(kernel.dtype)


_half_product_on_cpu.defvjp(_half_forward_on_cpu, _half_backward_on_cpu)


class Embedding(nn.Module):
    """A table [num_entries, width] that is looked up, and that may serve as the output layer as well."""

    num_entries: int
    width: int
    embedding_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the table."""
        self.embedding = self.param("embedding", self.embedding_init, (self.num_entries, self.width))

    def __call__(self, ids: Array) -> Array:
        """Rows [..., D] of the table for ids [...]."""
        return jnp.take(sharding.gather_table(self.embedding, "small"), ids, axis=0).astype(self.dtype)

    def logits(self, x: Array) -> Array:
        """Scores [..., V] of every entry for x [..., D] (tied weights: Press and Wolf 2017, arXiv 1608.05859).

        float32 whatever the dtype: rounded to bfloat16, near scores would be ties.
        """
        x, table = x.astype(self.dtype), sharding.gather_table(self.embedding.astype(self.dtype), "vocab_logits")
        return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)


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


@flax.struct.dataclass
class Drop:
    """Dropout whose key is drawn, a function of arrays that may be taken into transformations of JAX.

    Attributes:
      key: its randomness.
      row_B: the examples' numbers in the global batch.
      rate: the share of elements that becomes zero.
    """

    key: Array
    row_B: Array
    rate: float = flax.struct.field(pytree_node=False)

    def __call__(self, x: Array) -> Array:
        """Drops elements of x, [B, ...], and scales the others by 1 / (1 - rate)."""
        keep = row_bits(self.key, self.row_B, x.shape[1:]) >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype))


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) drawn per example, so that splitting a batch does not change it.

    Uses the rng stream "dropout". Attributes: rate, the share of elements that becomes zero.
    """

    rate: float

    def __call__(self, x: Array, *, row_B: Array | None = None, deterministic: bool = True) -> Array:
        """Drops elements of x, [B, ...], and scales the others by 1 / (1 - rate).

        Args:
          x: any array whose first dim is the example.
          row_B: the example's number in the global batch; None: 0, 1, 2 ...
          deterministic: True to return x as it is.
        """
        drop = self.draw(x.shape[0], row_B=row_B, deterministic=deterministic)
        return x if drop is None else drop(x)

    def draw(self, batch_size: int, *, row_B: Array | None = None, deterministic: bool = True) -> Drop | None:
        """What it does to arrays of B rows; None where that is nothing."""
        if deterministic or self.rate == 0.0:
            return None
        return Drop(self.make_rng("dropout"), jnp.arange(batch_size) if row_B is None else row_B, self.rate)


def gelu(x: Array) -> Array:
    """The exact Gaussian error linear unit, x * P(N(0, 1) < x) (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    # By erf, as the definition has it: jax.nn.gelu goes by erfc, which costs twice as much on a CPU.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def gelu_tanh(x: Array) -> Array:
    """The unit ``gelu`` by way of tanh, as GPT-2 computes it (Hendrycks and Gimpel 2016, section 2)."""
    return jax.nn.gelu(x, approximate=True)


class FeedForward(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3).

    Attributes:
      width: F, of the hidden layer.
      activation: its nonlinearity.
      kernel_init: initialiser of both kernels.
      out_init: initialiser of the second one, if it is another.
    """

    width: int
    activation: Callable[[Array], Array]
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32
    out_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Maps [B, L, D] to [B, L, D]."""
        hidden_BLF = Linear((self.width,), kernel_init=self.kernel_init, dtype=self.dtype, name="up")(x_BLD)
        hidden_BLF = sharding.constrain(self.activation(hidden_BLF), "batch", "length", "mlp")
        out_init = self.out_init or self.kernel_init
        return Linear((x_BLD.shape[-1],), kernel_init=out_init, dtype=self.dtype, name="down")(hidden_BLF)


class GatedFeedForward(nn.Module):
    """Position-wise feed-forward network with a gate, without biases (Shazeer 2020, arXiv 2002.05202).

    Attributes:
      width: F, of the hidden layer.
      activation: nonlinearity of the gate; jax.nn.silu makes it SwiGLU.
      kernel_init: initialiser of the three kernels.
      out_init: initialiser of the last one, if it is another.
      dropout_rate: share of the hidden layer that is dropped in training.
    """

    width: int
    activation: Callable[[Array], Array]
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32
    out_init: nn.initializers.Initializer | None = None
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x_BLD: Array, *, row_B: Array | None = None, deterministic: bool = True) -> Array:
        """Maps [B, L, D] to [B, L, D]; the others as in Dropout."""
        width = x_BLD.shape[-1]
        names = ("gate", "up")
        kernels = [
            Weights((self.width,), self.kernel_init, self.dtype, use_bias=False, name=name)((width,))[0]
            for name in names
        ]
        # One product instead of two, as in attention.
        both = sharding.constrain(linear(x_BLD, jnp.stack(kernels, axis=-2)), "batch", "length", "small", "mlp")
        hidden_BLF = self.activation(both[:, :, 0]) * both[:, :, 1]
        hidden_BLF = Dropout(self.dropout_rate)(hidden_BLF, row_B=row_B, deterministic=deterministic)
        out_init = self.out_init or self.kernel_init
        return Linear((width,), kernel_init=out_init, dtype=self.dtype, use_bias=False, name="down")(hidden_BLF)


SMALL = 2**15
"""Elements of hidden states that are left alone: caches hold them, and a token that is generated has no more."""


def materialised(x: Array) -> Array:
    """x as it is, computed once where several operations read it, and its gradient likewise.

    Meant for hidden states after an addition: in a pre-norm model they are a sum over the layers before, and their
    gradient one over the layers behind, which XLA on a CPU would compute anew in every fusion that reads them.
    (``jax.lax.optimization_barrier`` it drops before it fuses.) Nothing happens elsewhere.
    """
    if hardware.platform() != "cpu" or sharding.is_split() or x.size < SMALL:
        return x
    return _materialised(x)


@jax.custom_vjp
def _materialised(x: Array) -> Array:
    # A choice that is not known at compile time is an operation of its own. Both ways lead to x.
    return jax.lax.cond(x.ravel()[0] < jnp.inf, lambda x: x, lambda x: jnp.abs(x) * jnp.sign(x), x)


_materialised.defvjp(lambda x: (_materialised(x), None), lambda _, grad: (_materialised(grad),))


Remat = Literal["none", "elementwise", "block"]


def remat(block: type[nn.Module], policy: Remat, unroll: int = 1, static: tuple[int, ...] = (4,)) -> type[nn.Module]:
    """A block class whose backward pass computes again what ``policy`` does not keep (Chen et al. 2016, 1604.06174).

    Args:
      block: module class, to be scanned.
      unroll: blocks to a turn of the scan. Between turns XLA cannot see that it computes something twice; within one it
        would keep the first result after all, unless barriers forbid it.
      policy: "none" keeps every intermediate value; "elementwise" keeps the matrix products and computes norms,
        activations, softmax and dropout again, which is little work and much memory; "block" keeps each block's input.
      static: which arguments of its ``__call__``, self being 0, are no arrays; that of (x, mask, row_B, deterministic)
        is 4.
    """
    if policy == "none":
        return block
    policies = jax.checkpoint_policies
    products = policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names(RESIDUALS))
    keep = products if policy == "elementwise" else None
    return nn.remat(block, policy=keep, prevent_cse=unroll > 1, static_argnums=static)


def unstack(stacked: Params, num_layers: int) -> Params:
    """The parameters of scanned layers in parts, by number; ``layer_params`` takes either."""
    return {str(number): layer_params(stacked, number) for number in range(num_layers)}


def layer_params(layers: Params, number: int) -> Params:
    """The parameters of one layer, of those that are stacked or in parts."""
    return layers[str(number)] if str(number) in layers else jax.tree.map(lambda x: x[number], layers)


def layers_per_turn(unroll: int | None, num_layers: int) -> int:
    """How many layers one turn of a scan over them computes; None: all of them on a CPU, one on an accelerator.

    A turn slices its layers' parameters out of the stacked arrays and writes their gradients into others: copies, which
    a CPU feels, while one turn for all compiles for as long as it has layers.
    """
    return unroll or (num_layers if jax.default_backend() == "cpu" else 1)
