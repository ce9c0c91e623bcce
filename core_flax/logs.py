"""What a run prints and writes while it trains: one progress line, metrics.jsonl, a summary."""

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from absl import logging as absl_logging
from tqdm import tqdm

from core_flax import storage
from core_flax.storage import replacing, writing
from core_flax.types import UserError

WINDOW_SECONDS = 30.0
"""Rates and the time that is left come from about this much recent training time."""
DEFAULT_COLUMNS = 100
"""Assumed width of a terminal that does not tell."""


def quiet_libraries() -> None:
    """Keep libraries' remarks off a clean run's output; their errors still show. Call it before jax is imported.

    absl (orbax, tfds), jax and XLA report at level INFO and WARNING what a user can do nothing about. One warning of
    jax's stays: that a GPU is there but the installed jax cannot use it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in ("jax", "orbax", "flax", "etils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    logging.getLogger("jax").propagate = False  # jax prints by itself; absl's handler would print the same again
    absl_logging.set_verbosity(absl_logging.ERROR)


@dataclass(frozen=True)
class Interval:
    """Figures of the steps since the last record, added up in order.

    A run that is resumed goes on with the sums of the run before, so its records are those of one that never stopped.
    """

    num_steps: int = 0
    sums: Mapping[str, float] = field(default_factory=dict)

    def plus(self, figures: Mapping[str, float]) -> "Interval":
        """The interval with one more step."""
        sums = {name: self.sums.get(name, 0.0) + value for name, value in figures.items()}
        return Interval(self.num_steps + 1, sums)

    def means(self) -> dict[str, float]:
        """What a record says."""
        return {name: total / self.num_steps for name, total in self.sums.items()}


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with its step, appended as training goes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | storage.Appender | None = None
        self._known: set[tuple[int, str]] = set()  # (step, name) of the step that the run goes on from

    def truncate_after(self, step: int) -> None:
        """Drop records of later steps, which a resumed run will write again, and a last line that a kill cut short.

        Raises:
            UserError: If the file holds something else than records, or cannot be written.
        """
        self.close()
        if not self._path.exists():
            return
        lines = self._path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if self._belongs(line, step, number, len(lines))]
        if len(kept) < len(lines):
            with replacing(self._path) as partial:
                partial.write_text("".join(kept), encoding="utf-8")

    def _belongs(self, line: str, step: int, number: int, count: int) -> bool:
        if number == count and not line.endswith("\n"):
            return False
        try:
            record = json.loads(line)
            if record["step"] == step:
                self._known |= {(step, name) for name in record}
            return record["step"] <= step
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self._path} line {number} is no record of metrics; move the file away") from error

    def has(self, step: int, name: str) -> bool:
        """Whether a record of the step that the run goes on from (``truncate_after``) has this figure already."""
        return (step, name) in self._known

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a record; it is in the file when this returns. What is not finite becomes null.

        Raises:
            UserError: If it cannot be written; what was of it is dropped by ``truncate_after``.
        """
        record = {"step": step} | {name: _finite_or_none(value) for name, value in values.items()}
        try:
            with writing(self._path):
                if self._file is None:
                    self._file = storage.open_to_append(self._path)
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
        except UserError:
            with contextlib.suppress(OSError):  # closing tries once more to write what did not fit
                self.close()
            self._file = None
            raise

    def sync(self) -> None:
        """See that what was written outlives this process, in a bucket too."""
        if isinstance(self._file, storage.Appender):
            with writing(self._path):
                self._file.sync()

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _finite_or_none(value: float) -> float | None:
    # NaN and Infinity are no JSON: other readers than Python's would reject the line.
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


class _Bar(tqdm):
    """tqdm without its helper thread and its lock between processes: there is one bar in one process."""

    monitor_interval = 0


_Bar.set_lock(threading.RLock())


class _Mark(NamedTuple):
    """A moment of a run: steps done, seconds of training (pauses left out), of these spent waiting for data, tokens."""

    step: int
    seconds: float
    waited: float
    tokens: int


