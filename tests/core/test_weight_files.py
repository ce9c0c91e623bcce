"""Files of weights, laid out by hand here byte for byte, and under [parity] as torch writes them."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from core_flax.torch_files import read_torch
from core_flax.types import UserError
from core_flax.weight_files import read_weights, write_safetensors

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
X = np.arange(6, dtype=np.float32)


# What torch.save writes, opcode by opcode


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor(key="0", size=6, offset=0, shape=(6,), strides=(1,), kind="FloatStorage", view=b""):
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += b"J" + struct.pack("<i", size) + view + b"tQ"
    rest = b"J" + struct.pack("<i", offset) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def state(**tensors):
    return b"\x80\x02}" + b"".join(text(name) + value + b"s" for name, value in tensors.items()) + b"."


def archive(path, program, compression=zipfile.ZIP_STORED, **storages):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("weights/data.pkl", program)
        file.writestr("weights/byteorder", "little")
        for key, x in storages.items():
            file.writestr(f"weights/data/{key.removeprefix('s')}", x.tobytes())
    return path


def sequence(path, program, little=True, **storages):
    keys = [key.removeprefix("s") for key in storages]
    heads = [pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, {"little_endian": little})]
    tails = [struct.pack("<q", x.size) + x.tobytes() for x in storages.values()]
    path.write_bytes(b"".join([*heads, program, pickle.dumps(keys, 2), *tails]))
    return path


LAYOUTS = pytest.mark.parametrize("layout", [archive, sequence])


@LAYOUTS
def test_tensors_of_every_shape_stride_and_place(layout, tmp_path):
    program = state(
        whole=tensor(),
        matrix=tensor(shape=(2, 3), strides=(3, 1)),
        transposed=tensor(shape=(3, 2), strides=(1, 3)),
        end=tensor(offset=4, shape=(2,)),
        scalar=tensor(offset=5, shape=(), strides=()),
        none=tensor(shape=(0, 4), strides=(4, 1)),
        ids=tensor("1", 3, shape=(1, 3), strides=(3, 1), kind="LongStorage"),
    )
    found = read_torch(layout(tmp_path / "x.bin", program, s0=X, s1=np.array([0, 1, 2**40])))
    expected = {
        "whole": X,
        "matrix": X.reshape(2, 3),
        "transposed": X.reshape(2, 3).T,
        "end": X[4:],
        "scalar": np.float32(5),
        "none": np.zeros((0, 4), np.float32),
        "ids": np.array([[0, 1, 2**40]]),
    }
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype and x.flags.c_contiguous
        np.testing.assert_array_equal(x, expected[name], strict=True)


def test_parts_of_a_storage_in_old_files(tmp_path):
    view = b"(" + text("part") + b"J" + struct.pack("<i", 2) + b"J" + struct.pack("<i", 3) + b"t"
    program = state(part=tensor(offset=1, shape=(2,), view=view))
    np.testing.assert_array_equal(read_torch(sequence(tmp_path / "x.bin", program, s0=X))["part"], [3, 4])


# Nothing that a file asks for is executed


class Call:
    """Pickles as a call of the function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@LAYOUTS
@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_file_executes_nothing(layout, protocol, tmp_path):
    mark = tmp_path / "executed"
    program = pickle.dumps({"x": Call(os.system, f"touch {mark}")}, protocol)
    pickle.loads(program)  # such a file does harm where a plain unpickler reads it
    assert mark.exists()
    mark.unlink()
    path = layout(tmp_path / "x.bin", program, s0=X)
    with pytest.raises(UserError, match=rf"x\.bin is refused: it asks for {os.system.__module__}\.system, and only"):
        read_torch(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "collections OrderedDict.fromkeys",
        "collections namedtuple",
        "torch load",
        "torch._utils _rebuild_wrapper_subclass",
        "numpy.core.multiarray _reconstruct",
        "core_flax.torch_files read_torch",
    ],
)
@LAYOUTS
def test_names_that_are_no_part_of_tensors(layout, name, tmp_path):
    module, name = name.split()
    program = b"\x80\x04" + b"\x8c" + bytes([len(module)]) + module.encode()
    program += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."  # STACK_GLOBAL
    with pytest.raises(UserError, match=f"asks for {module}.{name}, "):
        read_torch(layout(tmp_path / "x.bin", program, s0=X))


