"""Work done ahead of time, by threads or processes, handed on in order."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from core_flax.types import UserError

T = TypeVar("T")
R = TypeVar("R")


def prefetch(
    make_batch: Callable[[int], R],
    start_step: int,
    stop_step: int | None,
    num_threads: int = 2,
    num_workers: int = 0,
    buffer: int = 4,
) -> Generator[R, None, None]:
    """The batches of steps ``start_step``, ``start_step + 1``, ... in order, computed ahead.

    Since a batch is a pure function of its step there is nothing to save or restore: to resume, start at another step.

    Args:
        make_batch: the batch of a step; with ``num_workers`` it must be picklable.
        start_step: first step.
        stop_step: the step after the last one; None: no end.
        num_threads: threads that compute batches (numpy lets them run side by side in part).
        num_workers: processes that compute batches instead; 0: threads.
        buffer: batches that are computed or under way before they are asked for.

    Raises:
        Whatever ``make_batch`` raises, at the step concerned. Closing the iterator ends its threads and processes.
    """
    steps = itertools.count(start_step) if stop_step is None else range(start_step, stop_step)
    return ordered_map(make_batch, steps, num_threads=num_threads, num_processes=num_workers, ahead=buffer)


def ordered_map(
    function: Callable[[T], R], items: Iterable[T], num_threads: int = 0, num_processes: int = 0, ahead: int = 4
) -> Generator[R, None, None]:
    """``map(function, items)`` by several threads or processes (if both are 0: in the caller), at most ``ahead`` early.

    ``items`` is read in the calling thread. ``function`` goes to each process once, so it may hold what is large.
    """
    if not num_threads and not num_processes:
        yield from map(function, items)
        return
    executor, call = _executor(function, num_threads, num_processes)
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        for item in items:
            with _signals_blocked():  # this may start a process, which inherits what is blocked
                waiting.append(executor.submit(call, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most often because memory ran out; take fewer with --num-workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keeps SIGINT and SIGTERM waiting meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _executor(function: Callable[[T], R], num_threads: int, num_processes: int) -> tuple[Executor, Callable[[T], R]]:
    if not num_processes:
        return ThreadPoolExecutor(num_threads, thread_name_prefix="feed"), function
    # Spawned, not forked: the parent may hold an accelerator and has threads, which a fork would copy half.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # started later, with the first process, it would unblock the signals
    return ProcessPoolExecutor(num_processes, context, initializer=_start_worker, initargs=(function,)), _call


_function: Callable[[Any], Any] | None = None
"""In a worker process: what it computes."""


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Makes this process one that computes ``function`` and ends with its parent, but not with its group.

    Ctrl-C and a scheduler's SIGTERM reach the whole group: the parent then saves, and wants its workers until it has.
    Both signals are blocked here from the process's first moment (``ordered_map``), so neither can come too early.
    """
    global _function
    _function = function
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None, "workers are started by a parent process"
    if sys.platform == "darwin":  # cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    else:
        threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_when_told(by: int) -> None:
    """The executor ends its workers by SIGTERM when one of them has died; from anyone else it means the parent."""
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != by:
        pass
    os._exit(1)


def _end_with(parent: BaseProcess) -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None, "the worker was not started by _start_worker"
    return _function(item)
