"""The folder that a ``prepare`` command writes: one writer, complete exactly when its manifest is there."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from core_flax.lock import only_writer
from core_flax.types import UserError

MANIFEST = "manifest.json"
LOCK = "prepare.lock"
_MARKS = re.compile(r"prepare\.lock|.*\.partial|(train|valid)\.(index|ends)\.npy")
"""Files are ours by these beside them: a vocab.txt alone is the user's."""

T = TypeVar("T")


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def content(files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over those of a manifest's files: equal exactly when two folders hold the same."""
    hashes = {name: entry["sha256"] for name, entry in sorted(files.items())}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def check_file(directory: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError if a file that the manifest's ``files`` list is missing or has another size."""
    path, expected = directory / name, files[name]["bytes"]
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
        raise UserError(f"{path} {state}; run prepare again with --overwrite")


def write_manifest(directory: Path, values: Mapping[str, Any]) -> None:
    """Write manifest.json, atomically and, by whoever calls this, last."""
    partial = directory / (MANIFEST + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(directory / MANIFEST)


def read_manifest(directory: str | Path, kind: str | None, format: int, make: Callable[[dict[str, Any]], T]) -> T:
    """Read manifest.json.

    Args:
      directory: the folder.
      kind: what its field "kind" must be; None: it has none, as those of BERT's folders.
      format: what its field "format" must be.
      make: makes of its values what is returned.

    Raises:
      UserError: the folder is not complete, of another kind or format, or damaged.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        state = "not complete" if path.parent.is_dir() else "missing"
        raise UserError(f"data folder {directory} is {state} (no {MANIFEST}); make it with prepare")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("kind") != kind:
            wanted = f", not {kind!r}" if kind else ""
            raise UserError(f"{directory} holds data of kind {stored.get('kind')!r}{wanted}; give another folder")
        if stored["format"] != format:
            raise UserError(f"{path} has format {stored['format']}, not {format}; run prepare again with --overwrite")
        return make(stored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); run prepare again with --overwrite") from error


@dataclass(frozen=True)
class OwnFiles:
    """Which files of a folder prepare may remove.

    Attributes:
      names: what those that it writes are called.
      read: inputs and the like that must not be among them; names of what is no file are fine.
    """

    names: re.Pattern[str]
    read: Sequence[str]

    def refuse_others(self, directory: Path) -> None:
        """Raises UserError at a file that is not ours, or that is to be read: ours will be removed."""
        names = sorted(path.name for path in directory.iterdir())
        marked = any(map(_MARKS.fullmatch, names))
        foreign = [name for name in names if not (marked and self.names.fullmatch(name))]
        if foreign:
            raise UserError(f"{directory} holds other files ({foreign[0]}); give an empty or a new folder as --output")
        for name in filter(os.path.exists, self.read):
            path = Path(name)
            if directory.resolve() in (path.resolve(), path.resolve().parent, path.parent.resolve()):
                raise UserError(
                    f"{name} is to be read, but lies in {directory}, which is emptied; give another --output"
                )


@contextmanager
def own_folder(directory: Path, own_files: OwnFiles) -> Iterator[None]:
    """Make the folder, for this process alone, empty of what an earlier run left; on an error, empty it again.

    Raises:
      UserError: it holds files of others, or that are to be read; another process writes to it; the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own_files.refuse_others(directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    refusal = f"another prepare is writing to {directory}; wait for it or take another folder"
    with only_writer(directory / LOCK, refusal):
        _clear(directory)
        try:
            yield
        except BaseException as error:
            _clear(directory)
            if not isinstance(error, OSError):
                raise
            raise UserError(f"cannot write {directory}: {error.strerror or error}; free space and run again") from error


def _clear(directory: Path) -> None:
    (directory / MANIFEST).unlink(missing_ok=True)  # first of all: from here on nothing is complete
    for path in directory.iterdir():
        if path.name != LOCK:
            path.unlink()


def replace(directory: Path, own_files: OwnFiles, prepare: Callable[[Path], T]) -> T:
    """Prepare beside a complete folder and put the new one in its place: bad input loses nothing.

    Raises:
      UserError: the folder, or one beside it that would be removed, holds files of others, or that are to be read.
    """
    new, old = (directory.with_name(f"{directory.name}.{which}") for which in ("new", "old"))
    for each in filter(Path.exists, (directory, new, old)):
        own_files.refuse_others(each)
    (new / MANIFEST).unlink(missing_ok=True)  # of a run that was interrupted before it could move it
    made = prepare(new)
    if old.exists():
        shutil.rmtree(old)
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)
    return made


def token_type(num_tokens: int) -> np.dtype:
    """The type that token ids have on disk."""
    return np.dtype("<u2") if num_tokens <= 1 << 16 else np.dtype("<u4")
