"""The training loop: every family's, one machine's or many's."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from core_flax import hardware, sharding
from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig, RunConfig
from core_flax.evaluate import make_evaluate
from core_flax.logs import Interval, MetricsFile, Progress, open_tensorboard
from core_flax.optim import make_optimizer, sums_of_squares
from core_flax.params import ParamRule, count, leaves, path_of
from core_flax.schedule import make_schedule
from core_flax.signals import EXIT_NOT_FINITE, Interrupted, StopFlag, Stopped, stop_on_signal
from core_flax.state import TrainState
from core_flax.step import Metrics, first_bad_parameter, make_train_step
from core_flax.task import Evaluator, Task
from core_flax.types import Batch

HIDDEN = ("gradient_norm", "learning_rate")
"""Figures that are written to metrics.jsonl and TensorBoard but not shown in the progress line."""


class NotFiniteError(Stopped):
    """A loss or gradient became NaN or infinite. No remedy is certain, but nothing good was overwritten."""

    status = EXIT_NOT_FINITE


@dataclass(frozen=True)
class Program:
    """The compiled parts of a run, and where its arrays lie.

    Attributes:
      mesh: the devices.
      init: key -> initial state, placed.
      step: (state, batch) -> (state, metrics); the state passed in is given up.
      abstract_state: shapes, types and placements of the state.
    """

    mesh: Mesh
    init: Callable[[Any], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    abstract_state: TrainState


def make_program(task: Task, config: RunConfig, devices: list[Any] | None = None) -> Program:
    """Everything that the mesh decides.

    Raises:
      UserError: settings that do not fit the devices or each other.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(config.train.batch_size, config.train.num_microbatches, mesh)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, task.param_rules)

    def init(key: Any) -> TrainState:
        params = task.init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes = jax.eval_shape(init, jax.random.key(0))
    params = sharding.param_shardings(shapes.params, task.param_rules, mesh, task.axis_fields)
    placed = sharding.state_shardings(shapes, params, mesh)
    step = make_train_step(task, optimizer, schedule, config.seed, config.train.num_microbatches)
    return Program(
        mesh=mesh,
        init=jax.jit(init, out_shardings=placed),
        step=jax.jit(step, donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh))),
        abstract_state=jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed),
    )


def check_settings(config: RunConfig, rules: tuple[ParamRule, ...]) -> None:
    """Raises UserError if settings do not fit each other or the devices: before any data is read or written."""
    sharding.check_batch_size(config.train.batch_size, config.train.num_microbatches, sharding.make_mesh(config.mesh))
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.train.num_steps)
    make_optimizer(config.optimizer, schedule, rules)


def train(task: Task, config: RunConfig, program: Program, workdir: Path) -> dict[str, float]:
    """Trains to config.train.num_steps, from the newest checkpoint in workdir if there is one.

    Args:
      task: what is trained.
      config: its settings.
      program: from ``make_program``, which refuses settings that cannot be, before anything is written.
      workdir: folder of the run: checkpoints, metrics.jsonl, TensorBoard files.

    Returns:
      The held-out metrics of the last step, by the task's first evaluator; empty where the task has none.

    Raises:
      UserError: a full disk, no good checkpoint left.
      NotFiniteError: the loss or a gradient is no longer a finite number.
      Interrupted: a signal came; the state is saved.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(program.mesh))
        stop = stack.enter_context(stop_on_signal())
        # Left last to first, after an error too: a checkpoint under way is completed before anything is reported.
        saver = Saver(Checkpoints(workdir / "checkpoints", config.checkpoint), config.checkpoint)
        stack.enter_context(contextlib.closing(saver.checkpoints))
        restored = saver.restore(program.abstract_state)
        state, start = restored or (_first_state(task, program, config.seed), 0)
        recorder = Recorder(task, config, program, workdir, start, stop)
        stack.enter_context(contextlib.closing(recorder))
        recorder.announce(state)
        recorder.interval = saver.interval(start)
        after = partial(_after, config, saver, recorder, stop)
        held_out = after(start, state) if _owes_evaluation(config, saver, start) else {}
        if start < config.train.num_steps:
            held_out = _steps(task, config, program, state, start, recorder, after)
        saver.checkpoints.wait()
        recorder.summarize()
        return dict(held_out)


def _first_state(task: Task, program: Program, seed: int) -> TrainState:
    """What ``program.init`` draws, and the task's own parameters where it has some."""
    state = program.init(jax.random.key(seed))

    def place(keys: tuple[Any, ...], drawn: Any) -> Any:
        given = task.initial.get(path_of(keys))
        if given is None:
            return drawn
        assert given.shape == drawn.shape, f"{path_of(keys)}: {given.shape} is given, {drawn.shape} is wanted"
        return jax.make_array_from_callback(drawn.shape, drawn.sharding, lambda index: given[index].astype(drawn.dtype))

    unknown = set(task.initial) - {path for path, _ in leaves(state.params)}
    assert not unknown, f"no such parameters: {sorted(unknown)}"
    return state.replace(params=jax.tree_util.tree_map_with_path(place, state.params))


