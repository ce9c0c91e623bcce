"""Each way to compute attention against a reference in float32, gradients included; and which way is taken when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax import kernels, sharding
from core_flax.attention import attend
from core_flax.config import MeshConfig
from core_flax.kernels import Call, Mask, chunked, splash
from core_flax.layers import Drop

B, L, M, CHUNK = 3, 24, 32, 8


def plain(q, k, v, mask):
    return attend(q, k, v, mask)


def in_chunks(q, k, v, mask):
    return chunked(q, k, v, mask, size=CHUNK)


def interpreted(q, k, v, mask):
    return splash(q, k, v, mask, interpret=True)


def numbers(length, *ends):
    """Rows of several sequences, numbered from 1, then padding, which is 0."""
    rows = [np.searchsorted(each, np.arange(length), side="right") + 1 for each in ends]
    return np.stack([np.where(np.arange(length) < each[-1], row, 0) for row, each in zip(rows, ends, strict=True)])


def masks(length, memory):
    """Name -> (mask, the same as an array [B, 1, L, M], by hand)."""
    valid_BM = np.arange(memory) < np.array([memory, memory // 2, 1])[:, None]
    ends = [[length], [length // 3, length - 2], [3, 7, length // 2]]
    packed_BL = numbers(length, *ends)
    packed_BM = numbers(memory, [memory], [5, memory - 1], [2, 9, memory // 2])
    tri = np.tri(length, dtype=bool)[None, None]
    same = packed_BL[:, None, :, None] == packed_BL[:, None, None, :]
    return {
        "everywhere": (Mask(), np.ones((B, 1, length, memory), bool)),
        "padding": (kernels.padding(valid_BM), np.broadcast_to(valid_BM[:, None, None], (B, 1, length, memory))),
        "packed": (kernels.packed(packed_BL), same),
        "causal": (kernels.causal(), np.broadcast_to(tri, (B, 1, length, length))),
        "packed causal": (kernels.causal(packed_BL), same & tri),
        "cross": (Mask(packed_BL, packed_BM), packed_BL[:, None, :, None] == packed_BM[:, None, None, :]),
    }


def check(run, case, length, memory, heads, kv_heads, width, dtype):
    """Output and gradients against jax.nn's own in float32, at the rows that look anywhere."""
    mask, array = masks(length, memory)[case]
    memory = array.shape[3]
    draw = np.random.default_rng(0)
    shapes = (length, heads), (memory, kv_heads), (memory, kv_heads), (length, heads)
    q, k, v, out = (jnp.asarray(draw.normal(size=(B, *shape, width)), dtype) for shape in shapes)
    out *= array.any(axis=3)[:, 0, :, None, None]  # what looks nowhere has no say in the loss

    def gradients(attention, q, k, v):
        mixed, pull = jax.vjp(attention, q, k, v)
        return mixed, *pull(out.astype(mixed.dtype))

    found = jax.jit(lambda q, k, v: gradients(lambda *qkv: run(*qkv, mask), q, k, v))(q, k, v)
    full = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = gradients(lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=array), *full)
    seen = array.any(axis=3)[:, 0, :, None, None]
    atol = 1e-5 if dtype == "float32" else 0.06
    for got, want, where in zip(found, expected, (seen, True, True, True), strict=True):
        assert got.dtype == jnp.dtype(dtype) and np.isfinite(got.astype(np.float32)).all()
        got, want = (np.where(where, x.astype(np.float32), 0) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=atol, rtol=atol)


@pytest.mark.parametrize("run", [plain, in_chunks])
@pytest.mark.parametrize("case", masks(L, M))
def test_against_the_reference(run, case):
    check(run, case, L, M if case in ("everywhere", "padding", "cross") else L, 4, 4, 16, "float32")


@pytest.mark.parametrize("run", [plain, in_chunks])
@pytest.mark.parametrize(("case", "width", "dtype"), [("packed causal", 64, "bfloat16"), ("causal", 8, "float32")])
def test_groups_of_heads_share_keys(run, case, width, dtype):
    check(run, case, L, L, 4, 2, width, dtype)


@pytest.mark.parametrize(
    ("case", "kv_heads", "dtype"),
    [("packed causal", 1, "float32"), ("padding", 2, "bfloat16"), ("cross", 2, "float32")],
)
def test_the_tpu_kernel_as_interpreted(case, kv_heads, dtype):
    check(interpreted, case, 128, 256 if case == "cross" else 128, 2, kv_heads, 64, dtype)