class Progress:
    """The progress line: a bar that redraws itself on a terminal, else a plain line for every update.

    Rates come from the time between updates. What comes before the first update (or ``start_clock``), when the step is
    compiled, and what happens inside ``pause`` is left out.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        tokens_per_step: int,
        examples_per_step: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        *,
        stream: TextIO | None = None,
        silent: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Starts the line.

        Args:
            total_steps: Step at which the run ends.
            start_step: Step at which it starts: 0, or that of the restored checkpoint.
            tokens_per_step: Tokens of the global batch.
            examples_per_step: Sequences of the global batch.
            flops_per_step: Operations of one step, forward and backward; None: unknown, no MFU is shown.
            peak_flops: Operations a second of all devices together; None: unknown, no MFU is shown.
            stream: Where to print; None: standard output.
            silent: Print nothing (every host but the first); ``update`` still returns the rates.
            clock: Seconds that only go up; for tests.
        """
        self._total, self._step = total_steps, start_step
        self._tokens, self._examples, self._peak_flops = tokens_per_step, examples_per_step, peak_flops
        self._mfu_per_rate = flops_per_step / peak_flops if flops_per_step and peak_flops else None
        self._stream, self._silent, self._clock = stream or sys.stdout, silent, clock
        self._start, self._began = start_step, clock()
        self._paused, self._waited, self._tokens_done = 0.0, 0.0, 0
        self._window: deque[_Mark] = deque()
        self._first: _Mark | None = None
        self._values: dict[str, float] = {}
        self._bar: _Bar | None = None
        if not silent and self._stream.isatty():
            layout: dict[str, Any] = {"bar_format": "{bar} {desc}", "ncols": _columns(self._stream)}
            self._bar = _Bar(total=total_steps, initial=start_step, file=self._stream, **layout)
            self._draw(["compiling"])

    def change_cost(self, tokens_per_step: int, flops_per_step: float | None) -> None:
        """Say that steps from here on are of another size; rates start anew."""
        self._tokens = tokens_per_step
        self._mfu_per_rate = flops_per_step / self._peak_flops if flops_per_step and self._peak_flops else None
        while len(self._window) > 1:
            self._window.popleft()

    def start_clock(self, step: int) -> None:
        """Say that ``step`` steps are done, among them the first of this run, which compiles. Optional."""
        if self._first is None:
            self._mark(step)

    def update(self, step: int, values: Mapping[str, float], wait_seconds: float = 0.0) -> dict[str, float]:
        """Show where training stands.

        Args:
            step: Steps done, those of earlier runs included.
            values: Losses and metrics since the last update. "loss" is shown first, its parts ("mlm_loss") last; a
                narrow terminal shows as many as there is room for, and accuracies in percent.
            wait_seconds: Seconds since the last update that were spent waiting for data.

        Returns:
            sequences_per_second, tokens_per_second, data_wait (a share of the time) and, where the devices' peak is
            known, mfu (a share of it). Empty at the first update.
        """
        self._waited += wait_seconds
        self._mark(step)
        self._values = dict(sorted(values.items(), key=lambda item: (item[0] != "loss", item[0].endswith("_loss"))))
        rates = self._rates()
        if self._bar is not None:
            self._draw([_short(name, value) for name, value in self._values.items()], self._figures(rates, short=True))
        else:
            shown = [f"{name} {value:#.4g}" for name, value in self._values.items()]
            self.message("  ".join([f"step {step}/{self._total}", *shown, *self._figures(rates, short=False)]))
        return rates

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Leave out of all rates what happens inside; ``what`` ("evaluating") is shown meanwhile on a terminal."""
        began = self._clock()
        if self._bar is not None:
            self._draw([what])
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._silent:
            print(text, file=self._stream, flush=True)

    def summary(self, checkpoints: Path | None = None) -> list[str]:
        """Closing lines: steps, time, tokens, average rate, last values, and where the checkpoints lie."""
        steps = self._step - self._start
        if not steps:
            lines = [f"nothing to train: step {self._step} of {self._total} was reached before"]
        else:
            done = f"{steps} step{'s' if steps > 1 else ''} in {_duration(self._clock() - self._began)}"
            lines = [f"{done}, {_count(self._tokens_done)} tokens"]
            last = self._window[-1]
            # After a single step, the one that compiles, there is no rate to tell.
            if self._first is not None and last.step > self._first.step and last.seconds > self._first.seconds:
                rate = (last.tokens - self._first.tokens) / (last.seconds - self._first.seconds)
                lines[0] += f", {_count(rate)} tokens/s (compilation, evaluation and checkpoints apart)"
        if self._values:
            lines.append("training, last: " + "  ".join(f"{name} {value:#.4g}" for name, value in self._values.items()))
        if checkpoints is not None:
            lines.append(f"checkpoints: {checkpoints}")
        return lines

    def close(self) -> None:
        """Leave the bar as it stands and go to a new line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _mark(self, step: int) -> None:
        self._tokens_done += (step - self._step) * self._tokens
        mark = _Mark(step, self._clock() - self._paused, self._waited, self._tokens_done)
        self._step, self._first = step, self._first or mark
        self._window.append(mark)
        while len(self._window) > 2 and mark.seconds - self._window[1].seconds >= WINDOW_SECONDS:
            self._window.popleft()

    def _rates(self) -> dict[str, float]:
        old, new = self._window[0], self._window[-1]
        seconds = new.seconds - old.seconds
        if seconds <= 0 or new.step <= old.step:
            return {}
        rate = (new.step - old.step) / seconds
        rates = {"sequences_per_second": rate * self._examples, "tokens_per_second": rate * self._tokens}
        if self._mfu_per_rate is not None:
            rates["mfu"] = rate * self._mfu_per_rate
        return rates | {"data_wait": min(1.0, (new.waited - old.waited) / seconds)}

    def _figures(self, rates: Mapping[str, float], short: bool) -> list[str]:
        if not rates:
            return []
        sequences, tokens = _count(rates["sequences_per_second"]), _count(rates["tokens_per_second"])
        shown = (
            [f"{sequences} seq/s", f"{tokens} tok/s"] if short else [f"{sequences} sequences/s", f"{tokens} tokens/s"]
        )
        if "mfu" in rates:
            shown.append(f"MFU {rates['mfu']:{'.0%' if short else '.1%'}}")
        shown.append(f"wait {rates['data_wait']:.0%}" if short else f"data wait {rates['data_wait']:.1%}")
        if self._step < self._total:
            seconds = (self._total - self._step) * self._examples / rates["sequences_per_second"]
            shown.append(f"ETA {_duration(seconds)}")
        return shown

    def _draw(self, values: list[str], figures: Sequence[str] = ()) -> None:
        assert self._bar is not None
        self._bar.ncols = _columns(self._stream)
        head, tail = f"{self._step}/{self._total}", " ".join(figures)
        # One cell and a space at least are the bar's. What does not fit is dropped, the least important value first:
        # metrics.jsonl has them all.
        room = self._bar.ncols - 2 - len(f"{head}  {tail}")
        while values and len(" ".join(values)) + 2 > room:
            values = values[:-1]
        self._bar.n = self._step
        self._bar.set_description_str("  ".join(group for group in (head, " ".join(values), tail) if group))


def _columns(stream: TextIO) -> int:
    """Width of the terminal, now: it may have been resized."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    except (OSError, ValueError):
        return DEFAULT_COLUMNS


def _short(name: str, value: float) -> str:
    """``mlm_accuracy`` 0.612 as "mlm 61.2%", ``next_sentence_loss`` 0.5 as "ns_loss 0.500": room is scarce."""
    *words, last = name.split("_")
    stem = "".join(word[0] for word in words) if len(words) > 1 else "".join(words)
    if last == "accuracy":
        return f"{stem or name} {value:.1%}"
    return f"{stem}_{last} {value:#.4g}" if stem else f"{name} {value:#.4g}"


def _count(number: float) -> str:
    """1234567 as "1.23M"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """Its two largest units: 2d03h, 5h07m, 3m20s, 7s."""
    left = round(seconds)
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m{left % 60:02}s"
    if left < 86400:
        return f"{left // 3600}h{left % 3600 // 60:02}m"
    return f"{left // 86400}d{left % 86400 // 3600:02}h"
