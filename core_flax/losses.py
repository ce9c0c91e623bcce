"""Losses as sums over examples: whoever knows the whole batch divides, once."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from core_flax import sharding
from core_flax.types import Array


def cross_entropy_sums(logits: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted sums of the cross-entropy and of correct predictions.

    Args:
      logits: [..., C], any float type; the computation is in float32.
      labels: [...] int, in [0, C).
      weights: [...] float; 0 leaves a position out.

    Returns:
      (sum of weights * cross-entropy in nats, sum of weights where the label's logit is the largest), float32 scalars.
    """
    logits = logits.astype(jnp.float32)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - label_logits
    # Correct if nothing else reaches the label's logit: a tie is no prediction, and a sum is cheaper than argmax.
    correct = jnp.sum(logits >= label_logits[..., None], axis=-1) == 1
    return jnp.sum(loss * weights), jnp.sum(correct * weights)


class VocabularySums(NamedTuple):
    """Weighted sums over positions, float32 scalars."""

    loss: Array
    """Cross-entropy, plus z_weight times ``z``: what is differentiated."""
    cross_entropy: Array
    """In nats; without a gradient."""
    z: Array
    """The squared logarithm of the softmax's denominator; without a gradient."""
    correct: Array
    """1 where the label's logit is the largest."""


def vocabulary_sums(
    x_BLD: Array,
    table_VD: Array,
    labels_BL: Array,
    weights_BL: Array,
    *,
    num_chunks: int = 1,
    z_weight: float = 0.0,
    soft_cap: float | None = None,
) -> VocabularySums:
    """Cross-entropy of a large vocabulary, whose logits x table^T are never whole in memory.

    A chunk of the positions is scored at a time, and where a gradient is wanted, it is computed there and then: so
    every logit is computed once, as in the plain way, and what is kept is the gradient of the two inputs rather than
    logits (as in Hsu et al. 2024, arXiv 2410.10989, section 3.2).

    Args:
      x_BLD: hidden states; their type is that of the matrix products. Sums and softmax are float32.
      table_VD: output layer, or the tied embedding; float32 parameters.
      labels_BL: int, in [0, V).
      weights_BL: 0 leaves a position out. No gradient goes there.
      num_chunks: portions in which positions are scored; memory for logits falls as 1 / num_chunks. Changes results by
        rounding at most.
      z_weight: weight of the z-loss, which keeps the denominator near 1 (Chowdhery et al. 2022, arXiv 2204.02311,
        section 5); 0: none.
      soft_cap: logits are soft_cap * tanh(logits / soft_cap) (Gemma Team 2024, arXiv 2408.00118, section 2); None: as
        they are.
    """
    # Annotated, since checkers lose the type in custom_vjp.
    sums: VocabularySums = cast(Any, _sums)(x_BLD, table_VD, labels_BL, weights_BL, num_chunks, z_weight, soft_cap)
    return VocabularySums(sums.loss, *map(jax.lax.stop_gradient, sums[1:]))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(
    x_BLD: Array,
    table_VD: Array,
    labels_BL: Array,
    weights_BL: Array,
    num_chunks: int,
    z_weight: float,
    soft_cap: float | None,
) -> VocabularySums:
    table_VD = sharding.gather_table(table_VD.astype(x_BLD.dtype), "vocab_logits")

    def add(sums: VocabularySums, chunk: tuple[Array, Array, Array]) -> tuple[VocabularySums, None]:
        x_TD, labels_T, weights_T = chunk
        logits_TV = _logits(x_TD, table_VD, soft_cap)
        return _add(sums, _sums_of(logits_TV, _softmax(logits_TV), labels_T, weights_T, z_weight)), None

    return jax.lax.scan(add, _zero(), _chunks(num_chunks, x_BLD, labels_BL, weights_BL))[0]


