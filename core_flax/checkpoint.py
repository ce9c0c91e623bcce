"""The checkpoints of a run: written while training goes on, whole or not at all, verified when read.

``DIRECTORY/<step>`` is one checkpoint (core_flax/snapshot.py says what is in it). A folder named by a bare number is
complete: a new one is written under another name and renamed, an old one renamed and then deleted. A damaged one, once
an older one has been restored in its place, becomes ``<step>.corrupt`` and is never touched again.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from etils import epath

from core_flax import snapshot, storage
from core_flax.config import CheckpointConfig
from core_flax.distributed import first_does, first_tells, is_seen
from core_flax.snapshot import DamagedError, UnreadableError
from core_flax.state import TrainState
from core_flax.types import Params, UserError

Say = Callable[[str], None]
T = TypeVar("T")

_LEFTOVER = re.compile(r"\d+\.(deleted|orbax-checkpoint-tmp.*)")
_COMMITTED = "commit_success.txt"  # Orbax's mark of a complete folder where a rename is not atomic (gs://)


class Checkpoints:
    """The checkpoints of one run, for the run that writes them; the functions below only read.

    Every process of a run makes one and calls the same methods in the same order.

    Args:
      directory: where they lie, WORKDIR/checkpoints; the first save makes it. A gs:// address will do.
      config: keep_last newest ones stay, and besides keep_best ones that have the lowest finite ``metrics["loss"]``.
      say: takes the lines meant for the user; by default they go to standard error.
    """

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig, say: Say | None = None) -> None:
        self.directory = _absolute(directory)
        self._config = config
        self._say = (say or _say) if jax.process_index() == 0 else lambda line: None
        self._pending: tuple[int, int] | None = None  # step and bytes of the save that is under way
        self._writer = snapshot.make_writer()
        self._remove_leftovers()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return list_steps(self.directory)

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest held-out loss; None if none was saved with a loss."""
        return next(iter(_by_loss(self.directory)), None)

    @property
    def best_loss(self) -> float | None:
        """The lowest held-out loss of a checkpoint; None if none was saved with a loss."""
        return next(iter(_by_loss(self.directory).values()), None)

    def metrics(self, step: int) -> Mapping[str, float]:
        """Held-out metrics that a complete checkpoint was saved with or given later; {} if there are none."""
        return snapshot.read_manifest(self.directory / str(step))["metrics"] or {}

    def notes(self, step: int) -> Mapping[str, Any]:
        """What ``save`` was given as notes; {} if it was nothing."""
        return snapshot.read_manifest(self.directory / str(step)).get("notes", {})

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Start to write a checkpoint of state.step; returns as soon as the state may be donated.

        A step that has been saved is not written again; metrics that it lacked are added.

        Args:
          state: what is saved.
          metrics: held-out metrics; "loss" ranks the checkpoints.
          notes: what else, in JSON's types, is to be known when the run goes on from here. No result depends on it.

        Raises:
          UserError: there is no room for it, or the save before it failed.
        """
        self.wait()
        step = int(state.step)
        if first_tells(lambda: "saved" if step in self.steps() and self._is_saved(step, metrics) else ""):
            return
        named = snapshot.named_leaves(state)
        needed = sum(x.size * x.dtype.itemsize for x in named.values())
        first_does(lambda: self._check_space(step, needed))  # after it has deleted what need not stay
        # When Orbax's save returns, the bytes are on the host; those of CPU devices it reads in place, and JAX gives
        # a buffer that is held so to nobody else, donated or not.
        content = snapshot.content(step, named, metrics, notes)
        self._pending = step, needed
        with self._cleaning_up():
            self._writer.save(self.directory / str(step), args=content)

    def _check_space(self, step: int, needed: int) -> None:
        free = _free_bytes(self.directory)
        if free is not None and free < needed:
            raise self._unsaved(step, needed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def wait(self) -> None:
        """Wait until the last save is complete on disk, then delete what need not stay.

        Raises:
          UserError: it could not be written; what was written of it is gone, the checkpoints before it are intact.
        """
        if self._pending is None:
            return
        with self._cleaning_up():
            self._writer.wait_until_finished()
        self._pending = None
        self._delete_old()

    def close(self) -> None:
        """Wait for the last save, then end the background threads. Raises UserError as ``wait`` does."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def restore_latest(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """The newest checkpoint that is intact, and its step; None if there is none at all.

        Says which newer ones are damaged, and sets them aside as ``<step>.corrupt``.

        Args:
          abstract: the state's shapes, dtypes and shardings (jax.ShapeDtypeStruct), whatever the shardings it was
            saved with. Without a sharding an array goes to the first local device.

        Raises:
          UserError: there are checkpoints and all are damaged, or the arrays are not those of ``abstract``.
        """
        self.wait()
        # Each process reads its own part; that all have the same step, and that all could read it, they settle.
        steps = json.loads(first_tells(lambda: json.dumps(self.steps())))
        if not is_seen(lambda: set(steps) <= set(self.steps())):
            raise UserError(
                f"process {jax.process_index()} does not see in {self.directory} the checkpoints that the first one "
                "sees; give --workdir a folder that all of them share"
            )
        found = _newest(self.directory, lambda folder: snapshot.read_state(folder, abstract), steps)
        if found is None:
            return None
        state, step, damaged = found

        def set_aside() -> None:
            for bad, error in damaged.items():
                if isinstance(error, UnreadableError):
                    self._say(f"checkpoint of step {bad} cannot be read by all ({error}): going back to step {step}")
                    continue
                moved = self._set_aside(bad)
                self._say(
                    f"checkpoint of step {bad} is damaged ({error}): going back to step {step}; it is now {moved}"
                )

        first_does(set_aside)
        return state, step

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The checkpoint of one step; ``abstract`` as in ``restore_latest``.

        Raises:
          UserError: it does not exist, it is damaged, or its arrays are not those of ``abstract``.
        """
        self.wait()
        return _exactly(self.directory, step, lambda folder: snapshot.read_state(folder, abstract))

    def _is_saved(self, step: int, metrics: Mapping[str, float] | None) -> bool:
        """Whether a step on disk can stay as it is, but for metrics: a loop may evaluate a step after saving it."""
        try:
            snapshot.add_metrics(self.directory / str(step), metrics)
        except DamagedError as error:
            self._say(f"checkpoint of step {step} is damaged ({error}); it is now {self._set_aside(step)}")
            return False
        return True

    def _delete_old(self) -> None:
        best = list(_by_loss(self.directory))[: self._config.keep_best]
        for step in self.steps()[: -self._config.keep_last]:
            if step not in best:
                self._delete(self.directory / str(step))

    def _delete(self, folder: epath.Path) -> None:
        """Never leaves part of a checkpoint under a name that reads as a whole one, not even when killed."""
        if jax.process_index() != 0:
            return
        (folder / _COMMITTED).unlink(missing_ok=True)
        if not _LEFTOVER.fullmatch(folder.name) and not storage.is_remote(folder):  # there the mark was all it took
            folder = folder.rename(folder.with_name(folder.name + ".deleted"))
        folder.rmtree(missing_ok=True)

    def _remove_leftovers(self) -> None:
        """What was not finished to be written or deleted."""
        if not self.directory.exists():
            return
        for folder in self.directory.iterdir():
            if _LEFTOVER.fullmatch(folder.name) or (folder.name.isdigit() and not _is_complete(folder)):
                self._delete(folder)

    def _set_aside(self, step: int) -> epath.Path:
        aside = self.directory / f"{step}.corrupt"
        number = 1
        while aside.exists():
            number += 1
            aside = self.directory / f"{step}.corrupt-{number}"
        return (self.directory / str(step)).rename(aside) if jax.process_index() == 0 else aside

    @contextlib.contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """When the pending save fails: remove what there is of it and say what that means for the user."""
        assert self._pending is not None
        try:
            yield
        except Exception as error:
            (step, needed), self._pending = self._pending, None
            self._writer = snapshot.make_writer()  # the old one still holds what the failed operation left
            with contextlib.suppress(OSError):
                self._remove_leftovers()
            # TensorStore has no exception class of its own, and JAX derives its own from RuntimeError.
            if isinstance(error, jax.errors.JaxRuntimeError) or not isinstance(
                error, OSError | ValueError | RuntimeError
            ):
                raise
            raise self._unsaved(step, needed, error) from error

    def _unsaved(self, step: int, needed: int, error: Exception) -> UserError:
        free, steps = _free_bytes(self.directory), self.steps()
        room = "" if free is None else f", {_size(free)} are free"
        intact = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is none before it"
        resume = f"; it goes on from step {steps[-1]}" if steps else ""
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.directory}: it needs {_size(needed)}{room} "
            f"({snapshot.reason(error)}); {intact}; make room there, or make it writable, and run the same command "
            f"again{resume}"
        )