@LAYOUTS
def test_what_is_admitted_cannot_be_changed(layout, tmp_path):
    """BUILD sets attributes: on a stand-in, they would last for the files that are read after this one."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"):
        for change in (b"}" + text("__call__") + b"Nsb", b"N}" + text("__call__") + b"Ns\x86b"):
            path = layout(tmp_path / "x.bin", b"\x80\x02" + target + change + b".", s0=X)
            with pytest.raises(UserError, match=r"is damaged or was not written by torch\.save"):
                read_torch(path)
    assert read_torch(layout(tmp_path / "x.bin", state(x=tensor()), s0=X)).keys() == {"x"}


@pytest.mark.parametrize("name", [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor\n", text("object")])
@LAYOUTS
def test_only_a_storage_is_a_type(layout, name, tmp_path):
    """To NumPy a class is the type of objects: it would follow the numbers in the file as if they were addresses."""
    program = state(x=tensor(size=3, shape=(3,))).replace(b"ctorch\nFloatStorage\n", name)
    with pytest.raises(UserError, match="a storage has no type or key"):
        read_torch(layout(tmp_path / "x.bin", program, s0=X))


@LAYOUTS
def test_what_is_remembered_is_counted(layout, tmp_path):
    """By a number of its own choice a file of 200 bytes would have the unpickler fill 32 GiB."""
    program = b"\x80\x02}r\xff\xff\xff\x7f" + state(x=tensor())[3:]
    with pytest.raises(UserError, match=r"is damaged .*number 2147483647 at byte \d+"):
        read_torch(layout(tmp_path / "x.bin", program, s0=X))


def test_a_storage_is_as_large_as_it_is(tmp_path):
    """Whatever the file says: this would be 8 GiB of one number."""
    program = state(x=tensor(size=2**31 - 1, shape=(2**31 - 1,), strides=(0,)))
    with pytest.raises(UserError, match="is larger than its storage of 6"):
        read_torch(archive(tmp_path / "x.bin", program, s0=X))


@pytest.mark.parametrize(
    "bad",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (7,)},
        {"shape": (2,), "strides": (6,)},
        {"shape": (2,), "strides": (-1,)},
        {"shape": (-1,)},
        {"shape": (7,), "strides": (0,)},
        {"shape": (2, 3)},
        {"size": 7, "shape": (7,)},
    ],
    ids=str,
)
@LAYOUTS
def test_a_tensor_outside_its_storage(layout, bad, tmp_path):
    with pytest.raises(UserError, match="is damaged"):
        read_torch(layout(tmp_path / "x.bin", state(x=tensor(**bad)), s0=X))


@LAYOUTS
def test_anything_but_tensors_by_name(layout, tmp_path):
    for program, message in (
        (pickle.dumps([1, 2], 2), "it holds a list"),
        (pickle.dumps({"epoch": 3}, 2), "'epoch' in it is no tensor but a int"),
        (b"\x80\x02}K\x01" + tensor() + b"s.", "'1' in it is no tensor"),
    ):
        with pytest.raises(UserError, match=message):
            read_torch(layout(tmp_path / "x.bin", program, s0=X))


@LAYOUTS
def test_a_cut_file(layout, tmp_path):
    whole = layout(tmp_path / "x.bin", state(x=tensor()), s0=X).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.bin is damaged or was not written by torch\.save"):
            read_torch(tmp_path / "cut.bin")


def test_a_compressed_archive(tmp_path):
    path = archive(tmp_path / "x.bin", state(x=tensor()), zipfile.ZIP_DEFLATED, s0=X)
    with pytest.raises(UserError, match="is compressed"):
        read_torch(path)


def test_another_byte_order(tmp_path):
    with pytest.raises(UserError, match="another byte order"):
        read_torch(sequence(tmp_path / "x.bin", state(x=tensor()), little=False, s0=X))


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(zipped, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    module = torch.nn.BatchNorm1d(4)
    tensors = {
        "half": x.half(),
        "bfloat16": x.bfloat16(),
        "double": x.double(),
        "bool": x > 0,
        "byte": torch.arange(3, dtype=torch.uint8),
        "shared": x,
        "transposed": x.T,
        "row": x[2, 1:],
        "parameter": torch.nn.Parameter(x),
        "empty": torch.zeros(0, 3),
        **module.state_dict(),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    weights = read_weights(tmp_path)
    assert weights.arrays.keys() == tensors.keys()
    assert weights.converted == tuple(f"1 arrays from {kind} to float32" for kind in ("bfloat16", "float16", "float64"))
    for name, x in tensors.items():
        expected = (x.float() if x.is_floating_point() else x).detach().numpy()
        np.testing.assert_array_equal(weights.arrays[name], expected, strict=True)


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_with_its_metadata(zipped, tmp_path):
    torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(model.state_dict(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    found = read_torch(tmp_path / "x.bin")
    assert list(found) == list(model.state_dict())
    np.testing.assert_array_equal(found["0.weight"], model[0].weight.detach().numpy())


# safetensors


KINDS = {"f4": "F32", "i8": "I64", "f2": "F16", "u2": "BF16", "u1": "F8_E4M3"}


def safetensors(path, arrays, extra=b""):
    """The format as its description has it: length of the header, header, bytes."""
    header, content = {}, b""
    for name, x in arrays.items():
        place = [len(content), len(content) + x.nbytes]
        header[name] = {"dtype": KINDS[x.dtype.str[1:]], "shape": x.shape, "data_offsets": place}
        content += x.tobytes()
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + content + extra)


ARRAYS = {"a": X.reshape(2, 3), "b": np.array([7], np.int64), "c": np.float32(2.5).reshape(())}


def test_one_file(tmp_path):
    safetensors(tmp_path / "model.safetensors", ARRAYS)
    weights = read_weights(tmp_path)
    assert weights.files == ("model.safetensors",) and weights.converted == ()
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(weights.arrays[name], x, strict=True)


def test_half_precision_becomes_float32_and_is_reported(tmp_path):
    values = np.array([1.5, -0.25, 2.0**-14], np.float32)
    top = (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half of float32
    safetensors(tmp_path / "model.safetensors", {"a": values.astype(np.float16), "b": top, "c": values})
    weights = read_weights(tmp_path)
    assert weights.converted == ("1 arrays from bfloat16 to float32", "1 arrays from float16 to float32")
    for name in "abc":
        np.testing.assert_array_equal(weights.arrays[name], values, strict=True)


def test_shards(tmp_path):
    safetensors(tmp_path / "model-1.safetensors", {"a": ARRAYS["a"]})
    safetensors(tmp_path / "model-2.safetensors", {"b": ARRAYS["b"], "c": ARRAYS["c"]})
    index = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}

    def refused(index, message):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path)

    refused(index | {"d": "model-3.safetensors"}, r"names model-3\.safetensors, not in the folder")
    refused(index | {"d": "model-2.safetensors"}, r"model-2\.safetensors lacks d")
    refused(index | {"d": "../x.safetensors"}, "which is no file of its folder")
    refused(["a"], "has no weight_map")
    safetensors(tmp_path / "twice.safetensors", {"a": ARRAYS["a"], "d": X})
    refused(index | {"d": "twice.safetensors"}, "holds a, which another shard holds as well")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    weights = read_weights(tmp_path)
    assert weights.files == ("model-1.safetensors", "model-2.safetensors")
    assert weights.arrays.keys() == ARRAYS.keys()


def test_a_damaged_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors(path, ARRAYS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged or cut short"):
            read_weights(tmp_path)
    safetensors(path, ARRAYS, extra=b"more")
    with pytest.raises(UserError, match="is damaged"):
        read_weights(tmp_path)
    safetensors(path, {"a": np.zeros(3, np.uint8)})
    with pytest.raises(UserError, match=r"a in .* is of type F8_E4M3, which cannot be read"):
        read_weights(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights: give .* model\.safetensors .*; there is: nothing"):
        read_weights(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(UserError, match=r"there is: tf_model\.h5"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_weights(tmp_path / "missing")


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"absent/model\.safetensors could not be written: .*No such file"):
        write_safetensors(tmp_path / "absent" / "model.safetensors", {"x": X})


def test_written_as_it_is_whatever_lies_in_memory(tmp_path):
    """Bytes are read here by the format's description: values in rows, the names' own spans."""
    arrays = {"transposed": X.reshape(2, 3).T, "every other": X[::2], "scalar": np.array(3, np.float32)}
    path = tmp_path / "model.safetensors"
    write_safetensors(path, arrays)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        values = np.frombuffer(content[8 + length + start : 8 + length + end], np.float32)
        np.testing.assert_array_equal(values.reshape(entry["shape"]), arrays[name], strict=True)
    assert header.keys() == arrays.keys() and list(tmp_path.iterdir()) == [path]
