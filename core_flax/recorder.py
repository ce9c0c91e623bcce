"""What becomes of a step's figures: checked, averaged, shown, written down; and evaluation, which is shown likewise."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from core_flax import hardware
from core_flax.agreement import Agreement
from core_flax.config import RunConfig
from core_flax.curves import open_tensorboard
from core_flax.evaluate import make_evaluate
from core_flax.logs import Interval, MetricsFile, Progress
from core_flax.optim import sums_of_squares
from core_flax.params import count
from core_flax.program import Program
from core_flax.signals import EXIT_NOT_FINITE, Stopped
from core_flax.state import TrainState
from core_flax.step import Metrics, first_bad_parameter
from core_flax.task import Evaluator, Task
from core_flax.types import Batch
from core_flax.watchdog import Watchdog

HIDDEN = ("gradient_norm", "learning_rate")
"""Figures that are written to metrics.jsonl and TensorBoard but not shown in the progress line."""


class NotFiniteError(Stopped):
    """A loss or gradient became NaN or infinite. No remedy is certain, but nothing good was overwritten."""

    status = EXIT_NOT_FINITE


class GivenUp(Exception):
    """An evaluation that a signal put an end to."""


def _until_told(evaluator: Evaluator, agreement: Agreement) -> Evaluator:
    """The evaluator, given up before its next batch once a signal has come."""

    def batches() -> Iterator[Batch]:
        for batch in evaluator.batches():
            if agreement.stop_now():
                raise GivenUp
            yield batch

    return dataclasses.replace(evaluator, batches=batches)


class Recorder:
    """Takes the metrics of each step, one step late, checks them, and tells people and files about them.

    One step late, because reading a metric waits for its step: by then the device is busy with the next one.

    Attributes:
      interval: figures of the steps since the last record, but for the step that is pending.
    """

    def __init__(
        self, task: Task, config: RunConfig, program: Program, workdir: Path, start: int, agreement: Agreement
    ) -> None:
        self._config = config
        self._mesh = program.mesh
        self._workdir = workdir
        self._start = start
        self._saved = start  # the newest step that was found good and saved; 0: none was
        self._evaluators = {
            name: make_evaluate(_until_told(each, agreement), program.mesh) for name, each in task.evaluators.items()
        }
        self._ranks = {name: (-1 if each.maximize else 1, each.objective) for name, each in task.evaluators.items()}
        self._abstract_params = program.abstract_state.params
        self._squares = jax.jit(sums_of_squares)
        self._watchdog = Watchdog(config.log.stall_seconds, jax.process_index())
        self._leads = jax.process_index() == 0  # the others compute the same figures and keep them to themselves
        self._file = MetricsFile(workdir / "metrics.jsonl")
        self._board = None
        if self._leads:
            self._file.truncate_after(start)
            self._board = open_tensorboard(workdir / "tensorboard", start) if config.log.tensorboard else None
        self._task, self._cost = task, task.cost(start)
        self._progress = Progress(
            total_steps=config.train.num_steps,
            start_step=start,
            examples_per_step=config.train.batch_size,
            tokens_per_step=self._cost.tokens,
            flops_per_step=self._cost.flops,
            peak_flops=_peak_flops(program.mesh),
            silent=not self._leads,
        )
        self._pending: tuple[int, Metrics] | None = None
        self.interval = Interval()
        self._wait = 0.0
        self._started = False

    def close(self) -> None:
        """Ends the progress line and the files."""
        self._watchdog.close()
        self._progress.close()
        self._file.close()
        if self._board:
            self._board.close()

    def announce(self, state: TrainState) -> None:
        """Says what is about to run."""
        axes = " x ".join(f"{axis}={size}" for axis, size in self._mesh.shape.items() if size > 1) or "1 device"
        self._progress.message(
            f"{f'resumes at step {self._start}' if self._start else 'starts'}: {count(state.params):,} parameters, "
            f"{axes} ({self._mesh.devices.flat[0].device_kind}), batch of {self._config.train.batch_size}, "
            f"{self._config.train.num_steps} steps"
        )

    def begin(self, step: int) -> None:
        """Says that a step begins: one that does not end is reported."""
        self._watchdog.begin(step)

    def record(self, step: int, metrics: Metrics, wait: float) -> None:
        """Takes a step's metrics, still being computed, and deals with those of the step before."""
        self.flush()
        self._pending = step, metrics
        self._wait += wait

    def flush(self) -> None:
        """Waits for the step whose metrics are pending.

        Raises:
          NotFiniteError: its loss or gradient is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = dict(jax.device_get(metrics))
        squares = values.pop("gradient_squares")
        scalars = {name: float(value) for name, value in values.items()}
        if not all(math.isfinite(scalars[name]) for name in ("loss", "gradient_norm")):
            bad = first_bad_parameter(self._abstract_params, squares)
            where = f"the gradient of {bad} is" if bad else "no gradient is, but the loss is"
            self._fail(f"step {step}: loss {scalars['loss']}; {where}")
        if not self._started:
            # What came before, compilation and the first batch, is no sign of what is to come.
            self._progress.start_clock(step)
            self._started, self._wait = True, 0.0
        self.interval = self.interval.plus(scalars)
        if is_multiple(self._config.log.every_steps, step) or step == self._config.train.num_steps:
            means = self.interval.means()
            shown = {name: value for name, value in means.items() if name not in HIDDEN}
            rates = self._progress.update(step, shown, self._wait)
            self._write(step, means | rates)
            self.interval, self._wait = Interval(), 0.0
            if self._task.cost(step) != self._cost:
                self._cost = self._task.cost(step)
                self._progress.change_cost(self._cost.tokens, self._cost.flops)

    def confirm(self, step: int, params: Any) -> None:
        """Waits for the step. Raises NotFiniteError if anything of it is not finite; only then may it be saved.

        Parameters are looked at here and not at every step: one that is not finite shows in the next step's loss.
        """
        self.flush()
        with self.pause("saving"):
            self._file.sync()
            if self._board:
                self._board.sync()
            bad = first_bad_parameter(self._abstract_params, self._squares(params))
        if bad:
            self._fail(f"step {step}: {bad} itself is")
        self._saved = step

    def _fail(self, what: str) -> NoReturn:
        folder = self._workdir / "checkpoints"
        good = f"the last good checkpoint in {folder} is of step {self._saved}" if self._saved else "no step before was"
        raise NotFiniteError(  # a new workdir: this one's run goes on with its own settings only
            f"{what} not finite. It was not saved; {good}. Start again in a new workdir with a lower "
            "optimizer.learning-rate or optimizer.clip-norm"
        )

    def evaluate(self, step: int, params: Any) -> dict[str, float]:
        """The first evaluator's metrics, those of all written down; "loss" is its objective, negated if to maximize.

        Raises:
          GivenUp: a signal came.
          NotFiniteError: the evaluator found a number that is not finite (its FloatingPointError says which).
        """
        self.flush()
        held_out: dict[str, float] = {}
        with self.pause("evaluating"):
            for name, evaluate in self._evaluators.items():
                try:
                    metrics = evaluate(params)
                except FloatingPointError as error:
                    self._fail(f"step {step}: {error} of {name} is")
                sign, objective = self._ranks[name]
                held_out = held_out or {**metrics, "loss": sign * metrics[objective]}
                named = {f"{name}/{key}": value for key, value in metrics.items()}
                if not any(self._file.has(step, key) for key in named):  # as a run that was complete has
                    self._write(step, named)
                figures = "  ".join(f"{key} {_shown(value)}" for key, value in metrics.items())
                self._progress.message(f"step {step} {name}: {figures}")
        return held_out

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Time spent inside is no training time, however long it is."""
        with self._watchdog.pause(), self._progress.pause(what):
            yield

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._leads:
            self._file.write(step, {**values, "time": round(time.time(), 1)})
        if self._board:
            self._board.write(step, values)

    def summarize(self) -> None:
        """Closing lines."""
        self._progress.close()
        for line in self._progress.summary(self._workdir / "checkpoints"):
            self._progress.message(line)


def is_multiple(interval: int, step: int) -> bool:
    """Whether something that happens every ``interval`` steps happens after this one; 0: never."""
    return interval > 0 and step % interval == 0


def _shown(figure: float) -> str:
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:.4f}"  # a count, or not


def _peak_flops(mesh: Mesh) -> float | None:
    peak = hardware.peak_flops(mesh.devices.flat[0].device_kind)
    return peak and peak * mesh.size
