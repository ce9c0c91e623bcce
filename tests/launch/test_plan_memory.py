"""On the CPU backend, what a plan says that a step takes is what a process grows by that runs it."""

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = {"num_layers": 5, "width": 256, "num_heads": 4, "mlp_width": 1024, "max_length": 256, "vocab_size": 512}
"""Large enough that the 60 to 90 MB, which the backend's threads and products take besides, are a small part."""


def resident(what):
    """Bytes of this process that are in memory (VmRSS), or that were at most (VmHWM)."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(preset):
    """Prints what was predicted, and by how much this process grew."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from core_flax.config import MeshConfig
    from core_flax.program import make_program
    from launch import chips
    from launch.families import PRESETS
    from launch.plan import make_plan

    family = PRESETS[preset]
    config = family.presets[preset]()
    model = dataclasses.replace(config.model, remat="none", dropout=0.0, attention_dropout=0.0, **SIZES)
    inputs = dataclasses.replace(config.inputs, length=256)
    train = dataclasses.replace(config.train, batch_size=32)
    config = dataclasses.replace(config, model=model, inputs=inputs, train=train, mesh=MeshConfig())
    shapes = family.batch(config, 0)
    predicted = make_plan(family.task(config), config, shapes, chips.Topology("cpu:1", jax.devices()[:1], chips.Chip()))
    program = make_program(family.task(config), config, jax.devices()[:1])
    zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.abstract_state))
    with jax.set_mesh(program.mesh):
        step = program.step.lower(program.abstract_state, shapes).compile()
        zeros = zeros.lower().compile()
        batch = {name: jax.device_put(np.ones(x.shape, x.dtype)) for name, x in shapes.items()}
        # Once for what a process needs whatever it computes: the program's pages, the threads' own buffers.
        jax.tree.map(lambda x: x.delete(), jax.block_until_ready(step(zeros(), batch)))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS") - sum(x.nbytes for x in batch.values())
        Path("/proc/self/clear_refs").write_text("5")  # what was needed at most begins anew
        state = zeros()
        for _ in range(2):
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
    print(json.dumps([predicted.memory.total, resident("VmHWM") - before]))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux tells it")
@pytest.mark.parametrize("preset", ["gpt2", "bert_base"])
def test_a_process_grows_by_what_was_predicted(preset):
    # As many threads as there are cores, as a user's process has: each has buffers of its own for products.
    env = {name: value for name, value in os.environ.items() if name != "NPROC"}
    done = subprocess.run([sys.executable, __file__, preset], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, grown = json.loads(done.stdout.splitlines()[-1])
    assert predicted > 1e9
    assert grown == pytest.approx(predicted, rel=0.1)


if __name__ == "__main__":
    measure(sys.argv[1])
