"""A step that does not end is reported, with the stack of every thread: what a run that hangs is waiting for."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

STANDARD_ERROR = 2


class Watchdog:
    """Watches, from a thread of its own, how long the step under way takes; it reports, and ends nothing.

    After ``seconds``, and whenever twice as long has passed as at the report before, a line and the stacks are written
    to the process's standard error, past anything in Python that stands in for it.
    """

    def __init__(self, seconds: float, process: int) -> None:
        """Starts to watch.

        Args:
          seconds: how long a step may take; 0: however long it likes.
          process: number of this process in its run, for the report.
        """
        self._seconds, self._process = seconds, process
        self._under_way: tuple[int, float] | None = None  # step, and when it began; None: nothing is watched
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    def begin(self, step: int) -> None:
        """Says that a step begins, so the one before has ended."""
        self._under_way = step, time.monotonic()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is watched in this context; after it, the step under way has its time anew."""
        before, self._under_way = self._under_way, None
        try:
            yield
        finally:
            if before is not None:
                self.begin(before[0])

    def close(self) -> None:
        """Ends watching."""
        self._closed.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        reported, limit, wait = None, self._seconds, self._seconds
        while not self._closed.wait(wait):
            wait, watched = self._seconds, self._under_way
            if watched is None:
                continue
            if watched is not reported:
                reported, limit = watched, self._seconds
            step, began = watched
            if time.monotonic() - began >= limit:
                self._report(step, limit)
                limit *= 2
            # At most until the next step that begins could be due.
            wait = min(wait, max(0.0, began + limit - time.monotonic()))

    def _report(self, step: int, seconds: float) -> None:
        line = f"process {self._process}: step {step} has not ended after {seconds:g} s; the stack of every thread:\n"
        os.write(STANDARD_ERROR, line.encode())
        faulthandler.dump_traceback(STANDARD_ERROR, all_threads=True)
