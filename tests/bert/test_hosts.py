"""Two hosts of two devices each take the steps that one device takes; each makes only the rows that it needs.

Each host is a process of its own: this file, run as ``python test_hosts.py DATA MESH HOST ADDRESS OUTPUT``.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import Process

from bert_flax.config import BertConfig, InputsConfig, PretrainConfig
from bert_flax.pretrain import make_task
from core_flax import sharding
from core_flax.config import MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.data.records import PassageStore
from core_flax.params import leaves
from core_flax.program import make_program
from core_flax.text.wordpiece import WordPiece

STEPS, B, HOSTS, SECONDS = 3, 8, 2, 100
HURRY = {"xla_backend_optimization_level": 0}
"""For the compiler: how it places and divides the work stays the same."""


def take_steps(data, mesh, devices=None):
    """The rows that are made here of each batch, the loss of each step, and the last parameters, by name."""
    vocabulary = WordPiece.load(data / "vocab.txt")
    sizes = {"num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 64, "max_length": 32}
    config = PretrainConfig(
        model=BertConfig(vocab_size=vocabulary.num_tokens, **sizes),
        inputs=InputsConfig(length=32, max_predictions=5),
        optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1e-6),
        schedule=ScheduleConfig(name="constant"),
        train=TrainConfig(num_steps=STEPS, batch_size=B),
        mesh=MeshConfig(**mesh),
    )
    task = make_task(config, PassageStore(data, "train"), None, vocabulary)
    program = make_program(task, config, devices)
    rows, found = sharding.host_rows(B, program.mesh), {}
    with jax.set_mesh(program.mesh):
        key = jax.random.key(config.seed)
        state, compiled = program.init.lower(key).compile(HURRY)(key), None
        for step, batch in enumerate(task.batches(0, rows)):
            placed = sharding.place_batch(batch, B, program.mesh)
            compiled = compiled or program.step.lower(state, placed).compile(HURRY)
            state, metrics = compiled(state, placed)
            found |= {f"batch {step} {name}": array for name, array in batch.items()}
            found[f"loss {step}"] = np.asarray(metrics["loss"])
        params = jax.jit(lambda params: params, out_shardings=sharding.replicated(program.mesh))(state.params)
    return found | {f"params {path}": np.asarray(array) for path, array in leaves(params)} | {"rows": np.array(rows)}


def be_a_host(data, mesh, host, address, output):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # conftest asks for four; JAX looks only now
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, HOSTS, int(host), initialization_timeout=SECONDS)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (HOSTS, 4, 2)
    np.savez(output, **take_steps(Path(data), json.loads(mesh)))


def start_host(data, mesh, host, port, folder):
    with open(folder / f"{host}.txt", "w", encoding="utf-8") as log:
        address, output = f"localhost:{port}", folder / f"{host}.npz"
        command = [sys.executable, __file__, str(data), json.dumps(mesh), str(host), address, str(output)]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        return Process(command, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def on_two_hosts(data, mesh, folder):
    """What ``take_steps`` finds on each host. If one fails or hangs, both are ended and what they said is shown."""
    with contextlib.ExitStack() as stack:
        # Held, so that nobody else is given the port; the coordinator may listen there all the same.
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("localhost", 0))
        port = held.getsockname()[1]
        hosts = [stack.enter_context(start_host(data, mesh, host, port, folder)) for host in range(HOSTS)]
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and any(host.poll() is None for host in hosts):
            if any(host.poll() for host in hosts):
                break
            time.sleep(0.1)
        said = [(folder / f"{host}.txt").read_text(encoding="utf-8")[-3000:] for host in range(HOSTS)]
        assert [host.poll() for host in hosts] == [0] * HOSTS, "\n".join(said)
    return [dict(np.load(folder / f"{host}.npz")) for host in range(HOSTS)]


@pytest.fixture(scope="module")
def alone(data):
    return take_steps(data, {}, jax.devices()[:1])


@pytest.mark.parametrize("mesh", [{"data": 4}, {"fsdp": 2, "tensor": 2}])
def test_two_hosts_do_what_one_device_does(data, tmp_path, alone, mesh):
    hosts = on_two_hosts(data, mesh, tmp_path)
    assert [host["rows"].tolist() for host in hosts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for name, expected in alone.items():
        parts = [host[name] for host in hosts]
        if name.startswith("batch"):
            np.testing.assert_array_equal(np.concatenate(parts), expected, err_msg=name)
        elif name != "rows":
            for part in parts:
                np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    be_a_host(*sys.argv[1:])
