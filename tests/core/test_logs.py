"""The progress line on a terminal and in a pipe, metrics.jsonl after a crash, TensorBoard files, device peaks."""

import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import numpy as np
import pytest

from core_flax import curves, hardware, logs
from core_flax.types import UserError


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def make(clock, stream, **changes):
    settings = {"flops_per_step": 4e9, "peak_flops": 1e11, "stream": stream, "clock": clock} | changes
    return logs.Progress(1000, 0, 512, 8, **settings)


# metrics.jsonl


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_in_the_file_at_once(tmp_path):
    file = logs.MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.write(10, {"loss": np.float32(0.1), "count": 3, "bad": math.nan})
    file.close()
    got = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert got == '{"step": 10, "loss": 0.10000000149011612, "count": 3, "bad": null}\n'


def test_resuming_leaves_no_duplicates_and_no_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = logs.MetricsFile(path)
    for step in (10, 20, 30, 40):
        file.write(step, {"loss": 1.0})
    with path.open("a") as raw:
        raw.write('{"step": 50, "lo')
    file.close()
    resumed = logs.MetricsFile(path)
    resumed.truncate_after(20)
    resumed.write(30, {"loss": 2.0})
    resumed.close()
    assert read(path) == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 1.0}, {"step": 30, "loss": 2.0}]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_is_dropped_even_if_it_reads_as_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    logs.MetricsFile(path).truncate_after(5)
    assert path.read_text() == '{"step": 1}\n'


def test_truncating_what_is_open_or_missing(tmp_path):
    file = logs.MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(0)
    file.write(1, {})
    file.write(2, {})
    file.truncate_after(1)
    file.write(2, {"again": 1})
    file.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "again": 1}]


@pytest.mark.parametrize("line", ["nonsense\n", "[1]\n", '{"loss": 1}\n', '{"step": "x"}\n'])
def test_a_file_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        logs.MetricsFile(path).truncate_after(5)
    assert path.read_text() == '{"step": 1}\n' + line


def test_a_disk_that_is_full_is_named():
    """/dev/full takes nothing; what could not be written is not tried again on closing."""
    file = logs.MetricsFile(Path("/dev/full"))
    with pytest.raises(UserError, match=r"^/dev/full could not be written: No space left on device$"):
        file.write(1, {"loss": 1.0})
    file.close()


# The progress line


def test_plain_lines_in_a_pipe():
    clock, out = Clock(), io.StringIO()
    progress = make(clock, out)
    clock.now += 30.0
    assert progress.update(10, {"loss": 9.0, "mlm_accuracy": 0.01}, 25.0) == {}
    clock.now += 2.0
    rates = progress.update(20, {"loss": 8.5, "mlm_accuracy": 0.0256}, 0.5)
    progress.message("a remark")
    progress.close()
    assert rates == pytest.approx(
        {"sequences_per_second": 40, "tokens_per_second": 2560, "mfu": 0.2, "data_wait": 0.25}
    )
    assert out.getvalue().splitlines() == [
        "step 10/1000  loss 9.000  mlm_accuracy 0.01000",
        "step 20/1000  loss 8.500  mlm_accuracy 0.02560  40 sequences/s  2.56k tokens/s  MFU 20.0%  data wait 25.0%  "
        "ETA 3m16s",
        "a remark",
    ]


def test_rates_leave_out_compilation_and_pauses():
    clock = Clock()
    progress = make(clock, io.StringIO())
    clock.now += 100.0
    progress.start_clock(1)
    progress.start_clock(1)
    clock.now += 9.0
    assert progress.update(10, {})["sequences_per_second"] == pytest.approx(8)
    with progress.pause("evaluating"):
        clock.now += 1000.0
    with pytest.raises(KeyboardInterrupt), progress.pause("saving"):
        clock.now += 1000.0
        raise KeyboardInterrupt
    clock.now += 10.0
    assert progress.update(20, {})["sequences_per_second"] == pytest.approx(8)


