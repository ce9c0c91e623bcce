"""Where a task's official files lie, and the text in them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bert_flax.finetune.tasks import GLUE, TASKS, TaskSpec
from core_flax.types import UserError


def find_file(spec: TaskSpec, data: Path, split: str) -> Path:
    """The file of a split, in the task's own folder or in the folder of all of GLUE.

    Raises:
        UserError: there is none, or more than one, or the folder is that of another task.
    """
    if split not in spec.files:
        raise UserError(f"{spec.name} has no split {split!r}; it has {', '.join(spec.files)}")
    names = spec.files[split]
    if data.is_file():
        raise UserError(f"--data {data} is a file; give the folder that holds it, as {' or '.join(names)}")
    if not data.is_dir():
        raise UserError(f"--data {data} does not exist")
    owner = task_of(data)
    if spec.folder and owner not in (None, spec.name):
        raise UserError(f"--data {data} is the folder of task {owner}, not of {spec.name}")
    places = [f"{spec.folder}/{name}" for name in names if spec.folder] + list(names)
    found = [data / place for place in places if (data / place).is_file()]
    if not found:
        raise UserError(f"--data {data} lacks the {split} split of {spec.name}: there is no {' or '.join(places)}")
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} could both be the {split} split of {spec.name}; move one away")
    return found[0]


def task_of(folder: Path) -> str | None:
    """The task of GLUE that a folder of this name is of: several have the same columns."""
    name = folder.absolute().name
    return next((task.name for task in TASKS.values() if task.folder and task.folder == name), None)


def glue_tasks(data: Path) -> Mapping[str, tuple[str, ...]]:
    """The tasks of GLUE that have a folder in ``data``, each with the splits that are there."""
    splits = {
        name: tuple(
            split
            for split, names in TASKS[name].files.items()
            if any((data / TASKS[name].folder / file).is_file() for file in names)
        )
        for name in GLUE
    }
    return {name: there for name, there in splits.items() if there}


def read_json(path: Path, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON file holds; ``make_object`` makes an object of its pairs. Raises UserError if it is none."""
    try:
        return json.loads(read_text(path), object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists within lists within lists
        raise UserError(f"{path} is not JSON that can be read: {error}") from error


def read_text(path: Path) -> str:
    """The whole text of a file, without its byte order mark.

    Raises:
        UserError: it cannot be read, is blank, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        if raw.startswith(b"\x1f\x8b"):
            raise UserError(f"{path} is gzipped; unpack it (gunzip)") from error
        of = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise UserError(
            f"{path}:{line} is not UTF-8: byte {error.object[error.start]:#04x}; convert the file, for example with "
            f"iconv -f {of} -t UTF-8"
        ) from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text
