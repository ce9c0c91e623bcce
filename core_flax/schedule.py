"""Learning rate as a function of the step: warmup, then one of five shapes.

Steps count from 0 and no step is wasted: in a warmup of W steps the rate of step t is ``peak * (t + 1) / W``, so step 0
already learns and step W - 1 runs at the peak. The shape that follows starts from the peak at step W and would reach
its end at step ``total_steps``, the first that is not run, so the last step learns as well.
"""

from collections.abc import Callable
from typing import get_args, get_type_hints

import jax.numpy as jnp
import optax

from core_flax.config import ScheduleConfig
from core_flax.types import Array, UserError

NAMES: tuple[str, ...] = get_args(get_type_hints(ScheduleConfig)["name"])


def make_schedule(config: ScheduleConfig, peak: float, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates done before.

    With W = warmup_steps, T = total_steps (or num_steps) and p = the share of the way from step W to step T, the rate
    after the warmup is, as a share of the peak and with f = final_fraction:

    - linear: ``1 - (1 - f) p`` (Devlin et al. 2019, appendix A.2, with f = 0).
    - cosine: ``f + (1 - f) (1 + cos(pi p)) / 2`` (Loshchilov & Hutter 2017, SGDR, equation 5, without restarts).
    - wsd: 1 until the last decay_steps, then linear from 1 to f (Hu et al. 2024, MiniCPM, section 4.2; the linear
      decay is that of Hägele et al. 2024, section 3).
    - inverse_sqrt: ``sqrt(W / (t + 1))``, whatever T (Vaswani et al. 2017, equation 3).
    - constant: 1, whatever T.

    Args:
        config: Shape and lengths in steps.
        peak: Learning rate at the end of the warmup.
        num_steps: Steps of the whole run; the schedule is laid out over them unless the config says otherwise.

    Returns:
        A function of a step (an int, or a traced integer) that gives a float32 scalar.

    Raises:
        UserError: On lengths that do not fit, or on a setting that the named shape does not use.
    """
    _refuse_unused(config)
    total = _total_steps(config, num_steps)
    warmup, final = config.warmup_steps, config.final_fraction
    shape = _shape(config, warmup, total)

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step)
        share = final + (1.0 - final) * shape(step)
        if warmup:
            share = jnp.where(step < warmup, (step + 1) / warmup, share)
        return jnp.asarray(peak * share, jnp.float32)

    return schedule


def _shape(config: ScheduleConfig, warmup: int, total: int) -> Callable[[Array], Array]:
    """The rate after the warmup, from 1 at the peak to 0 at the final fraction."""
    if config.name == "constant":
        return lambda step: jnp.ones_like(step, jnp.float32)
    if config.name == "inverse_sqrt":
        return lambda step: jnp.sqrt(warmup / jnp.maximum(step + 1, warmup))
    start = total - _decay_steps(config, total) if config.name == "wsd" else warmup

    def progress(step: Array) -> Array:
        # The difference is taken between integers: float32 has no odd numbers above 16.7 million steps.
        return jnp.clip(step - start, 0, total - start) / (total - start)

    if config.name == "cosine":
        return lambda step: 0.5 * (1.0 + jnp.cos(jnp.pi * progress(step)))
    return lambda step: 1.0 - progress(step)


def _decay_steps(config: ScheduleConfig, total: int) -> int:
    """Length of the final decay of wsd; it must fit after the warmup."""
    decay = config.decay_steps if config.decay_steps is not None else max(1, total // 10)
    room = total - config.warmup_steps
    if not 1 <= decay <= room:
        raise UserError(
            f"--schedule.decay-steps {decay} does not fit: {room} of {total} steps are left after the warmup; "
            f"give 1 to {room}"
        )
    return decay


def _total_steps(config: ScheduleConfig, num_steps: int) -> int:
    """Steps the shape is laid out over, checked against the warmup and the length of the run."""
    total = config.total_steps if config.total_steps is not None else num_steps
    field = "--schedule.total-steps" if config.total_steps is not None else "--train.num-steps"
    decays = config.name in ("linear", "cosine", "wsd")
    longest = total - 1 if decays else total
    if config.warmup_steps > longest:
        raise UserError(
            f"--schedule.warmup-steps {config.warmup_steps} leaves no step for the {config.name} schedule: {field} is "
            f"{total}; set --schedule.warmup-steps to at most {longest}"
        )
    if total < num_steps and config.final_fraction == 0:
        raise UserError(
            f"--schedule.total-steps {total} ends before --train.num-steps {num_steps} with a learning rate of 0; "
            "raise it or set --schedule.final-fraction"
        )
    return total


def _refuse_unused(config: ScheduleConfig) -> None:
    """Raise UserError on a shape that does not exist and on a setting that the shape would ignore."""
    if config.name not in NAMES:
        raise UserError(f"unknown --schedule.name {config.name!r}; choose one of {', '.join(NAMES)}")
    if config.decay_steps is not None and config.name != "wsd":
        raise UserError(f"--schedule.decay-steps is for wsd; leave it out with --schedule.name {config.name}")
    if config.name in ("constant", "inverse_sqrt"):
        if config.final_fraction:
            raise UserError(f"--schedule.final-fraction has no effect with --schedule.name {config.name}; leave it out")
        if config.total_steps is not None:
            raise UserError(f"--schedule.total-steps has no effect with --schedule.name {config.name}; leave it out")
    if config.name == "inverse_sqrt" and config.warmup_steps < 1:
        raise UserError(
            "--schedule.name inverse_sqrt takes its time scale from the warmup; set --schedule.warmup-steps"
        )
