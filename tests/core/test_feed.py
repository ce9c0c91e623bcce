import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from core_flax.data.feed import ordered_map, prefetch
from core_flax.types import UserError


def batch(step, fail_at=None, offset=0):
    if step == fail_at:
        raise UserError(f"no step {step}")
    return {"x": np.full(3, step + offset)}


def slow_when_even(step):
    time.sleep(0.02 * (step % 2 == 0))
    return step


def process_id(item):
    return os.getpid(), item


def end_process(item):
    os._exit(3)


@pytest.mark.parametrize("workers", [{"num_threads": 0}, {"num_threads": 3}, {"num_workers": 2}])
def test_batches_come_in_order(workers):
    found = [batch["x"][0] for batch in prefetch(functools.partial(batch, offset=7), 5, 25, **workers)]
    assert found == list(range(12, 32))


def test_order_does_not_depend_on_speed():
    assert list(prefetch(slow_when_even, 0, 12, num_threads=4)) == list(range(12))


def test_no_end():
    batches = prefetch(slow_when_even, 3, None)
    assert [next(batches) for _ in range(4)] == [3, 4, 5, 6]
    batches.close()


def test_nothing_to_do():
    assert list(prefetch(slow_when_even, 4, 4)) == []


@pytest.mark.parametrize("workers", [{"num_threads": 2}, {"num_workers": 2}])
def test_errors_come_at_their_step(workers):
    batches = prefetch(functools.partial(batch, fail_at=3), 0, 10, **workers)
    assert [next(batches)["x"][0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="no step 3"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_work_is_done_ahead_but_not_far():
    started = []
    batches = prefetch(started.append, 0, 100, num_threads=2, buffer=4)
    next(batches)
    deadline = time.monotonic() + 10
    while len(started) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(started) == 5  # the one that was asked for, and the buffer
    batches.close()


def test_closing_ends_threads_and_processes():
    for workers in ({"num_threads": 3}, {"num_workers": 2}):
        batches = prefetch(batch, 0, None, **workers)
        next(batches)
        batches.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]
        assert not multiprocessing.active_children()


def test_processes_do_the_work():
    for results in (ordered_map(process_id, range(40), num_processes=2), prefetch(process_id, 0, 40, num_workers=2)):
        found = list(results)
        assert [item for _, item in found] == list(range(40))
        assert os.getpid() not in {pid for pid, _ in found}


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_dead_worker_is_reported(num_processes):
    """And the others, which wait for work behind a lock that it may have held, are ended."""
    with pytest.raises(UserError, match="worker process died"):
        list(ordered_map(end_process, range(3), num_processes=num_processes))
    assert not multiprocessing.active_children()


GROUP_SCRIPT = """
import signal, sys, time
sys.path.insert(0, sys.argv[1])
from test_feed import process_id
from core_flax.data.feed import ordered_map
if __name__ == "__main__":
    heard = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
    found = ordered_map(process_id, range(200), num_processes=2)
    items = [next(found)] if sys.argv[2] == "at work" else []
    print("ready", flush=True)
    items.append(next(found))
    time.sleep(0.3)
    items += found
    print([item for _, item in items] == list(range(200)), *sorted(heard))
"""


@pytest.mark.parametrize("moment", ["at work", "being started"])
def test_a_signal_to_the_group_is_the_parents_alone(tmp_path, moment):
    """As a terminal's Ctrl-C or a scheduler sends it, from the outside."""
    script = tmp_path / "script.py"
    script.write_text(GROUP_SCRIPT)
    command = [sys.executable, str(script), os.path.dirname(__file__), moment]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd(), start_new_session=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        time.sleep(0.03)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(parent.pid, number)
        assert parent.communicate(timeout=60)[0] == "True SIGINT SIGTERM\n"


ORPHAN_SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_feed import process_id
from core_flax.data.feed import ordered_map
if __name__ == "__main__":
    pids = ordered_map(process_id, range(10**6), num_processes=2)
    print(*{next(pids)[0] for _ in range(20)}, flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHAN_SCRIPT)
    command = [sys.executable, str(script), os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