def _steps(
    task: Task,
    config: RunConfig,
    program: Program,
    state: TrainState,
    start: int,
    recorder: "Recorder",
    after: Callable[[int, TrainState], Mapping[str, float]],
) -> Mapping[str, float]:
    """Takes the steps from ``start`` on, and does what is due after each. Returns the last one's held-out metrics."""
    batch_size, last = config.train.batch_size, config.train.num_steps
    rows = sharding.host_rows(batch_size, program.mesh)
    held_out: Mapping[str, float] = {}
    with contextlib.closing(task.batches(start, rows)) as batches:
        for step in range(start + 1, last + 1):
            began = time.perf_counter()
            local = next(batches)
            num_rows = len(next(iter(local.values()))) * batch_size // len(rows)  # packed: not one for each example
            batch = sharding.place_batch(local, num_rows, program.mesh)
            wait = time.perf_counter() - began
            state, metrics = program.step(state, batch)
            recorder.record(step, metrics, wait)
            held_out = after(step, state)
    return held_out


def _after(
    config: RunConfig, saver: "Saver", recorder: "Recorder", stop: StopFlag, step: int, state: TrainState
) -> Mapping[str, float]:
    """Evaluates, saves and stops as is due after a step. Returns the held-out metrics if they were taken.

    Raises:
      Interrupted: a signal came; the state is saved. An evaluation that was under way, or due, is given up: whoever
        takes the machine away leaves half a minute. It is made up for when the run goes on.
    """
    is_last = step >= config.train.num_steps
    held_out: Mapping[str, float] = {}
    complete = True
    if is_last or _every(config.train.eval_every_steps, step):
        try:
            held_out = recorder.evaluate(step, state.params)
        except _GivenUp:
            complete = False
    told = stop.signal  # read once: it may come at any moment, and what is said must be what was done
    if told or is_last or saver.is_due(step, held_out):
        recorder.confirm(step, state.params)
        with recorder.pause("saving"):
            saver.save(state, held_out, recorder.interval)
    if told and not (is_last and complete):
        saver.checkpoints.wait()
        raise Interrupted(f"{told.name}: step {step} is saved; run the same command to resume")
    return held_out


def _owes_evaluation(config: RunConfig, saver: "Saver", start: int) -> bool:
    """Whether the step that the run goes on from is to be evaluated: it is the last, or a signal came before it was."""
    if start >= config.train.num_steps:
        return True
    return start > 0 and _every(config.train.eval_every_steps, start) and not saver.checkpoints.metrics(start)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


class _GivenUp(Exception):
    """An evaluation that a signal put an end to."""


def _until_told(evaluator: Evaluator, stop: StopFlag) -> Evaluator:
    """The evaluator, given up before its next batch once a signal has come."""

    def batches() -> Iterator[Batch]:
        for batch in evaluator.batches():
            if stop:
                raise _GivenUp
            yield batch

    return dataclasses.replace(evaluator, batches=batches)


