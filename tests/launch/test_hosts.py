"""Two hosts of two devices each take the steps that one device takes, and go on on other devices where they stopped.
They evaluate every held-out example once. The rows of a host are no neighbours, as those of a TPU's hosts seldom are.

Of every family, from text to losses. Each host is a process of its own: this file, run as
``python test_hosts.py HOST ADDRESS FOLDER``.
"""

import contextlib
import dataclasses
import itertools
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

from bert_flax import config as bert
from bert_flax.finetune.batches import PackedUnits
from bert_flax.finetune.config import FinetuneConfig, FinetuneInputs
from bert_flax.finetune.examples import TextExample
from bert_flax.finetune.inputs import encode_texts
from bert_flax.finetune.predictions import predict
from bert_flax.finetune.task import Labelled, make_evaluator, make_model
from bert_flax.finetune.tasks import TASKS
from bert_flax.pretrain import make_task as make_bert
from core_flax import sharding
from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig, MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.data.records import PassageStore
from core_flax.evaluate import make_collect, make_evaluate
from core_flax.params import leaves
from core_flax.program import make_program
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.text.wordpiece import SPECIALS, WordPiece
from lm_flax import config as lm
from lm_flax import prepare as lm_text
from lm_flax.model import GPT2Config
from lm_flax.runs import make_task as make_lm
from lm_flax.runs import open_data
from seq2seq_flax import config as seq2seq
from seq2seq_flax import prepare as pair_text
from seq2seq_flax.pairs import PairStore
from seq2seq_flax.task import make_task as make_seq2seq

STEPS, SAVED, B, HOSTS = 5, 3, 8, 2
NUM_EXAMPLES = 13
SECONDS = 900
"""After which a job that does not end counts as hanging: no measure of speed, machines are slow at times."""
HURRY = {"xla_backend_optimization_level": 0}
"""For the compiler: how it places and divides the work stays the same."""
DATA, GRID = {"data": 4}, {"fsdp": 2, "tensor": 2}
SIZES = {"num_layers": 1, "width": 32, "num_heads": 4, "mlp_width": 64}
UNDROPPED = SIZES | {"dropout": 0.0, "attention_dropout": 0.0, "remat": "none"}
COMMON = {
    # With a smaller epsilon Adam would make whole steps of the rounding errors in gradients that are zero.
    "optimizer": OptimizerConfig(learning_rate=1e-3, epsilon=1e-6),
    "schedule": ScheduleConfig(name="constant"),
    "train": TrainConfig(num_steps=STEPS, batch_size=B),
}
# BERT has Adam and dropout; the others, being less to compile, have neither.
SIMPLE = COMMON | {"optimizer": OptimizerConfig("sgd", learning_rate=0.1, weight_decay=0.0, clip_norm=None)}


def bert_on(folder):
    vocabulary = WordPiece.load(folder / "vocab.txt")
    model = bert.BertConfig(vocab_size=vocabulary.num_tokens, max_length=32, **SIZES)
    config = bert.PretrainConfig(model=model, inputs=bert.InputsConfig(length=32, max_predictions=5), **COMMON)
    return config, lambda config: make_bert(config, PassageStore(folder, "train"), None, vocabulary)


def lm_on(folder):
    store, _, tokenizer = open_data(folder)
    inputs = lm.InputsConfig(length=32)
    config = lm.GPT2Run(model=GPT2Config(vocab_size=64, max_length=32, **UNDROPPED), inputs=inputs, **SIMPLE)
    return config, lambda config: make_lm(config, store, None, tokenizer.end_id)


def seq2seq_on(folder):
    tokenizer, store = SentencePiece.load(folder / "tokenizer.model"), PairStore(folder, "train")
    inputs = seq2seq.InputsConfig(row_length=48)
    config = seq2seq.TranslateConfig(
        model=seq2seq.TransformerConfig(vocab_size=72, **UNDROPPED), inputs=inputs, **SIMPLE
    )
    return config, lambda config: make_seq2seq(config, store, None, tokenizer)


FAMILIES = {"bert": bert_on, "lm": lm_on, "seq2seq": seq2seq_on}