def _sums_forward(
    x_BLD: Array,
    table_VD: Array,
    labels_BL: Array,
    weights_BL: Array,
    num_chunks: int,
    z_weight: float,
    soft_cap: float | None,
) -> tuple[VocabularySums, tuple[Array, Array]]:
    """The sums, and the gradients of the loss: they are linear in its cotangent, so they need not wait for it."""
    batch_size, length, width = x_BLD.shape
    table = sharding.gather_table(table_VD.astype(x_BLD.dtype), "vocab_logits")

    def add(carry: tuple[VocabularySums, Array], chunk: tuple[Array, Array, Array]):
        sums, grad_VD = carry
        x_TD, labels_T, weights_T = chunk
        logits_TV = _logits(x_TD, table, soft_cap)
        softmax = _softmax(logits_TV)
        sums = _add(sums, _sums_of(logits_TV, softmax, labels_T, weights_T, z_weight))
        grad_TV = _gradient(logits_TV, softmax, labels_T, weights_T, z_weight, soft_cap).astype(x_TD.dtype)
        grad_VD += jnp.einsum("TV,TD->VD", grad_TV, x_TD, preferred_element_type=jnp.float32)
        return (sums, sharding.constrain(grad_VD, "vocab_logits", "table_width")), grad_TV @ table

    start = _zero(), jnp.zeros(table_VD.shape, jnp.float32)
    (sums, grad_VD), grads = jax.lax.scan(add, start, _chunks(num_chunks, x_BLD, labels_BL, weights_BL))
    grads = grads.reshape(len(grads), batch_size, -1, width).swapaxes(0, 1)
    grad_BLD = grads.reshape(batch_size, -1, width)[:, :length]
    return sums, (grad_BLD, grad_VD.astype(table_VD.dtype))


def _sums_backward(
    num_chunks: int, z_weight: float, soft_cap: float | None, grads: tuple[Array, Array], cotangent: VocabularySums
) -> tuple[Array, Array, None, None]:
    grad_BLD, grad_VD = grads
    return (grad_BLD * cotangent.loss).astype(grad_BLD.dtype), grad_VD * cotangent.loss, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _chunks(num_chunks: int, *arrays: Array) -> tuple[Array, ...]:
    """[B, L, ...] as [chunks, T, ...], T being L / chunks positions of each row, so that each device has a part of it.

    Rows are filled up with zeros. A matrix of positions, since products over two dims cost XLA a transposition.
    """
    batch_size, length = arrays[0].shape[:2]
    chunk = -(-length // num_chunks)
    missing = -length % chunk

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x
        x = x.reshape(batch_size, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(len(x), batch_size * chunk, *x.shape[3:])

    return tuple(map(cut, arrays))


def _logits(x_TD: Array, table_VD: Array, soft_cap: float | None) -> Array:
    logits_TV = jnp.einsum("TD,VD->TV", x_TD, table_VD, preferred_element_type=jnp.float32)
    logits_TV = sharding.constrain(logits_TV, "batch", "vocab_logits")
    return logits_TV if soft_cap is None else soft_cap * jnp.tanh(logits_TV / soft_cap)


class _Softmax(NamedTuple):
    """Before the division: exponentials are the dearest part, and sums and gradient share them."""

    exp_TV: Array
    total_T: Array
    log_total_T: Array
    """Of the exponentials of the logits as they are."""


def _softmax(logits_TV: Array) -> _Softmax:
    highest_T = jnp.max(logits_TV, axis=-1)
    exp_TV = jnp.exp(logits_TV - highest_T[:, None])
    total_T = jnp.sum(exp_TV, axis=-1)
    return _Softmax(exp_TV, total_T, highest_T + jnp.log(total_T))


def _sums_of(logits_TV: Array, softmax: _Softmax, labels_T: Array, weights_T: Array, z_weight: float) -> VocabularySums:
    label_logits_T = jnp.take_along_axis(logits_TV, labels_T[:, None], axis=-1)[:, 0]
    cross_entropy = jnp.sum((softmax.log_total_T - label_logits_T) * weights_T)
    z = jnp.sum(softmax.log_total_T**2 * weights_T)
    correct_T = jnp.sum(logits_TV >= label_logits_T[:, None], axis=-1) == 1
    return VocabularySums(cross_entropy + z_weight * z, cross_entropy, z, jnp.sum(correct_T * weights_T))


def _gradient(
    logits_TV: Array, softmax: _Softmax, labels_T: Array, weights_T: Array, z_weight: float, soft_cap: float | None
) -> Array:
    """Of the loss, to the logits before the cap."""
    scale_T = weights_T * (1.0 + 2.0 * z_weight * softmax.log_total_T) / softmax.total_T
    is_label_TV = jax.lax.broadcasted_iota(jnp.int32, logits_TV.shape, 1) == labels_T[:, None]
    grad_TV = softmax.exp_TV * scale_T[:, None] - jnp.where(is_label_TV, weights_T[:, None], 0.0)
    return grad_TV if soft_cap is None else grad_TV * (1.0 - (logits_TV / soft_cap) ** 2)


def _zero() -> VocabularySums:
    return VocabularySums(*(jnp.zeros(()) for _ in VocabularySums._fields))


def _add(a: VocabularySums, b: VocabularySums) -> VocabularySums:
    return VocabularySums(*map(jnp.add, a, b))
