"""Weights in the files that other programs share: arrays by name, read and written in NumPy, without torch.

``model.safetensors``, whole or in shards with an index, or else the older ``pytorch_model.bin`` of torch.save.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from core_flax.storage import replacing
from core_flax.torch_files import read_torch
from core_flax.types import UserError

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class Weights:
    """Arrays by their names in the files; what was floating point there is float32 here."""

    arrays: dict[str, np.ndarray]
    files: tuple[str, ...]
    """Names of the files that were read."""
    converted: tuple[str, ...]
    """What was of another type, in words: "103 arrays from float16 to float32"."""


@dataclass(frozen=True)
class Report:
    """What came of reading weights.

    Attributes:
      files: what was read.
      missing: heads that the weights lack.
      unused: names of arrays that belong to no part of the model.
      notes: what else is to be known, a line each.
    """

    files: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the user."""
        lines = [f"read: {', '.join(self.files)}"]
        lines += [f"missing, new where it is needed: {name}" for name in self.missing]
        return [*lines, *(f"unused: {name}" for name in self.unused), *self.notes]


def read_weights(folder: Path) -> Weights:
    """All the weights of a model's folder; safetensors where there are both kinds.

    Raises:
      UserError: there are none, a shard or an array that the index names is missing, a file is damaged or cut short, or
        an array is of a type that is no plain number.
    """
    for name, read in ((SAFETENSORS, _read_safetensors), (TORCH, read_torch)):
        if (folder / name).is_file():
            return _weights(read(folder / name), (name,))
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder, f"{name}.index.json", read)
    there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise UserError(
        f"{folder} holds no weights: give a folder with {SAFETENSORS} or {TORCH} (or either in shards with its "
        f"index); there is: {there or 'nothing'}"
    )


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file in the form that transformers expects. A file that is there is replaced, whole.

    Raises:
      UserError: the disk is full, or does not let us write there.
    """
    # The writer takes an array's memory as it lies: a transposed one would come out scrambled.
    contiguous = {name: np.array(x, order="C") for name, x in arrays.items()}
    with replacing(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # which says of a full disk that it cannot serialize
            raise UserError(f"{path} could not be written: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises UserError if it is missing or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; get it again")
    return content


def config_from(path: Path, stored: Mapping[str, Any], names: Mapping[str, str], defaults: Any) -> Any:
    """A config of ours from the JSON object of theirs.

    Args:
      path: of their file, for messages.
      stored: what it holds.
      names: their names of our fields.
      defaults: a config of ours; its values stand where theirs lacks one, and their types are those that are wanted.

    Raises:
      UserError: a value is of another type, or the config refuses it.
    """
    fields = {}
    for theirs, ours in names.items():
        default = getattr(defaults, ours)
        value = stored.get(theirs, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) not in kinds:
            what = {bool: "neither true nor false", int: "no whole number"}.get(type(default), "no number")
            raise UserError(f"{path}: {theirs} is {value!r}, which is {what}")
        fields[ours] = value
    try:
        return dataclasses.replace(defaults, **fields)
    except UserError as error:
        raise UserError(f"{path} describes no model that can be built ({error})") from error


def _read_shards(folder: Path, index: str, read: Callable[[Path], dict[str, np.ndarray]]) -> Weights:
    places = read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / index} has no weight_map; get it again")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{folder / index} names {file!r}, which is no file of its folder; it is refused")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder / index} names {', '.join(missing)}, not in the folder; get the missing shards")
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        shard = read(folder / file)
        lacking = [name for name, place in places.items() if place == file and name not in shard]
        twice = [name for name in shard if name in arrays]
        if lacking or twice:
            what = f"lacks {lacking[0]}" if lacking else f"holds {twice[0]}, which another shard holds as well"
            raise UserError(f"{folder / file} {what}: it does not belong to {index}; get them together again")
        arrays |= shard
    return _weights(arrays, tuple(files))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            for name, kind in kinds.items():
                if kind not in ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"):
                    raise UserError(f"{name} in {path} is of type {kind}, which cannot be read; convert it to float32")
            return {name: file.get_tensor(name) for name in kinds}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}); get it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _weights(arrays: dict[str, np.ndarray], files: tuple[str, ...]) -> Weights:
    """With floating point as float32. float16 and bfloat16 fit exactly; float64 is rounded."""
    changes: Counter[str] = Counter()
    for name, x in arrays.items():
        if x.dtype.kind in "fV" and x.dtype != np.float32:  # V: bfloat16
            changes[str(x.dtype)] += 1
            arrays[name] = x.astype(np.float32)
    converted = tuple(f"{count} arrays from {dtype} to float32" for dtype, count in sorted(changes.items()))
    return Weights(arrays, files, converted)