def list_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; [] if the folder does not exist."""
    root = _absolute(directory)
    if not root.exists():
        return []
    return sorted(int(folder.name) for folder in root.iterdir() if folder.name.isdigit() and _is_complete(folder))


def best_step(directory: str | os.PathLike[str]) -> int | None:
    """The checkpoint with the lowest held-out loss, the later of equals; None if none has one."""
    return next(iter(_by_loss(_absolute(directory))), None)


def load_params(
    directory: str | os.PathLike[str],
    step: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    say: Say | None = None,
) -> tuple[Params, int]:
    """Parameters alone, without knowing the model or reading what belongs to the optimizer; changes nothing on disk.

    Of a run that keeps a moving average of them (train.ema_decay), that: it is what the run evaluates.

    Args:
      directory: WORKDIR/checkpoints; a run may be writing to it.
      step: which checkpoint; None: the newest that is intact (says which newer ones are not).
      sharding: where all the parameters go; None: the first local device.
      say: takes the lines meant for the user; by default they go to standard error.

    Returns:
      (parameters, step).

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    root = _absolute(directory)

    def read(folder: epath.Path) -> Params:
        return snapshot.read_params(folder, sharding)

    if step is not None:
        return _exactly(root, step, read), step
    found = _newest(root, read, list_steps(root))
    if found is None:
        raise UserError(f"{root} holds no checkpoint; give the --workdir of a run that has saved one")
    params, newest, damaged = found
    for bad, error in damaged.items():
        (say or _say)(f"checkpoint of step {bad} in {root} is damaged ({error}): reading step {newest} instead")
    return params, newest


