"""Losses as sums over examples: whoever knows the whole batch divides, once."""

import jax
import jax.numpy as jnp

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
