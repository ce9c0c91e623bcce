"""``flax-launch local``: a job of several processes on this machine's CPU, as a rehearsal of one on several hosts."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TextIO

from core_flax.config import check_range
from core_flax.distributed import ADDRESS, COUNT, NUMBER
from core_flax.signals import EXIT_INTERRUPTED
from core_flax.types import UserError

GRACE_SECONDS = 10.0
"""How long the others may take to end by themselves, and to say why, once one has failed."""
SAVING_SECONDS = 60.0
"""The same once one has ended because it was told to stop: the others are still saving."""


@dataclass(frozen=True)
class LocalCommand:
    """Runs a training command as several processes on this machine, joined as the hosts of a cluster are.

    What each prints begins with its number. When one fails, the others are ended, and the exit status is the first
    failure's. SIGTERM and SIGINT are passed on to all.
    """

    processes: int = 2
    """Processes of the job."""
    devices: int = 1
    """CPU devices of each process."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "processes", "devices", least=1)


def run(command: LocalCommand, argv: Sequence[str]) -> int:
    """Runs ``argv`` as the processes of a job, to their end.

    Returns:
      0, or the exit status of the first process that failed: 128 + n if signal n ended it.

    Raises:
      UserError: there is no such program.
    """
    if shutil.which(argv[0]) is None:
        raise UserError(f"{argv[0]}: there is no such program; give the command to run after --")
    with contextlib.ExitStack() as stack:
        address = f"localhost:{stack.enter_context(_free_port())}"
        job: list[subprocess.Popen[str]] = []
        stack.callback(_end, job)
        with _passing_on_signals(job):
            for number in range(command.processes):
                job.append(_start(argv, _environment(os.environ, command, address, number)))
            pipes = [_print_lines(number, process) for number, process in enumerate(job)]
            status = _wait(job)
            _end(job)
        for thread in (thread for pair in pipes for thread in pair):
            thread.join()
        return status


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile; the coordinator may listen there all the same."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("localhost", 0))
        yield held.getsockname()[1]


def _environment(env: Mapping[str, str], command: LocalCommand, address: str, number: int) -> dict[str, str]:
    flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={command.devices}".strip()
    job = {ADDRESS: address, COUNT: str(command.processes), NUMBER: str(number)}
    # With fewer threads than collectives in flight, XLA's can miss their rendezvous; it takes NPROC for the cores.
    threads = {"NPROC": str(max(16, 4 * command.devices))}
    return {**threads, **env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", **job}


def _start(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # Its own group, which can be ended with all that it has started, and which Ctrl-C in a terminal does not reach
        # besides what is passed on.
        start_new_session=True,
        preexec_fn=_end_with_parent,  # no thread runs yet
    )


def _end_with_parent() -> None:
    """In the child: SIGKILL when the launcher itself is killed, so that no orphan is left (Linux has this)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        set_death_signal = 1
        prctl(set_death_signal, signal.SIGKILL)


def _print_lines(number: int, process: subprocess.Popen[str]) -> tuple[threading.Thread, threading.Thread]:
    """Two threads that print what the process prints, line by line, with its number."""

    def copy(source: TextIO, target: TextIO) -> None:
        with source:
            for line in source:
                target.write(f"[{number}] {line.rstrip()}\n")
                target.flush()

    assert process.stdout and process.stderr
    pairs = (process.stdout, sys.stdout), (process.stderr, sys.stderr)
    threads = tuple(threading.Thread(target=copy, args=pair, name=f"process {number}", daemon=True) for pair in pairs)
    for thread in threads:
        thread.start()
    return threads[0], threads[1]


@contextlib.contextmanager
def _passing_on_signals(job: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        for process in job:
            process.send_signal(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(job: Sequence[subprocess.Popen[str]]) -> int:
    """Waits for all, or for one to fail and the others to have had their time. Returns the first failure's status."""
    first, deadline = 0, float("inf")
    while any(process.poll() is None for process in job) and time.monotonic() < deadline:
        failed = [(number, process) for number, process in enumerate(job) if process.poll()]
        if failed and not first:
            first = _report(*failed[0], len(job))
            deadline = time.monotonic() + (SAVING_SECONDS if first == EXIT_INTERRUPTED else GRACE_SECONDS)
        time.sleep(0.05)
    failed = [(number, process) for number, process in enumerate(job) if process.poll()]
    return first or (_report(*failed[0], len(job)) if failed else 0)


def _report(number: int, process: subprocess.Popen[str], count: int) -> int:
    """Says how a process failed, unless it has told that itself. Returns its exit status."""
    status = _status(process)
    if status != EXIT_INTERRUPTED:
        _say(f"process {number} of {count} {_ending(process)}; ending the others")
    return status


def _status(process: subprocess.Popen[str]) -> int:
    code = process.returncode
    return 128 - code if code < 0 else code


def _ending(process: subprocess.Popen[str]) -> str:
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"


def _end(job: Sequence[subprocess.Popen[str]]) -> None:
    """Kills what still runs, with all that it has started, and waits for it."""
    for process in job:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _say(line: str) -> None:
    print(f"flax-launch: {line}", file=sys.stderr, flush=True)
