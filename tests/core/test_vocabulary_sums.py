"""Cross-entropy in chunks against the plain one: values, gradients, and the memory that the compiled program takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax import sharding
from core_flax.config import MeshConfig
from core_flax.losses import cross_entropy_sums, vocabulary_sums

B, L, D, V = 3, 7, 5, 11


def inputs(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    x_BLD, table_VD = (draw.normal(size=shape).astype(np.float32) for shape in ((B, L, D), (V, D)))
    labels_BL = draw.integers(0, V, (B, L))
    labels_BL[1] = (x_BLD[1] @ table_VD.T).argmax(-1)
    weights_BL = draw.random((B, L)).astype(np.float32)
    weights_BL[0, :3] = 0
    return jnp.asarray(x_BLD, dtype), jnp.asarray(table_VD), jnp.asarray(labels_BL), jnp.asarray(weights_BL)


def plain(x_BLD, table_VD, labels_BL, weights_BL, z_weight=0.0, soft_cap=None):
    """Straight from the definition, with logits whole, differentiated by JAX."""
    logits_BLV = x_BLD.astype(jnp.float32) @ table_VD.T
    if soft_cap is not None:
        logits_BLV = soft_cap * jnp.tanh(logits_BLV / soft_cap)
    cross_entropy, correct = cross_entropy_sums(logits_BLV, labels_BL, weights_BL)
    z = jnp.sum(weights_BL * jnp.log(jnp.sum(jnp.exp(logits_BLV), -1)) ** 2)
    return cross_entropy + z_weight * z, (cross_entropy, z, correct)


def chunked(*args, **options):
    sums = vocabulary_sums(*args, **options)
    return sums.loss, sums[1:]


@pytest.mark.parametrize("num_chunks", [1, 3, 7, 9])
@pytest.mark.parametrize("options", [{}, {"z_weight": 0.3}, {"soft_cap": 2.0}, {"z_weight": 0.3, "soft_cap": 2.0}])
def test_values_and_gradients_are_those_of_whole_logits(num_chunks, options):
    x_BLD, table_VD, labels_BL, weights_BL = inputs()

    def scaled(function, x_BLD, table_VD):  # so that the loss's cotangent is not 1
        loss, others = function(x_BLD, table_VD, labels_BL, weights_BL, **options)
        return loss / 17 + jnp.sum(x_BLD), (loss, *others)

    def evaluate(function):
        return jax.jit(jax.value_and_grad(partial(scaled, function), argnums=(0, 1), has_aux=True))(x_BLD, table_VD)

    expected = evaluate(plain)
    found = evaluate(partial(chunked, num_chunks=num_chunks))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    undifferentiated = jax.jit(partial(chunked, num_chunks=num_chunks, **options))(*inputs())
    np.testing.assert_allclose(undifferentiated[0], expected[0][1][0], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), undifferentiated[1], expected[0][1][1:])


def test_only_the_loss_has_a_gradient():
    x_BLD, table_VD, labels_BL, weights_BL = inputs()
    others = jax.grad(lambda x: sum(vocabulary_sums(x, table_VD, labels_BL, weights_BL)[1:]))(x_BLD)
    assert not others.any()


def test_in_bfloat16():
    """Products of rounded factors, summed in float32; gradients are of the inputs' types."""
    args = inputs(jnp.bfloat16)
    rounded = args[0].astype(jnp.float32), args[1].astype(jnp.bfloat16).astype(jnp.float32), *args[2:]
    loss, grads = jax.value_and_grad(lambda *x: chunked(*x, num_chunks=2)[0], argnums=(0, 1))(*args)
    expected, grads_32 = jax.value_and_grad(lambda *x: plain(*x)[0], argnums=(0, 1))(*rounded)
    assert loss.dtype == jnp.float32 and [x.dtype for x in grads] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for x, y in zip(grads, grads_32, strict=True):
        assert np.linalg.norm(np.asarray(x, np.float32) - y) < 0.01 * np.linalg.norm(y)


def test_on_a_mesh():
    """Rows over data and the vocabulary over tensor: the same sums."""
    x_BLD, table_VD, labels_BL, weights_BL = (x[:2] for x in inputs())
    table_VD = inputs()[1][:10]
    labels_BL %= 10
    args = x_BLD, table_VD, labels_BL, weights_BL
    step = jax.jit(jax.value_and_grad(lambda *x: chunked(*x, num_chunks=2)[0], argnums=(0, 1)))
    expected = step(*args)
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    rows = sharding.batch_sharding(mesh)
    table = jax.sharding.NamedSharding(mesh, sharding.spec(("vocab", "table_width")))
    placed = [jax.device_put(x, table if x is table_VD else rows) for x in args]
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(lambda *x: chunked(*x, num_chunks=2)[0], argnums=(0, 1)))(*placed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


def test_peak_memory_at_50k_entries_is_less_than_a_quarter():
    """What XLA sets aside beside inputs and outputs, which are the same in both."""
    shapes = ((4, 256, 64), "float32"), ((50257, 64), "float32"), ((4, 256), "int32"), ((4, 256), "float32")
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def peak(function):
        step = jax.jit(jax.value_and_grad(lambda *x: function(*x)[0], argnums=(0, 1)))
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes

    whole, parts = peak(plain), peak(partial(chunked, num_chunks=16))
    assert whole > 4 * 256 * 50257 * 4  # logits at least
    assert parts < whole / 4
