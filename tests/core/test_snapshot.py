"""What is in a checkpoint: the names of the arrays, and fingerprints that are the same on any devices."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import make_state
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from core_flax import snapshot
from core_flax.snapshot import fingerprints, named_leaves


def test_names_are_those_of_the_state_dict():
    state = make_state(1)
    # Flax's state dict does not enter the OrderedDict that optax makes.
    state_dict = flax.serialization.to_state_dict(state.replace(opt_state=dict(state.opt_state)))
    flat = traverse_util.flatten_dict(state_dict, sep="/")
    there = {name for name, leaf in flat.items() if leaf is not None}  # no carry, no moving average
    assert set(named_leaves(state)) == there
    assert "opt_state/adam/mu/encoder/kernel" in flat


def numpy_fingerprint(x):
    raw = np.frombuffer(np.ascontiguousarray(x).tobytes(), f"uint{8 * x.dtype.itemsize}").astype(object)

    def mix(value):
        value = value * 0x9E3779B1 % 2**32
        return value ^ (value >> 16)

    return sum(mix(int(value)) * (mix(i) | 1) for i, value in enumerate(raw)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 4)])
def test_fingerprint_against_numpy(dtype, shape):
    x = (np.random.default_rng(0).normal(size=shape) * 100).astype(jnp.dtype(dtype))
    assert fingerprints({"x": jnp.asarray(x)}) == {"x": numpy_fingerprint(x)}


def test_fingerprint_shows_any_changed_byte_and_moved_rows():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    changed = [np.roll(x, 1, axis=0), x.T.copy(), np.abs(x), -x, x[:, ::-1].copy(), x[[1, 0, 2, 3]]]
    for byte in range(x.nbytes):
        copy = x.copy()
        copy.view(np.uint8).reshape(-1)[byte] ^= 1 << (byte % 8)
        changed.append(copy)
    marks = fingerprints({str(i): copy for i, copy in enumerate([x, *changed])})
    assert marks["0"] not in [marks[str(i + 1)] for i in range(len(changed))]


SPECS = [((4,), ("data", None, None)), ((2, 2), (None, "fsdp", "tensor")), ((2, 2), ("tensor", None, "fsdp"))]


def put(x, mesh_shape, spec):
    axes = ("data",) if len(mesh_shape) == 1 else ("fsdp", "tensor")
    mesh = jax.make_mesh(mesh_shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def test_fingerprint_is_the_same_on_any_mesh():
    x = jax.random.normal(jax.random.key(0), (4, 8, 12))
    marks = [fingerprints({"x": put(x, *spec)})["x"] for spec in SPECS]
    assert marks == [numpy_fingerprint(np.asarray(x))] * len(SPECS)


def test_fingerprint_gathers_nothing():
    x = put(jnp.ones((4, 8, 12)), *SPECS[1])
    text = snapshot._fingerprints.lower([x]).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text
