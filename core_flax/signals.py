"""Being told to stop: the first signal asks for a checkpoint and an orderly end, a second one ends it at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

EXIT_INTERRUPTED = 75
"""Exit status after a signal, the run being saved (EX_TEMPFAIL of sysexits.h: run the same command again)."""
EXIT_NOT_FINITE = 70
"""Exit status after a loss or gradient that is not finite (EX_SOFTWARE: the same command would end there again)."""

EXIT_PEER_LOST = 76
"""Exit status when another process of the run was lost (EX_PROTOCOL): the same command goes on from the last save."""


class Stopped(Exception):
    """A run that ended before its last step, with nothing lost that was good; its text is one line for the user."""

    status: ClassVar[int]
    """Exit status of the process."""


class Interrupted(Stopped):
    """The run was told to stop, has saved its state and can be resumed."""

    status = EXIT_INTERRUPTED


class StopFlag:
    """Set by the first signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Turns SIGTERM and SIGINT into a flag in this context; a second one exits at once with 128 + its number."""
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        flag.signal = flag.signal or signal.Signals(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    with _second_exits(numbers):
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield flag
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _second_exits(numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Counts signals in a thread: Python runs handlers in the main one, which may be inside a compilation for minutes.

    The interpreter writes the number of every signal that has a handler into a pipe the moment it comes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        count = 0
        while came := os.read(reader, 1):
            count += came[0] in numbers
            if count == 2:
                os._exit(128 + came[0])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)