class Saver:
    """Decides when a checkpoint is due: by steps, by minutes, or because its held-out loss is the best seen."""

    def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig) -> None:
        self.checkpoints = checkpoints
        self._config = config
        self._last = time.monotonic()
        self._best = math.inf

    def restore(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """As ``Checkpoints.restore_latest``; the best loss seen is that of the checkpoints there are."""
        restored = self.checkpoints.restore_latest(abstract)
        best = self.checkpoints.best_loss
        self._best = math.inf if best is None else best
        return restored

    def interval(self, step: int) -> Interval:
        """The logging interval that was under way when the step was saved."""
        return Interval(**self.checkpoints.notes(step).get("interval", {})) if step else Interval()

    def is_due(self, step: int, held_out: Mapping[str, float]) -> bool:
        """Whether the state of this step, with these held-out metrics if any were taken, is to be saved."""
        minutes = (time.monotonic() - self._last) / 60
        is_best = self._config.keep_best > 0 and bool(held_out) and held_out["loss"] < self._best
        return is_best or _every(self._config.every_steps, step) or 0 < self._config.every_minutes <= minutes

    def save(self, state: TrainState, held_out: Mapping[str, float], interval: Interval) -> None:
        """Starts to save; returns when the state may be given up."""
        if held_out:
            self._best = min(self._best, held_out["loss"])
        notes = {"interval": dataclasses.asdict(interval)} if interval.num_steps else None
        self.checkpoints.save(state, {"loss": held_out["loss"]} if held_out else None, notes)
        self._last = time.monotonic()


class Recorder:
    """Takes the metrics of each step, one step late, checks them, and tells people and files about them.

    One step late, because reading a metric waits for its step: by then the device is busy with the next one.

    Attributes:
      interval: figures of the steps since the last record, but for the step that is pending.
    """

    def __init__(
        self, task: Task, config: RunConfig, program: Program, workdir: Path, start: int, stop: StopFlag
    ) -> None:
        self._config = config
        self._mesh = program.mesh
        self._workdir = workdir
        self._start = start
        self._evaluators = {
            name: make_evaluate(_until_told(each, stop), program.mesh) for name, each in task.evaluators.items()
        }
        self._ranks = {name: (-1 if each.maximize else 1, each.objective) for name, each in task.evaluators.items()}
        self._abstract_params = program.abstract_state.params
        self._squares = jax.jit(sums_of_squares)
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
        if _every(self._config.log.every_steps, step) or step == self._config.train.num_steps:
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
        bad = first_bad_parameter(self._abstract_params, self._squares(params))
        if bad:
            self._fail(f"step {step}: {bad} itself is")

    def _fail(self, what: str) -> None:
        raise NotFiniteError(
            f"{what} not finite. Nothing of it was saved; checkpoints in {self._workdir / 'checkpoints'} are from "
            "before. Lower optimizer.learning-rate or optimizer.clip-norm"
        )

    def evaluate(self, step: int, params: Any) -> dict[str, float]:
        """The first evaluator's metrics, those of all written down; "loss" is its objective, negated if to maximize.

        Raises:
          _GivenUp: a signal came.
        """
        self.flush()
        held_out: dict[str, float] = {}
        with self.pause("evaluating"):
            for name, evaluate in self._evaluators.items():
                metrics = evaluate(params)
                sign, objective = self._ranks[name]
                held_out = held_out or {**metrics, "loss": sign * metrics[objective]}
                named = {f"{name}/{key}": value for key, value in metrics.items()}
                if not any(self._file.has(step, key) for key in named):  # as a run that was complete has
                    self._write(step, named)
                figures = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
                self._progress.message(f"step {step} {name}: {figures}")
        return held_out

    def pause(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Time spent inside is no training time."""
        return self._progress.pause(what)

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


def _peak_flops(mesh: Mesh) -> float | None:
    peak = hardware.peak_flops(mesh.devices.flat[0].device_kind)
    return peak and peak * mesh.size
