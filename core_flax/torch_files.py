"""Reading what torch.save wrote, without torch and without executing anything that the file asks for.

Such a file is a pickle, a program: a plain unpickler calls any function of any module that it names. The one here knows
a handful of names, those that a dict of tensors consists of, and binds each to a stand-in of its own; any other name
ends the reading. Both layouts are read: the zip archive of torch 1.6 and later, and the sequence of pickles before it.
"""

import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from core_flax.types import UserError

REMEDY = "if you trust the file, load it in torch and save its tensors as safetensors"
_ZIP = b"PK\x03\x04"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

ReadStorage = Callable[[str], bytes]


class _Storage(NamedTuple):
    """A run of numbers of one type, in the file under a key; a view is a part of it."""

    dtype: str
    key: str
    size: int
    view_offset: int = 0


class _Tensor(NamedTuple):
    """An array to be: where its numbers lie in a storage, counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildTensor:
    """Stands for torch._utils._rebuild_tensor and _v2. Without attributes, so that no pickle can change it."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    """Stands for torch._utils._rebuild_parameter: the tensor is all of it that matters."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> Any:
        return tensor


_TYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_ADMITTED: dict[str, Any] = _TYPES | {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _RebuildTensor(),
    "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
    "torch._utils._rebuild_parameter": _RebuildParameter(),
}


class _TensorUnpickler(pickle.Unpickler):
    """Looks names up in _ADMITTED and nowhere else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ADMITTED:
            raise UserError(f"it asks for {module}.{name}, and only tensors are read from such a file")
        return _ADMITTED[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        # No other name will do for a type: NumPy takes a class for "objects", and reads the file's bytes as addresses.
        if kind != "storage" or type(dtype) is not str or dtype not in _TYPES.values() or type(key) is not str:
            raise ValueError("a storage has no type or key")
        if view and view[0] is not None:  # the part of a storage that several tensors share, in old files
            _, offset, size = view[0]
            return _Storage(dtype, key, size, offset)
        return _Storage(dtype, key, size)


def _load(file: IO[bytes]) -> Any:
    """The next pickle in the file.

    What it remembers goes into a list by numbers that it gives itself. A writer counts; a number beyond the bytes that
    came before was put there to fill the memory.
    """
    start = file.tell()
    for opcode, argument, place in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > (place or 0):
            raise ValueError(f"number {argument} at byte {place}")
    file.seek(start)
    return _TensorUnpickler(file).load()


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name, of a file that holds a dict of tensors (a model's ``pytorch_model.bin``).

    Raises:
      UserError: the file cannot be read, is damaged or cut short, or asks for anything else than tensors.
    """
    try:
        with path.open("rb") as file:
            read = _read_archive if file.read(len(_ZIP)) == _ZIP else _read_sequence
            file.seek(0)
            return read(file)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}; {REMEDY}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever half a file, or a hostile one, may lead to
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} is damaged or was not written by torch.save ({reason}); get it again") from error


def _read_archive(file: IO[bytes]) -> dict[str, np.ndarray]:
    """A zip archive: NAME/data.pkl, and NAME/data/KEY for every storage."""
    with zipfile.ZipFile(file) as archive:

        def read(name: str) -> bytes:
            info = archive.getinfo(name)
            if info.compress_type != zipfile.ZIP_STORED:  # torch does not compress: what unpacks may be of any size
                raise ValueError(f"{name} is compressed")
            return archive.read(info)

        names = archive.namelist()
        (home,) = (name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl"))
        if f"{home}byteorder" in names and read(f"{home}byteorder").decode() != sys.byteorder:
            raise UserError("it was written on a machine of another byte order")
        state = _load(io.BytesIO(read(f"{home}data.pkl")))
        return _arrays(state, lambda key: read(f"{home}data/{key}"))


def _read_sequence(file: IO[bytes]) -> dict[str, np.ndarray]:
    """Pickles one after the other (magic number, protocol, machine, tensors, keys), then the storages by these keys."""
    if _load(file) != _MAGIC or _load(file) != _PROTOCOL:
        raise ValueError("no magic number")
    if _load(file)["little_endian"] != (sys.byteorder == "little"):
        raise UserError("it was written on a machine of another byte order")
    state, keys = _load(file), _load(file)
    widths = {tensor.storage.key: _numpy_dtype(tensor.storage.dtype).itemsize for tensor in _named(state).values()}
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        (size,) = struct.unpack("<q", file.read(8))
        num_bytes = size * widths[key]
        places[key] = file.tell(), num_bytes
        file.seek(num_bytes, io.SEEK_CUR)

    def read(key: str) -> bytes:
        start, num_bytes = places[key]
        file.seek(start)
        return file.read(num_bytes)

    return _arrays(state, read)


def _named(state: Any) -> dict[str, _Tensor]:
    """The tensors by name. Raises UserError if there is anything else."""
    if not isinstance(state, dict):
        raise UserError(f"it holds a {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise UserError(f"{str(name)[:80]!r} in it is no tensor but a {type(value).__name__}")
    return dict(state)


def _arrays(state: Any, read: ReadStorage) -> dict[str, np.ndarray]:
    return {name: _array(tensor, read(tensor.storage.key)) for name, tensor in _named(state).items()}


def _array(tensor: _Tensor, content: bytes) -> np.ndarray:
    """The array, contiguous. Raises ValueError unless all of it lies within the storage."""
    storage, dtype = tensor.storage, _numpy_dtype(tensor.storage.dtype)
    room = len(content) // dtype.itemsize
    if math.prod(tensor.shape) > room:  # a stride of 0 could make a terabyte of one number
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is larger than its storage of {room}")
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    offset = (storage.view_offset + tensor.offset) * dtype.itemsize
    x = np.ndarray(tensor.shape, dtype, content, offset, strides)  # which checks the bounds
    return x.copy(order="C")


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(jnp.bfloat16 if name == "bfloat16" else name)
