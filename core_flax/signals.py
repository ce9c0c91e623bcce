"""Being told to stop: the first signal asks for a checkpoint and an orderly end, a second one ends it at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 75
"""Exit status after a signal, the run being saved (EX_TEMPFAIL of sysexits.h: run the same command again)."""


class Interrupted(Exception):
    """The run was told to stop, has saved its state and can be resumed."""


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
        if flag.signal is not None:
            os._exit(128 + number)
        flag.signal = signal.Signals(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
