"""The training loop: every family's."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax

from core_flax import sharding
from core_flax.agreement import Agreement
from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig, RunConfig
from core_flax.distributed import agree, first_tells, naming_the_lost
from core_flax.logs import Interval
from core_flax.program import Program, first_state
from core_flax.recorder import GivenUp, Recorder, is_multiple
from core_flax.signals import Interrupted, stop_on_signal
from core_flax.state import TrainState
from core_flax.task import Task


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
        agreement = Agreement(program.mesh, stack.enter_context(stop_on_signal()))
        # Left last to first, after an error too: a checkpoint under way is completed before anything is reported.
        saver = Saver(Checkpoints(workdir / "checkpoints", config.checkpoint), config.checkpoint)
        stack.enter_context(contextlib.closing(saver.checkpoints))
        restored = saver.restore(program.abstract_state)
        state, start = restored or (first_state(task, program, config.seed), 0)
        recorder = Recorder(task, config, program, workdir, start, agreement)
        stack.enter_context(contextlib.closing(recorder))
        agree("")  # from here on a process that ends is not heard, but missed
        stack.enter_context(naming_the_lost())
        recorder.announce(state)
        recorder.interval = saver.interval(start)
        after = partial(_after, config, saver, recorder, agreement)
        held_out = after(start, state) if _owes_evaluation(config, saver, start) else {}
        if start < config.train.num_steps:
            held_out = _steps(task, config, program, state, start, recorder, after)
        with recorder.pause("saving"):
            saver.checkpoints.wait()
        recorder.summarize()
        return dict(held_out)


def _steps(
    task: Task,
    config: RunConfig,
    program: Program,
    state: TrainState,
    start: int,
    recorder: Recorder,
    after: Callable[[int, TrainState], Mapping[str, float]],
) -> Mapping[str, float]:
    """Takes the steps from ``start`` on, and does what is due after each. Returns the last one's held-out metrics."""
    batch_size, last = config.train.batch_size, config.train.num_steps
    rows = sharding.host_rows(batch_size, program.mesh)
    held_out: Mapping[str, float] = {}
    compiled = set()
    with contextlib.closing(task.batches(start, rows)) as batches:
        for step in range(start + 1, last + 1):
            recorder.begin(step)
            began = time.perf_counter()
            local = next(batches)
            num_rows = len(next(iter(local.values()))) * batch_size // len(rows)  # packed: not one for each example
            batch = sharding.place_batch(local, num_rows, program.mesh)
            wait = time.perf_counter() - began
            shapes = frozenset((name, array.shape) for name, array in batch.items())
            # A step of new shapes is compiled before the call returns.
            with contextlib.nullcontext() if shapes in compiled else recorder.pause("compiling"):
                state, metrics = program.step(state, batch)
            compiled.add(shapes)
            recorder.record(step, metrics, wait)
            held_out = after(step, state)
    return held_out


def _after(
    config: RunConfig, saver: "Saver", recorder: Recorder, agreement: Agreement, step: int, state: TrainState
) -> Mapping[str, float]:
    """Evaluates, saves and stops as is due after a step. Returns the held-out metrics if they were taken.

    Raises:
      Interrupted: a signal came; the state is saved. An evaluation that was under way, or due, is given up: whoever
        takes the machine away leaves half a minute. It is made up for when the run goes on.
    """
    is_last = step >= config.train.num_steps
    held_out: Mapping[str, float] = {}
    complete = True
    if is_last or is_multiple(config.train.eval_every_steps, step):
        try:
            held_out = recorder.evaluate(step, state.measured)
        except GivenUp:
            complete = False
    is_time = agreement.settle(saver.is_time())
    told = agreement.signal  # read once: it may come at any moment, and what is said must be what was done
    if told or is_last or is_time or saver.is_due(step, held_out):
        recorder.confirm(step, state.params)
        with recorder.pause("saving"):
            saver.save(state, held_out, recorder.interval)
    if told and not (is_last and complete):
        with recorder.pause("saving"):
            saver.checkpoints.wait()
        raise Interrupted(f"{told.name}: step {step} is saved; run the same command to resume")
    return held_out


def _owes_evaluation(config: RunConfig, saver: "Saver", start: int) -> bool:
    """Whether the step that the run goes on from is to be evaluated: it is the last, or a signal came before it was."""
    if start >= config.train.num_steps:
        return True
    if start == 0 or not is_multiple(config.train.eval_every_steps, start):
        return False
    return not json.loads(first_tells(lambda: json.dumps(dict(saver.checkpoints.metrics(start)))))


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
        best = json.loads(first_tells(lambda: json.dumps(self.checkpoints.best_loss)))
        self._best = math.inf if best is None else best
        return restored

    def interval(self, step: int) -> Interval:
        """The logging interval that was under way when the step was saved."""
        if not step:
            return Interval()
        return Interval(**json.loads(first_tells(lambda: json.dumps(self.checkpoints.notes(step).get("interval", {})))))

    def is_due(self, step: int, held_out: Mapping[str, float]) -> bool:
        """Whether the state of this step, with these held-out metrics if any were taken, is to be saved."""
        is_best = self._config.keep_best > 0 and bool(held_out) and held_out["loss"] < self._best
        return is_best or is_multiple(self._config.every_steps, step)

    def is_time(self) -> bool:
        """Whether the minutes between checkpoints have passed by this process's clock; true once for each of them."""
        minutes = (time.monotonic() - self._last) / 60
        if not 0 < self._config.every_minutes <= minutes:
            return False
        self._last = time.monotonic()
        return True

    def save(self, state: TrainState, held_out: Mapping[str, float], interval: Interval) -> None:
        """Starts to save; returns when the state may be given up."""
        if held_out:
            self._best = min(self._best, held_out["loss"])
        notes = {"interval": dataclasses.asdict(interval)} if interval.num_steps else None
        self.checkpoints.save(state, {"loss": held_out["loss"]} if held_out else None, notes)
        self._last = time.monotonic()
