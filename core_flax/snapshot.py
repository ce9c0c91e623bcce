"""One checkpoint on disk: arrays, and a manifest that lets every bit of them be verified.

``<step>/arrays`` holds the arrays under our own names as nested dicts ("params", "encoder", "kernel"), written by
Orbax. ``<step>/manifest/manifest.json`` holds the schema's version, the step, the held-out metrics, the loop's notes,
shape, dtype and fingerprint of every array by its name ("params/encoder/kernel"), and a checksum of itself. No name of
a framework's class is needed to read it, and nothing depends on how many devices wrote it.
"""

import json
import logging
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from core_flax import storage
from core_flax.distributed import agree
from core_flax.params import path_of
from core_flax.state import TrainState
from core_flax.types import Array, Params, UserError

SCHEMA = 1
_ORBAX = f"{os.sep}orbax{os.sep}"
_NOT_BEGUN = r"coroutine '[^']*(read|deserialize)[^']*' was never awaited"  # a warning has no more of it than its name

Manifest = dict[str, Any]
"""Content of manifest.json: schema, step, metrics or None, notes if there are any, arrays (by name: shape, dtype,
fingerprint), checksum."""


class DamagedError(Exception):
    """A checkpoint whose bytes are not those that were saved; the text is the reason."""


class UnreadableError(DamagedError):
    """One that the first process can read and another cannot, which may be that one's fault."""


def named_leaves(tree: Any) -> dict[str, Array]:
    """Arrays by path ("params/encoder/kernel"), in the order of jax.tree.leaves.

    These are the names on disk: keys of dicts and names of fields, never the class of a container.
    """
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def fingerprints(named: Mapping[str, Array]) -> dict[str, int]:
    """A 32-bit fingerprint of every array, the same however the array is split over devices.

    With the elements' bits as unsigned integers x_i in the order of the flat array: the sum of mix(x_i) (mix(i) | 1)
    modulo 2^32, where mix is a one-to-one function of 32 bits. An odd factor has an inverse, so a change of any single
    element shows. mix is for changes of many: without it two flipped signs cancel, or two exchanged rows.
    """
    return dict(zip(named, np.asarray(_fingerprints(list(named.values()))).tolist(), strict=True)) if named else {}


@jax.jit
def _fingerprints(arrays: list[Array]) -> Array:
    return jnp.stack([_fingerprint(jnp.asarray(x)) for x in arrays])


def _fingerprint(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        bits = x.astype(jnp.uint32)
    else:  # a 64-bit element counts as two
        bits = jax.lax.bitcast_convert_type(x, f"uint{min(32, 8 * x.dtype.itemsize)}").astype(jnp.uint32)
    index, stride = jnp.uint32(0), 1
    # From the dims' own indices: to flatten an array that is split over devices would gather it on each of them.
    for dim in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    return jnp.sum(_mix(bits) * (_mix(index) | 1), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = x * jnp.uint32(0x9E3779B1)  # carries low bits up; what follows carries high bits down
    return x ^ (x >> 16)


def make_writer() -> ocp.AsyncCheckpointer:
    """What writes the content of a checkpoint: into a folder beside its own, renamed when all is written."""
    # It logs the traceback of a failure in the background, which its wait_until_finished raises besides.
    logging.getLogger("absl").addFilter(_not_orbax)
    # Uncompressed: compression takes 8 % off float32 arrays, for two to four times the CPU time of writing them. The
    # inner handler is named because it alone writes in one transaction: where a write fails, the outer one's default
    # leaves others running in the background.
    arrays = ocp.BasePyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    handlers = {
        "arrays": ocp.PyTreeCheckpointHandler(handler_impl=arrays),
        "manifest": ocp.JsonCheckpointHandler(filename="manifest.json"),
    }
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))


