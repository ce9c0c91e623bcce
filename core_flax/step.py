"""One optimizer step, exact whatever the microbatches: sums first, divide once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from core_flax.optim import sums_of_squares
from core_flax.params import leaves
from core_flax.state import TrainState
from core_flax.task import MetricSums, Task
from core_flax.types import Array, Batch, Params

Metrics = dict[str, Any]
"""What a step reports, as device arrays: loss terms, metrics, norms and what is needed to tell where a NaN arose."""


def split_microbatches(batch: Batch, num_microbatches: int) -> Batch:
    """[B, ...] -> [n, B/n, ...], microbatch i holding rows i, i + n, i + 2n ...

    Strided, because a batch sharded over devices by contiguous rows then stays where it is: each device keeps its rows,
    divided among the microbatches. ``reshape(n, B // n)`` would put whole microbatches on few devices and move rows.
    """

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def join_microbatches(parts: Any) -> Any:
    """The inverse of split_microbatches."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def gradients(
    task: Task, params: Params, batch: Batch, key: Array | None, num_microbatches: int, carry: Any = None
) -> tuple[Params, dict[str, Array], MetricSums, Any]:
    """Gradients of the sum of all loss terms, each divided by its weight over the whole batch.

    Returns:
      (gradients, loss terms, metric sums, the carry for the next step). No gradient goes into the carry given.
    """
    batch = dict(batch) | {"row": jnp.arange(len(jax.tree.leaves(batch)[0]))}
    # From data alone and over the whole batch, before it is cut: a mean of means would weigh microbatches wrongly.
    weights = {name: jnp.where(weight == 0, 1, weight) for name, weight in task.loss_weights(batch).items()}

    if task.carry:
        batch["carry"] = carry

    def loss(params: Params, part: Batch) -> tuple[Array, tuple[dict[str, Array], MetricSums, Any]]:
        loss_sums, metric_sums, *following = task.loss_sums(params, part, key)
        terms = {name: loss_sums[name] / weights[name] for name in weights}
        return sum(terms.values(), start=jnp.zeros(())), (terms, metric_sums, following[0] if following else None)

    def one(part: Batch) -> tuple[tuple[Params, dict[str, Array], MetricSums], Any]:
        grads, (terms, metric_sums, following) = jax.grad(loss, has_aux=True)(params, part)
        return (grads, terms, metric_sums), following

    if num_microbatches == 1:
        sums, following = one(batch)
        return *sums, following

    def add(total: Any, part: Batch) -> tuple[Any, Any]:
        sums, following = one(part)
        return jax.tree.map(jnp.add, total, sums), following

    parts = split_microbatches(batch, num_microbatches)
    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, following = jax.lax.scan(add, zeros, parts)
    return *total, join_microbatches(following)


def divide(metric_sums: MetricSums) -> dict[str, Array]:
    """Sum over weight of every metric; 0 where nothing had weight."""
    return {name: total / jnp.where(weight == 0, 1, weight) for name, (total, weight) in metric_sums.items()}


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int | Array,
    num_microbatches: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step to jit: (state, global batch) -> (next state, metrics). Donate the state.

    Randomness is fold_in(key(seed), step): no key is stored, and a resumed run draws what the uninterrupted one drew.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, terms, metric_sums, carry = gradients(task, state.params, batch, key, num_microbatches, state.carry)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = None if ema_decay is None else moved(state.ema, params, ema_decay, state.step + 1)
        # What is not finite shows in an array's sum of squares. Clipping has taken the same sums: XLA takes them once.
        squares = sums_of_squares(grads)
        metrics = {
            "loss": sum(terms.values(), start=jnp.zeros(())),
            **{f"{name}_loss": term for name, term in terms.items() if len(terms) > 1},
            **divide(metric_sums),
            "gradient_norm": jnp.sqrt(jnp.sum(squares)),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "gradient_squares": squares,
        }
        return TrainState(state.step + 1, params, opt_state, carry, ema=ema), metrics

    return train_step


def moved(ema: Params | None, params: Params, decay: float, step: Array) -> Params:
    """The moving average after a step, the first being 1: it keeps ``min(decay, (1 + step) / (10 + step))`` of itself.

    The bound, which lets early parameters go faster, is that of TensorFlow's ExponentialMovingAverage (num_updates).
    """
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - kept) * (new - old), ema, params)


def first_bad_parameter(params: Params, squares: Any) -> str | None:
    """Path of the first parameter whose sum of squares is not finite, given ``sums_of_squares`` of all of them."""
    for (path, _), square in zip(leaves(params), squares, strict=True):
        if not jnp.isfinite(square):
            return path
    return None