def test_rates_are_recent():
    clock = Clock()
    progress = make(clock, io.StringIO())
    for step in range(10, 210, 10):
        progress.update(step, {})
        clock.now += 10.0
    for step in range(210, 310, 10):
        rates = progress.update(step, {}, 4.0)
        clock.now += 5.0
    assert rates["sequences_per_second"] == pytest.approx(16)
    assert rates["data_wait"] == pytest.approx(0.8)


def test_no_mfu_without_a_peak():
    clock, out = Clock(), io.StringIO()
    progress = make(clock, out, peak_flops=None)
    for step in (10, 20):
        clock.now += 1.0
        rates = progress.update(step, {})
    assert "mfu" not in rates
    assert "MFU" not in out.getvalue()


def test_a_silent_host_computes_and_prints_nothing():
    clock, out = Clock(), io.StringIO()
    progress = make(clock, out, silent=True)
    for step in (10, 20):
        clock.now += 1.0
        rates = progress.update(step, {"loss": 1.0})
    progress.message("a remark")
    progress.close()
    assert rates["sequences_per_second"] == pytest.approx(80)
    assert out.getvalue() == ""


class Terminal:
    """A pseudo terminal of a given width; ``stream`` is its inside, ``screen()`` what a user would have seen."""

    def __init__(self, columns):
        self._outer, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
        self.stream = os.fdopen(inner, "w", encoding="utf-8")
        self._seen = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        while True:
            try:
                self._seen += os.read(self._outer, 65536)
            except OSError:  # how Linux says that the inside was closed
                return

    def raw(self):
        self.stream.close()
        self._reader.join()
        os.close(self._outer)
        return self._seen.decode()


def frames(raw):
    """Every state of every line: carriage returns go back to a line's start."""
    return [frame for line in raw.split("\n") for frame in line.split("\r") if frame.strip()]


BERT = {
    "loss": 6.1234,
    "mlm_accuracy": 0.1234,
    "mlm_loss": 5.4,
    "next_sentence_accuracy": 0.5123,
    "next_sentence_loss": 0.7,
}
"""As a jitted step returns them: in the order of their names."""


@pytest.mark.parametrize(("columns", "more"), [(100, ""), (140, " mlm_loss 5.400 ns_loss 0.7000")])
def test_one_bar_on_a_terminal(columns, more):
    clock, terminal = Clock(), Terminal(columns)
    progress = logs.Progress(
        125000, 12000, 65536, 512, flops_per_step=4e13, peak_flops=1e14, stream=terminal.stream, clock=clock
    )
    for step in range(12010, 12060, 10):
        clock.now += 4.2
        progress.update(step, BERT, 0.1)
    with progress.pause("evaluating"):
        clock.now += 5.0
    progress.message("step 12050: held-out loss 6.0")
    progress.update(12060, BERT)
    progress.close()
    raw = terminal.raw()
    seen = frames(raw)
    want = f"12050/125000  loss 6.123 mlm 12.3% ns 51.2%{more}  1.22k seq/s 156k tok/s MFU 95% wait 2% ETA 13h10m"
    assert any(frame.endswith(want) for frame in seen), seen
    assert any(frame.endswith("12050/125000  evaluating") for frame in seen)
    assert "step 12050: held-out loss 6.0" in seen
    assert max(len(frame) for frame in seen) <= columns
    assert raw.count("\n") == 2, "one for the message, one at the end"
    assert seen[-1].startswith("█") or seen[-1].startswith(("▏", "▎", "▍", "▌", "▋", "▊", "▉"))


def test_a_narrow_terminal_drops_the_least_important_values():
    clock, terminal = Clock(), Terminal(70)
    progress = logs.Progress(125000, 0, 65536, 512, stream=terminal.stream, clock=clock)
    for step in (10, 20):
        clock.now += 4.2
        progress.update(step, BERT)
    progress.close()
    seen = frames(terminal.raw())
    assert seen[-1].endswith("20/125000  loss 6.123  1.22k seq/s 156k tok/s wait 0% ETA 14h34m")
    assert max(len(frame) for frame in seen) <= 70


