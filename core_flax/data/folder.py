"""The folder that a ``prepare`` command writes: one writer, complete exactly when its manifest is there."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from core_flax.lock import only_writer
from core_flax.types import UserError

MANIFEST = "manifest.json"
LOCK = "prepare.lock"

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


@contextmanager
def own_folder(directory: Path, own_files: re.Pattern[str]) -> Iterator[None]:
    """Make the folder, for this process alone, empty of what an earlier run left.

    Raises:
      UserError: it holds files whose names ``own_files`` does not match, another process writes to it, or the disk
        refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in directory.iterdir() if not own_files.fullmatch(path.name))
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
    if foreign:
        raise UserError(f"{directory} holds other files ({foreign[0]}); give an empty or a new folder as --output")
    refusal = f"another prepare is writing to {directory}; wait for it or take another folder"
    with only_writer(directory / LOCK, refusal):
        (directory / MANIFEST).unlink(missing_ok=True)  # first of all: from here on nothing is complete
        for path in directory.iterdir():
            if path.name != LOCK:
                path.unlink()
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {directory}: {error.strerror or error}; free space and run again") from error


def replace(directory: Path, prepare: Callable[[Path], T]) -> T:
    """Prepare beside a complete folder and put the new one in its place: bad input loses nothing."""
    new, old = (directory.with_name(f"{directory.name}.{which}") for which in ("new", "old"))
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
