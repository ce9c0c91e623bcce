"""Where runs and their files lie: local folders, and buckets of Google Cloud Storage as gs:// addresses.

A bucket keeps whole objects by their names: nothing is appended, renamed or locked there. So a file is written at once,
as ``replacing`` does anyway, a text that grows is an ``Appender``, and a lock is a lease (core_flax/lease.py). A gs://
path is an ``epath.Path``, which has the methods of pathlib's that are used here; to all other code it is a Path.
"""

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

from core_flax.types import UserError

_BUCKET = "gs://"
APPEND_SECONDS = 60.0
"""Between two writings of a text that grows, unless it is told to be written."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is an address rather than a local path."""
    return "://" in str(path)


def path(name: str | os.PathLike[str]) -> Path:
    """A local path, or a bucket's."""
    return _in_bucket(str(name)) if is_remote(name) else Path(name)


def absolute(path: Path) -> Path:
    """The path from the root; that of a bucket always is."""
    return path if is_remote(path) else path.absolute()


def make_folder(folder: Path) -> None:
    """Makes a folder, and those it lies in; a bucket has none that are empty. Raises UserError as ``writing`` does."""
    if not is_remote(folder):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def folder(option: str, name: str) -> Path:
    """The folder that an option names, here or in a bucket. Raises UserError if it cannot be one, or not be reached."""
    if not name.startswith(_BUCKET) and is_remote(name):
        raise UserError(f"{option} {name}: give a local folder, or one in a bucket as gs://BUCKET/FOLDER")
    if not is_remote(name):
        return local_folder(option, name)
    if not name.removeprefix(_BUCKET).strip("/").partition("/")[2]:
        raise UserError(f"{option} {name}: give a folder in a bucket, as gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{option} {name} needs the package gcsfs; install the extra [gcs]: pip install -e .[gcs]")
    found = _in_bucket(name)
    with writing(found, "reached"):
        found.exists()
    return found


def local_folder(option: str, name: str) -> Path:
    """The folder that an option names. Raises UserError if it names none, or one that is not a local file's."""
    if not name:
        raise UserError(f"{option} is empty; give a folder")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise UserError(f"{option} {name!r}: the name is not UTF-8; give another folder")
    if is_remote(name):
        raise UserError(f"{option} {name}: only local folders can be read and written here; mount it, or copy it")
    return Path(name)


def _in_bucket(name: str) -> Path:
    # Read when gcsfs and epath are imported. Of epath's clients for gs:// TensorFlow would be taken where it is
    # installed; what gcsfs does for buckets of other kinds begins with asking a second service which kind this is.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from etils import epath
    from fsspec import config

    # Listings that are remembered would not show what other processes of a run have written.
    config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return cast(Path, epath.Path(name.rstrip("/")))


@contextlib.contextmanager
def writing(path: Path, what: str = "written") -> Iterator[None]:
    """Raises UserError that names the file if the system does not let us write it, as a full disk does not."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be {what}: {error.strerror or _line(error)}") from error
    except Exception as error:
        if not is_remote(path) or type(error).__module__.partition(".")[0] not in ("gcsfs", "google", "aiohttp"):
            raise
        raise UserError(f"{path} could not be {what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of ``path``, or is gone. Raises UserError as ``writing`` does."""
    with writing(path):
        if is_remote(path):
            with tempfile.TemporaryDirectory() as here:
                yield (partial := Path(here) / path.name)
                path.write_bytes(partial.read_bytes())
            return
        if path.exists() and not path.is_file():  # such as /dev/null or a pipe: written itself
            yield path
            return
        whole = path.resolve()  # where a link leads is replaced, not the link
        # A name that no file of the user's has, nor one that another process is writing beside it.
        partial = whole.with_name(f".{whole.name}.{os.getpid()}.tmp")
        try:
            yield partial
            partial.replace(whole)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises UserError if a local file cannot be written: before hours are spent on what it is to hold.

    The folders it lies in are made. A named pipe is left alone: whoever reads it would take this for all there is.
    """
    make_folder(path.parent)
    if path.is_fifo():
        return
    with writing(path):
        was_there = path.exists()
        path.open("a").close()
        if not was_there:
            path.unlink()


def files(folder: Path) -> list[Path]:
    """The files in a folder and in those in it, in order of their names. A bucket's path has no rglob."""
    found = [each for path in folder.iterdir() for each in (files(path) if path.is_dir() else [path])]
    return sorted(found, key=str)


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A local folder to write into, for programs that write nowhere else; what is in it is then in ``folder``."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as here:
        (local := Path(here) / folder.name).mkdir()
        yield local
        with writing(folder):
            for file in files(local):
                (folder / str(file.relative_to(local))).write_bytes(file.read_bytes())


def open_to_append(path: Path) -> "TextIO | Appender":
    """A text file, which is made if need be, and to whose end is written."""
    if is_remote(path):
        return Appender(path)
    make_folder(path.parent)
    return path.open("a", encoding="utf-8")


class Appender:
    """A text that grows, in a bucket: written as a whole, once in APPEND_SECONDS at most, when told to, and at its end.

    So a process that is killed loses what was appended since. A run writes it before each checkpoint: what is lost is
    what the run, when it goes on, appends again.
    """

    def __init__(self, path: Path) -> None:
        """Goes on after what is there."""
        self._path = path
        self._text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._written, self._when = len(self._text), time.monotonic()

    def write(self, text: str) -> None:
        """Appends."""
        self._text += text

    def flush(self) -> None:
        """Writes it if it is time."""
        if time.monotonic() - self._when >= APPEND_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Writes it unless that was done. Raises as writing to the bucket does."""
        if len(self._text) > self._written:
            self._path.write_text(self._text, encoding="utf-8")
            self._written, self._when = len(self._text), time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self.sync()