class Run:
    """A family's program on some devices, and what it has done."""

    def __init__(self, folder, family, mesh, devices=None):
        config, make_task = FAMILIES[family](folder / family)
        self.config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
        self.task = make_task(self.config)
        self.program = make_program(self.task, self.config, devices)
        self.checkpoints = Checkpoints(folder / f"{family}-checkpoints", CheckpointConfig())
        self.compiled, self.found = None, {}

    def steps(self, state, start, stop):
        """Takes them; the rows that are made here and the loss of each are in ``found``."""
        rows = sharding.host_rows(B, self.program.mesh)
        self.found["rows"] = np.array(rows)
        with contextlib.closing(self.task.batches(start, rows)) as batches, jax.set_mesh(self.program.mesh):
            for step, batch in enumerate(itertools.islice(batches, stop - start), start):
                placed = sharding.place_batch(batch, B, self.program.mesh)
                self.compiled = self.compiled or self.program.step.lower(state, placed).compile(HURRY)
                state, metrics = self.compiled(state, placed)
                self.found |= {f"batch {step} {name}": np.array(array) for name, array in batch.items()}
                self.found[f"loss {step}"] = np.asarray(metrics["loss"])
        return state

    def from_start(self, stop):
        with jax.set_mesh(self.program.mesh):
            key = jax.random.key(self.config.seed)
            return self.steps(self.program.init.lower(key).compile(HURRY)(key), 0, stop)

    def go_on(self):
        """From the checkpoint to the last step; the parameters that were restored are in ``found``."""
        state, start = self.checkpoints.restore_latest(self.program.abstract_state)
        whole = jax.jit(lambda params: params, out_shardings=sharding.replicated(self.program.mesh))(state.params)
        self.found |= {f"params {path}": np.asarray(array) for path, array in leaves(whole)}
        self.steps(state, start, STEPS)
        return self.found


def in_turns():
    """A device of the first host, one of the second, one of the first, one of the second."""
    return sorted(jax.devices(), key=lambda device: (device.id % 2, device.process_index))


def train_on_this_host(folder, family):
    """Five steps on one mesh, saved after the third; from there again on another."""
    run = Run(folder, family, DATA, in_turns())
    state = run.from_start(SAVED)
    run.checkpoints.save(state)
    run.checkpoints.wait()
    params = jax.jit(lambda params: params, out_shardings=sharding.replicated(run.program.mesh))(state.params)
    run.found |= {f"params {path}": np.asarray(array) for path, array in leaves(params)}
    run.steps(state, SAVED, STEPS)
    run.checkpoints.close()
    again = Run(folder, family, GRID)
    return {f"first {k}": v for k, v in run.found.items()} | {f"again {k}": v for k, v in again.go_on().items()}


def evaluated(mesh):
    """Figures of an untrained classifier on examples whose number neither batches nor devices divide, and its shares.

    That each example is predicted once is asserted where they are put together.
    """
    vocabulary, spec = WordPiece([*SPECIALS, *"abcdefgh"]), TASKS["cola"]
    model = bert.BertConfig(vocab_size=vocabulary.num_tokens, max_length=16, init_stddev=0.5, **SIZES)
    inputs, train = FinetuneInputs(max_length=16), TrainConfig(batch_size=4)
    config = FinetuneConfig(model=model, inputs=inputs, train=train)
    examples = [TextExample(str(n), " ".join("abcdefgh"[: n % 8 + 1]), None, n % 2) for n in range(NUM_EXAMPLES)]
    held_out = Labelled(examples, encode_texts(examples, vocabulary, 16))
    module, ways = make_model(spec, model), sharding.ways_of_batch(mesh)
    evaluator = make_evaluator(config, spec, module, held_out, ways)
    with jax.set_mesh(mesh):
        init = jax.jit(module.init, out_shardings=sharding.replicated(mesh))
        params = init(jax.random.key(0), next(PackedUnits(held_out.units, 16).in_order(4)))["params"]
    found = predict(spec, examples, held_out.units, make_collect(evaluator, mesh)(params), inputs)
    return make_evaluate(evaluator, mesh)(params) | {"shares": np.array(found.probabilities)}


def be_a_host(host, address, folder):
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # conftest asks for four; JAX looks only now
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, HOSTS, int(host), initialization_timeout=SECONDS)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (HOSTS, 4, 2)
    np.savez(f"{folder}/evaluated-{host}.npz", **evaluated(sharding.make_mesh(MeshConfig(**DATA), in_turns())))
    for family in FAMILIES:
        np.savez(f"{folder}/{family}-{host}.npz", **train_on_this_host(Path(folder), family))