def test_a_terminal_that_does_not_tell_its_width():
    class Fake(io.StringIO):
        def isatty(self):
            return True

    out = Fake()
    progress = logs.Progress(100, 0, 128, 1, stream=out, clock=Clock())
    progress.update(10, {"loss": 1.0})
    progress.close()
    assert out.getvalue().split("\r")[-1].rstrip("\n").endswith("10/100  loss 1.000")
    assert len(out.getvalue().split("\r")[-1].rstrip("\n")) == logs.DEFAULT_COLUMNS


def test_summary(tmp_path):
    clock, out = Clock(), io.StringIO()
    progress = make(clock, out)
    clock.now += 20.0
    progress.update(10, {"loss": 9.0})
    clock.now += 99.0
    with progress.pause("evaluating"):
        clock.now += 31.0
    progress.update(1000, {"loss": 2.34567, "mlm_accuracy": 0.5})
    assert progress.summary(tmp_path) == [
        "1000 steps in 2m30s, 512k tokens, 5.12k tokens/s (compilation, evaluation and checkpoints apart)",
        "training, last: loss 2.346  mlm_accuracy 0.5000",
        f"checkpoints: {tmp_path}",
    ]


def test_the_summary_of_a_single_step_tells_no_rate():
    """That step compiles; the loop starts the clock when it is done, and writes its figures a moment later."""
    clock = Clock()
    progress = make(clock, io.StringIO())
    clock.now += 20.0
    progress.start_clock(1)
    clock.now += 0.01
    progress.update(1, {"loss": 9.0})
    assert progress.summary() == ["1 step in 20s, 512 tokens", "training, last: loss 9.000"]


def test_summary_of_a_run_that_was_complete():
    progress = logs.Progress(100, 100, 1, 1, stream=io.StringIO(), clock=Clock())
    assert progress.summary() == ["nothing to train: step 100 of 100 was reached before"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (3600, "1h00m"), (93784, "1d02h")]
)
def test_durations(seconds, text):
    assert logs._duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (15795, "15.8k"), (2e9, "2G")]
)
def test_counts(number, text):
    assert logs._count(number) == text


# TensorBoard


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = curves.open_tensorboard(tmp_path, 0)
    for step in (10, 20, 30):
        first.write(step, {"train/loss": step / 10})
    first.close()
    resumed = curves.open_tensorboard(tmp_path, 20)
    resumed.write(30, {"train/loss": 7.0, "held_out/loss": 8.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert points == [(10, 1.0), (20, 2.0), (30, 7.0)]
    assert [event.value for event in events.Scalars("held_out/loss")] == [8.0]
    anew = curves.open_tensorboard(tmp_path, 0)  # as after a kill before the first checkpoint
    anew.write(10, {"train/loss": 9.0})
    anew.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 9.0)]
    assert "tensorflow" not in sys.modules


def test_without_tensorboard_there_is_no_writer(monkeypatch, tmp_path):
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda name: None)
    assert curves.open_tensorboard(tmp_path, 0) is None


# Quiet libraries


def test_libraries_report_errors_only():
    """In a process of its own: the level of a logger is global."""
    code = """
import sys, warnings
warnings.simplefilter("error")
from core_flax import logs
assert "jax" not in sys.modules and "tensorboard" not in sys.modules
logs.quiet_libraries()
import logging, absl.logging, orbax.checkpoint, jax
absl.logging.warning("UNWANTED")
logging.getLogger("orbax.checkpoint").warning("UNWANTED")
logging.getLogger("jax._src.dispatch").warning("UNWANTED")
jax.jit(lambda x: x + 1)(1)
absl.logging.error("WANTED 1")
logging.getLogger("jax._src.xla_bridge").warning("WANTED 2")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert re.findall(r"(?:UN)?WANTED.*", done.stderr) == ["WANTED 1", "WANTED 2"]
    assert len(done.stderr.splitlines()) == 2


# Devices


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v3", 61.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("TPU v4 lite", None),
        ("TPU v9", None),
        ("NVIDIA A1000", None),
        ("NVIDIA GB200", None),
    ],
)
def test_peaks(kind, peak):
    assert hardware.peak_flops(kind) == peak
