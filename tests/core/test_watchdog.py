"""A step that hangs is reported with what it waits for; a run that is merely compiling, evaluating or saving is not."""

import contextlib
import os
import re
import signal
import threading
import time
from pathlib import Path

from core_flax.watchdog import Watchdog


def reports(text):
    """(process, step, seconds) of each report."""
    found = re.findall(
        r"^process (\d+): step (\d+) has not ended after ([\d.]+) s; the stack of every thread:$", text, re.M
    )
    return [(int(process), int(step), float(seconds)) for process, step, seconds in found]


def wait_forever(let_go):
    let_go.wait(1.0)


def test_a_step_that_hangs_is_reported_whenever_its_time_has_doubled(capfd):
    with contextlib.closing(Watchdog(0.1, process=3)) as watchdog:
        watchdog.begin(7)
        wait_forever(threading.Event())
        watchdog.begin(8)
        time.sleep(0.15)
    out, err = capfd.readouterr()
    assert out == ""
    assert reports(err) == [(3, 7, 0.1), (3, 7, 0.2), (3, 7, 0.4), (3, 7, 0.8), (3, 8, 0.1)]
    first = err.partition("has not ended after 0.2 s")[0]
    assert "in wait_forever" in first and "in _watch" in first  # this thread's stack, and another's


def test_what_may_take_long_is_not_reported(capfd):
    with contextlib.closing(Watchdog(0.1, process=0)) as watchdog:
        time.sleep(0.2)  # no step has begun
        for step in range(1, 6):
            watchdog.begin(step)
            time.sleep(0.05)
        with watchdog.pause():
            time.sleep(0.2)
        time.sleep(0.05)  # less than its time, though with what came before the pause it is more
    with contextlib.closing(Watchdog(0, process=0)) as watchdog:
        watchdog.begin(1)
        time.sleep(0.1)
    assert reports(capfd.readouterr().err) == []


def test_a_run_whose_data_do_not_come_is_reported_and_goes_on(bert_flax, tmp_path):
    """The workers that make its rows are stopped for a while, as by a file server that does not answer."""
    settings = {"train__num_steps": 100_000, "checkpoint__every_steps": 0, "inputs__num_workers": 1}
    with bert_flax.start(*bert_flax.pretrain(tmp_path, log__stall_seconds=1, **settings)) as process:
        for line in process.stdout:
            if "step 3/" in line:
                break
        threads = Path(f"/proc/{process.pid}/task").iterdir()
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
        for child in children:
            os.kill(child, signal.SIGSTOP)
        said, found = "", []
        while not found or found[-1][1] <= 3 or found[-1][2] < 2:  # the first rows too may have taken a second
            said += process.stderr.readline()
            found = reports(said)
        for child in children:
            os.kill(child, signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 75
    (_, step, first), (_, same, second) = found[-2:]
    assert (step, first, second) == (same, 1, 2)
    assert "core_flax/loop.py" in said.rpartition("after 1 s")[2]
    assert re.search(rf"SIGTERM: step ({step}|{step + 1}) is saved", rest)