def start_host(host, port, folder):
    with open(folder / f"{host}.txt", "w", encoding="utf-8") as log:
        command = [sys.executable, __file__, str(host), f"localhost:{port}", str(folder)]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        return Process(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def run_hosts(folder):
    """Runs the hosts to their end. If one fails or hangs, both are ended and what they said is shown."""
    with contextlib.ExitStack() as stack:
        # Held, so that nobody else is given the port; the coordinator may listen there all the same.
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("localhost", 0))
        port = held.getsockname()[1]
        hosts = [stack.enter_context(start_host(host, port, folder)) for host in range(HOSTS)]
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and any(host.poll() is None for host in hosts):
            if any(host.poll() for host in hosts):
                break
            time.sleep(0.1)
        said = [(folder / f"{host}.txt").read_text(encoding="utf-8")[-3000:] for host in range(HOSTS)]
        assert [host.poll() for host in hosts] == [0] * HOSTS, "\n".join(said)


@pytest.fixture(scope="module")
def folder(data, corpus, tmp_path_factory):
    """The families' data, and what two hosts have made of them."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "bert").symlink_to(data)
    settings = {"tokenizer": "char", "documents": "blank-line", "num_workers": 1}
    lm_text.prepare(lm_text.PrepareConfig((str(corpus),), str(folder / "lm"), **settings))
    sentences = [sentence for line in corpus.read_text().split("\n") for sentence in line.split(". ") if sentence]
    (folder / "source").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    (folder / "target").write_text("\n".join(" ".join(each.split()[::-1]) for each in sentences) + "\n")
    pairs = str(folder / "source"), str(folder / "target")
    pair_text.prepare(pair_text.PrepareConfig(str(folder / "seq2seq"), train=pairs, vocab_size=70))
    run_hosts(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(folder, request):
    """(name, what each host found, what one device finds, the run on it)."""
    hosts = [dict(np.load(folder / f"{request.param}-{host}.npz")) for host in range(HOSTS)]
    alone = Run(folder, request.param, {}, jax.devices()[:1])
    alone.from_start(STEPS)
    return request.param, hosts, dict(alone.found), alone


def part(host, which):
    return {name.removeprefix(f"{which} "): array for name, array in host.items() if name.startswith(f"{which} ")}


def check(hosts, expected):
    """Losses are those expected within 1e-5, and what the hosts made of each batch is the whole batch."""
    taken = [name for name in hosts[0] if name.startswith(("loss", "batch"))]
    assert taken and set(taken) <= set(expected)
    for name in taken:
        parts = [host[name] for host in hosts]
        if name.startswith("batch"):
            whole = np.empty_like(expected[name])
            for host, each in zip(hosts, parts, strict=True):
                whole[sharding.same_share(host["rows"], B, len(whole))] = each
            assert sum(map(len, parts)) == len(whole)
            np.testing.assert_array_equal(whole, expected[name], err_msg=name)
        else:
            for each in parts:
                np.testing.assert_allclose(each, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_two_hosts_do_what_one_device_does(family):
    _, hosts, expected, _ = family
    first = [part(host, "first") for host in hosts]
    assert [host["rows"].tolist() for host in first] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert sum(name.startswith("loss") for name in first[0]) == STEPS
    check(first, expected)


def test_two_hosts_go_on_on_another_mesh(family):
    _, hosts, expected, _ = family
    again = [part(host, "again") for host in hosts]
    assert sum(name.startswith("loss") for name in again[0]) == STEPS - SAVED
    check(again, expected)
    check_params(again, hosts)


def check_params(found, hosts):
    """Every bit is as the hosts had it when they saved."""
    saved = {name: array for name, array in part(hosts[0], "first").items() if name.startswith("params")}
    for each in found:
        assert {name for name in each if name.startswith("params")} == set(saved)
        for name, array in saved.items():
            assert each[name].tobytes() == array.tobytes(), name


def test_what_two_hosts_saved_goes_on_on_one_device(family):
    _, hosts, expected, alone = family
    alone.found = {}
    found = alone.go_on()
    check([found], expected)
    check_params([found], hosts)


def test_what_two_hosts_saved_goes_on_on_four_devices(folder, family):
    name, hosts, expected, _ = family
    found = Run(folder, name, GRID, jax.devices()[:4]).go_on()
    check([found], expected)
    check_params([found], hosts)


def test_two_hosts_evaluate_every_example_once(folder):
    alone = evaluated(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert alone["total"] == NUM_EXAMPLES and 0 < alone["accuracy"] < 100
    for host in range(HOSTS):
        found = dict(np.load(folder / f"evaluated-{host}.npz"))
        assert found.keys() == alone.keys()
        for name, figure in alone.items():
            np.testing.assert_allclose(found[name], figure, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    be_a_host(*sys.argv[1:])
