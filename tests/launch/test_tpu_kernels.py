"""Attention's kernel and its gradients, by the TPU's own compiler, where libtpu is installed (extra [tpu])."""

import jax
import jax.numpy as jnp
import pytest

from core_flax import kernels, sharding
from core_flax.attention import attend
from core_flax.config import MeshConfig
from launch.chips import find
from launch.cli import main
from launch.hlo import read_work

pytest.importorskip("libtpu")

B, L = 4, 256


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize(
    ("mask", "kv_heads", "width"),
    [(kernels.packed, 4, 64), (kernels.causal, 2, 128)],
    ids=["packed", "causal, packed, grouped"],
)
def test_the_kernel_compiles_over_a_mesh(topology, mask, kv_heads, width, monkeypatch):
    for name, value in {
        "SKIP_MDS_QUERY": "1",
        "ACCELERATOR_TYPE": "v5litepod-16",
        "WORKER_HOSTNAMES": "localhost",
    }.items():
        monkeypatch.setenv(f"TPU_{name}", value)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), list(find(topology).devices))

    def array(dtype, *sizes, names):
        where = jax.NamedSharding(mesh, sharding.spec(names))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    heads = ("batch", "length", "heads", "head_width")
    q, k = (array(jnp.bfloat16, B, L, number, width, names=heads) for number in (4, kv_heads))
    sequences = array(jnp.int32, B, L, names=heads[:2])

    def loss(q, k, v, sequences):
        return jnp.sum(attend(q, k, v, mask(sequences)).astype(jnp.float32) ** 2)

    told = []
    with jax.set_mesh(mesh), kernels.telling(told.append):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, sequences).compile()
    assert len(told) == 1 and told[0].endswith("on tpu: splash")
    work = read_work(compiled.as_text())
    # Two products forward and five backward, of a device's rows and heads; none of them moves to another device.
    assert work.flops == pytest.approx(7 * 2 * (B / 2) * (4 / 2) * L * L * width)
    assert not [each for each in work.collectives if each.bytes > 1000]


@pytest.mark.parametrize(("rate", "told"), [("0.1", True), ("0", False)])
def test_a_plan_tells_when_dropout_rules_out_every_kernel(capsys, rate, told):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "bert_tiny", "--topology=v5e:2x2", "--batch=8", "--json", f"--model.attention-dropout={rate}"])
    assert not stop.value.code
    assert ("no kernel knows its dropout; see --model.attention-dropout 0" in capsys.readouterr().err) == told