def content(
    step: int, named: Mapping[str, Array], metrics: Mapping[str, float] | None, notes: Mapping[str, Any] | None = None
) -> ocp.args.Composite:
    """The content of a checkpoint, for the writer; waits for the arrays to be computed."""
    marks = fingerprints(named)
    arrays = {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": marks[name]} for name, x in named.items()
    }
    noted = {"notes": dict(notes)} if notes else {}
    manifest = seal({"schema": SCHEMA, "step": step, "metrics": _floats(metrics), **noted, "arrays": arrays})
    return ocp.args.Composite(arrays=ocp.args.PyTreeSave(_nested(named)), manifest=ocp.args.JsonSave(manifest))


def add_metrics(folder: epath.Path, metrics: Mapping[str, float] | None) -> None:
    """Give a checkpoint that was saved without metrics those that were computed later. Raises as read_manifest does."""
    manifest = read_manifest(folder)
    if metrics and manifest["metrics"] is None and jax.process_index() == 0:
        with storage.replacing(cast(Path, _manifest_path(folder))) as partial:
            partial.write_text(json.dumps(seal(manifest | {"metrics": _floats(metrics)})))


def seal(manifest: Manifest) -> Manifest:
    """The manifest with the checksum of all the rest of it."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def read_manifest(folder: epath.Path) -> Manifest:
    """Read the manifest of the checkpoint in a folder.

    Raises:
      DamagedError: it is missing, or not what was saved.
      UserError: another version of this package wrote it.
    """
    path = _manifest_path(folder)
    try:
        manifest = json.loads(path.read_text())
        intact = manifest["checksum"] == seal(manifest)["checksum"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise DamagedError(f"its manifest cannot be read: {reason(error)}") from error
    if not intact:
        raise DamagedError("its manifest does not have the bits that were saved")
    if manifest["schema"] != SCHEMA:
        raise UserError(
            f"{path} has schema {manifest['schema']} and this version reads {SCHEMA}; use the version that wrote it"
        )
    return manifest


def read_state(folder: epath.Path, abstract: TrainState) -> TrainState:
    """The state, its arrays placed by the shardings of ``abstract``. Every process must come here.

    Raises:
      DamagedError: not every bit is as it was saved.
      UserError: its arrays are not those of ``abstract``.
    """
    wanted, manifest, arrays, failure = named_leaves(abstract), {}, {}, ""
    try:
        manifest = read_manifest(folder)
        _check_fit(manifest, wanted, folder)
        arrays = _read_arrays(folder, wanted)
    except DamagedError as error:
        failure = str(error)
    # What one process could not read none has: the bits of arrays that lie on several are compared by all of them.
    _raise_any(failure, UnreadableError)
    try:
        _check_bits(manifest, arrays)
    except DamagedError as error:  # of an array that lies on each of them, one alone may have other bits
        failure = str(error)
    _raise_any(failure, DamagedError)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _raise_any(failure: str, of_another: type[DamagedError]) -> None:
    """Raises DamagedError if the first process comes here with a failure, what is given if another does. All must."""
    failures = {number: each for number, each in enumerate(agree(failure)) if each}
    if 0 in failures:
        raise DamagedError(failures[0])
    for number, each in failures.items():
        raise of_another(f"process {number}: {each}")


def read_params(folder: epath.Path, sharding: jax.sharding.Sharding | None) -> Params:
    """The parameters alone, their moving average where there is one.

    Raises:
      DamagedError: not every bit of them is as it was saved.
    """
    manifest = read_manifest(folder)
    part = "ema" if any(name.startswith("ema/") for name in manifest["arrays"]) else "params"
    wanted = {
        name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=sharding)
        for name, entry in manifest["arrays"].items()
        if name.startswith(f"{part}/")
    }
    arrays = _read_arrays(folder, wanted)
    _check_bits(manifest, arrays)
    return _nested(arrays)[part]


def _check_fit(manifest: Manifest, wanted: Mapping[str, Any], folder: epath.Path) -> None:
    """Raises UserError naming the first few arrays that are missing, not wanted, or of another shape or dtype."""
    stored = {name: f"{entry['dtype']}{entry['shape']}" for name, entry in manifest["arrays"].items()}
    needed = {name: f"{x.dtype}{list(x.shape)}" for name, x in wanted.items()}
    faults = [f"lacks {name}" for name in needed if name not in stored]
    faults += [f"has {name} besides" for name in stored if name not in needed]
    faults += [
        f"has {name} as {stored[name]}, not {needed[name]}"
        for name in needed
        if name in stored and stored[name] != needed[name]
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"the checkpoint in {folder} is of another model or optimizer: it {', it '.join(faults[:3])}{more}; "
            "run with the settings it was saved with, or in a new workdir"
        )


def _read_arrays(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Array]:
    """Arrays by name, placed as ``wanted`` says. Raises DamagedError if they cannot be read.

    A process reads what lies on its own devices and waits for nobody.
    """
    home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    how = {}
    for name, x in wanted.items():
        sharding = getattr(x, "sharding", None) or home
        sharding.shard_shape(tuple(x.shape))  # raises where it does not divide, which would look like damage below
        how[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=tuple(x.shape), dtype=x.dtype)
    args = ocp.args.PyTreeRestore(item=_nested(wanted), restore_args=_nested(how), partial_restore=True)
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    _hide_stray_reports()
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            read = traverse_util.flatten_dict(reader.restore(folder / "arrays", args=args), sep="/")
        arrays = {name: read[name] for name in wanted}
    except Exception as error:  # whatever a reader of half a file may raise
        causes = _causes(error)
        if any(isinstance(cause, MemoryError | jax.errors.JaxRuntimeError) for cause in causes):
            raise  # that says nothing about the files
        raise DamagedError(f"its arrays cannot be read: {reason(causes[-1])}") from error
    return arrays


def _check_bits(manifest: Manifest, arrays: Mapping[str, Array]) -> None:
    """Raises DamagedError unless every bit is as it was saved."""
    for name, fingerprint in fingerprints(arrays).items():
        if fingerprint != manifest["arrays"][name]["fingerprint"]:
            raise DamagedError(f"{name} does not have the bits that were saved")


def _hide_stray_reports() -> None:
    """Keeps what a failed read leaves behind off the screen; the exception it raises says it all.

    One array's failure makes Orbax give up the loop in which it reads the others. Python then reports every read that
    had not begun, every one that was under way, and every one that ends after that, whenever it comes to it.
    """
    warnings.filterwarnings("ignore", _NOT_BEGUN, RuntimeWarning)
    if not isinstance(sys.unraisablehook, _QuietHook):
        sys.unraisablehook = _QuietHook(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(_not_tensorstore)


class _QuietHook:
    """A sys.unraisablehook that passes on all but the reports on Orbax's coroutines and TensorStore's callbacks."""

    def __init__(self, following: Callable[[Any], Any]) -> None:
        self._following = following

    def __call__(self, report: Any) -> None:
        code = getattr(report.object, "cr_code", None)
        of_orbax = code is not None and _ORBAX in code.co_filename
        of_tensorstore = report.object is None and str(report.exc_value) == "Event loop is closed"
        if not (of_orbax or of_tensorstore):
            self._following(report)


def _not_tensorstore(record: logging.LogRecord) -> bool:
    return "tensorstore" not in str(record.exc_info[1] if record.exc_info else "").lower()


def _not_orbax(record: logging.LogRecord) -> bool:
    return _ORBAX not in record.pathname


def _causes(error: BaseException) -> list[BaseException]:
    """The exception, what caused it, and so on."""
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    return causes


def reason(error: BaseException, limit: int = 120) -> str:
    """What an error of a library says, as part of a line for the user."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore puts the cause after a long path
        return os.strerror(int(number[1]))
    line = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _manifest_path(folder: epath.Path) -> epath.Path:
    return folder / "manifest" / "manifest.json"


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(named), sep="/")


def _floats(metrics: Mapping[str, float] | None) -> dict[str, float] | None:
    return {name: float(value) for name, value in metrics.items()} if metrics else None
