"""Being told to stop: the first signal saves, a second one ends the run at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Process

from core_flax.checkpoint import list_steps
from core_flax.signals import EXIT_INTERRUPTED, stop_on_signal

LONG = {"train__num_steps": 100_000, "checkpoint__every_steps": 0}


def wait_for(process, text):
    """Reads the output up to a line with the text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_the_next_run_goes_on_from_there(bert_flax, tmp_path, number):
    with bert_flax.start(*bert_flax.pretrain(tmp_path, **LONG)) as process:
        wait_for(process, "step 3/")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    (step,) = list_steps(tmp_path / "checkpoints")
    assert process.returncode == EXIT_INTERRUPTED == 75
    assert err.splitlines()[-1] == f"bert-flax: {number.name}: step {step} is saved; run the same command to resume"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step

    again = bert_flax.run(*bert_flax.pretrain(tmp_path, **LONG | {"train__num_steps": step + 1}))
    assert again.returncode == 0 and again.stderr == ""
    assert f"resumes at step {step}" in again.stdout
    assert f"step {step + 1}/" in again.stdout and f"step {step}/" not in again.stdout


def children(pid):
    """Processes that a process has started."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_the_workers_too_saves(bert_flax, tmp_path, number):
    """A scheduler's, or Ctrl-C in a terminal: every process gets it."""
    with bert_flax.start(*bert_flax.pretrain(tmp_path, **LONG, inputs__num_workers=2)) as process:
        wait_for(process, "step 3/")
        family = [*children(process.pid), process.pid]
        assert len(family) >= 3
        for pid in family:
            os.kill(pid, number)
        _, err = process.communicate(timeout=60)
    (step,) = list_steps(tmp_path / "checkpoints")
    assert process.returncode == 75
    assert err.splitlines() == [f"bert-flax: {number.name}: step {step} is saved; run the same command to resume"]
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in family)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_signal_exits_at_once(bert_flax, tmp_path, number):
    with bert_flax.start(*bert_flax.pretrain(tmp_path, **LONG)) as process:
        wait_for(process, "starts")  # the first step is being compiled: there is no step to end with for a while
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert list_steps(tmp_path / "checkpoints") == []


def test_a_second_signal_need_not_wait_for_python():
    """Handlers run between bytecodes of the main thread, which may be inside one compilation for minutes."""
    program = """
import hashlib
from core_flax.signals import stop_on_signal
with stop_on_signal():
    print("starts", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    with Process([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        wait_for(process, "starts")
        for _ in range(2):
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count()
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count()) == before
    assert signal.set_wakeup_fd(-1) == -1