def _newest(
    root: epath.Path, read: Callable[[epath.Path], T], steps: Sequence[int]
) -> tuple[T, int, dict[int, DamagedError]] | None:
    """What ``read`` makes of the newest intact checkpoint, its step, and what is wrong with newer ones by step."""
    damaged: dict[int, DamagedError] = {}
    for step in reversed(steps):
        try:
            return read(root / str(step)), step, damaged
        except DamagedError as error:
            damaged[step] = error
    if not damaged:
        return None
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in list(damaged.items())[:3])
    raise UserError(
        f"no checkpoint in {root} is intact ({reasons}); put back a good copy of one, or start in a new workdir"
    )


def _exactly(root: epath.Path, step: int, read: Callable[[epath.Path], T]) -> T:
    steps = list_steps(root)
    if step not in steps:
        raise UserError(f"{root} holds no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")
    try:
        return read(root / str(step))
    except DamagedError as error:
        others = ", ".join(str(other) for other in steps if other != step) or "none"
        raise UserError(f"the checkpoint of step {step} in {root} is damaged ({error}); others: {others}") from error


def _by_loss(root: epath.Path) -> dict[int, float]:
    """Finite held-out losses by step, the lowest first, the later of equals first."""
    losses = {}
    for step in list_steps(root):
        with contextlib.suppress(DamagedError, UserError):
            losses[step] = (snapshot.read_manifest(root / str(step))["metrics"] or {}).get("loss", math.nan)
    finite = [(loss, -step) for step, loss in losses.items() if math.isfinite(loss)]
    return {-minus: loss for loss, minus in sorted(finite)}


def _is_complete(folder: epath.Path) -> bool:
    return not storage.is_remote(folder) or (folder / _COMMITTED).exists()


def _absolute(directory: str | os.PathLike[str]) -> epath.Path:
    return epath.Path(storage.absolute(storage.path(directory)))  # Orbax refuses relative paths


def _free_bytes(root: epath.Path) -> int | None:
    """Free bytes of the file system that holds, or will hold, the folder; None where there is no such figure."""
    if storage.is_remote(root):
        return None
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