@pytest.mark.parametrize("run", [plain, in_chunks])
def test_what_looks_nowhere_gets_the_mean_and_no_nan(run):
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(B, M, 2, 8)), "float32") for _ in range(3))
    mask = kernels.padding(np.zeros((B, M), bool))
    mixed, pull = jax.vjp(lambda *qkv: run(*qkv, mask), q, k, v)
    np.testing.assert_allclose(mixed, np.broadcast_to(v.mean(axis=1, keepdims=True), mixed.shape), atol=1e-6)
    assert all(np.isfinite(x).all() for x in pull(mixed))


def test_the_tpu_kernel_is_divided_over_a_mesh():
    """Rows over data, heads over tensor, nothing moved: what shard_map is for."""
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(2, 128, 2, 16)), "float32") for _ in range(3))
    mask = kernels.causal(numbers(128, [70, 120], [128]))
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    rows = jax.NamedSharding(mesh, sharding.spec(("batch", "length", "heads", "head_width")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda *qkv: interpreted(*qkv, mask)).lower(*(jax.device_put((q, k, v), rows))).compile()
        found = compiled(*jax.device_put((q, k, v), rows))
    assert found.sharding.is_equivalent_to(rows, 4)
    assert not any(kind in compiled.as_text() for kind in ("all-gather", "all-reduce", "all-to-all"))
    seen = np.asarray(mask.array(128, 128))
    expected = jax.nn.dot_product_attention(q, k, v, mask=seen)
    np.testing.assert_allclose(found, expected, atol=1e-5)


TPU = Call("tpu", 8, 512, 512, 16, 16, 64, "bfloat16", causal=False, numbered=True, dropout=False)


def chosen(call):
    return next((kernel.name for kernel in kernels.KERNELS if kernel.supports(call) is None), "plain")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "splash"),
        ({"causal": True, "numbered": False}, "splash"),
        ({"dropout": True}, "plain"),
        ({"length": 500, "memory": 500}, "plain"),
        ({"length": 4100, "memory": 4096}, "chunked XLA"),
        ({"length": 4096, "memory": 4096, "dropout": True}, "plain"),
        ({"platform": "gpu", "capability": 9.0}, "plain"),
        ({"platform": "gpu", "capability": 8.0, "numbered": False, "causal": True}, "cuDNN"),
        ({"platform": "gpu", "capability": 7.5, "numbered": False, "causal": True}, "plain"),
        ({"platform": "gpu", "capability": 9.0, "numbered": False, "dtype": "float32"}, "plain"),
        ({"platform": "gpu", "length": 4096, "memory": 4096}, "chunked XLA"),
        ({"platform": "cpu", "length": 4096, "memory": 4096}, "plain"),
    ],
    ids=str,
)
def test_the_ablest_that_honours_all_is_taken(changes, name):
    assert chosen(dataclasses.replace(TPU, **changes)) == name


def test_what_the_mesh_does_not_divide_is_left_to_xla():
    assert chosen(TPU) == "splash"
    mesh = sharding.make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert chosen(TPU) == "splash"
        assert chosen(dataclasses.replace(TPU, num_kv_heads=2)) == "plain"
        assert "2 of kv_heads do not divide over 4" in kernels.KERNELS[0].supports(
            dataclasses.replace(TPU, num_kv_heads=2)
        )


def test_on_a_foreign_mesh_xla_divides():
    with jax.set_mesh(
        jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    ):
        assert chosen(TPU) == "plain" and "axes x, y" in kernels.KERNELS[0].supports(TPU)


def test_each_choice_is_told_once_with_its_reasons():
    q = jnp.zeros((2, 16, 2, 8))
    told = []
    with kernels.telling(told.append):
        for _ in range(2):
            attend(q, q, q, kernels.causal())
        attend(q, q, q, kernels.causal(), Drop(jax.random.key(0), jnp.arange(2), 0.1))
    assert len(told) == 2
    assert told[0].startswith(
        "attention of 16 to 16 tokens, 2 heads of 8, float32, causal, on cpu: plain XLA (no splash: "
    )
    assert "with dropout" in told[1]
