"""One writer to a folder at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core_flax.storage import is_remote
from core_flax.types import UserError


@contextmanager
def only_writer(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock file ``path`` in this context; it goes with the process, however that ends.

    Raises:
      UserError: another process holds it (``refusal`` says so), or it cannot be made.
    """
    if is_remote(path):
        from core_flax.lease import leased  # with TensorStore, which takes its time to import

        with leased(str(path), refusal):
            yield
    else:
        with _locked(path, refusal):
            yield


@contextmanager
def _locked(path: Path, refusal: str) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
                raise UserError(refusal)  # its holder of a moment ago has removed it, and another may have made one
        except (BlockingIOError, FileNotFoundError) as error:  # removed by its holder, likewise
            raise UserError(refusal) from error
        except OSError as error:  # of a file system that has no locks
            raise UserError(f"cannot lock {path}: {error.strerror or error}; give a folder elsewhere") from error
        try:
            yield
        finally:
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # succeeds if nothing else was written: a refusal leaves no folder behind
