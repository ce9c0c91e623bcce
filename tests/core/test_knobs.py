"""No setting is accepted and ignored: every one is read somewhere, and turning it changes what is computed."""

import ast
import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import bert_flax
import core_flax
from bert_flax.cli import EvaluateCommand, FillMaskCommand
from bert_flax.config import BertConfig, InputsConfig, PretrainConfig
from bert_flax.prepare import PrepareConfig
from bert_flax.pretrain import make_task
from bert_flax.runs import PretrainCommand
from core_flax.config import OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.data.records import PassageStore
from core_flax.program import make_program
from core_flax.sharding import MESH_AXES
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError

CONFIG = PretrainConfig(
    model=BertConfig(vocab_size=200, num_layers=2, width=32, num_heads=4, mlp_width=64, max_length=32),
    inputs=InputsConfig(length=24, max_predictions=2),
    optimizer=OptimizerConfig(),
    schedule=ScheduleConfig(warmup_steps=2),
    train=TrainConfig(num_steps=10, batch_size=8),
)
TURNS = {
    "seed": 1,
    "optimizer.name": "lamb",
    "optimizer.learning_rate": 2e-4,
    "optimizer.weight_decay": 0.02,
    "optimizer.clip_norm": 2.0,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.8,
    "optimizer.epsilon": 1e-5,
    "schedule.name": "cosine",
    "schedule.warmup_steps": 3,
    "schedule.total_steps": 20,
    "schedule.decay_steps": 3,
    "schedule.final_fraction": 0.5,
    "train.num_steps": 11,
    "train.batch_size": 16,
    "train.num_microbatches": 2,
    "train.compute_dtype": "bfloat16",
    "train.ema_decay": 0.9,
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.sequence": 2,
    "mesh.dcn_data": 2,
    "mesh.dcn_fsdp": 2,
    "mesh.zero1": True,
    "model.vocab_size": 208,
    "model.num_layers": 3,
    "model.width": 64,
    "model.num_heads": 2,
    "model.mlp_width": 128,
    "model.max_length": 64,
    "model.num_segments": 3,
    "model.dropout": 0.2,
    "model.attention_dropout": 0.2,
    "model.init_stddev": 0.03,
    "model.norm_epsilon": 1e-6,
    "model.remat": "block",
    "model.unroll": 1,
    "inputs.length": 32,
    "inputs.max_predictions": 5,
    "inputs.mask_rate": 0.05,
    "inputs.long_from_step": 1,
    "inputs.short_rate": 1.0,
    "inputs.random_next_rate": 1.0,
    "inputs.whole_word": True,
}
"""Each setting that decides what is computed, and another value for it."""
WITH = {
    "schedule.decay_steps": {"schedule.name": "wsd"},
    "mesh.data": {"mesh.fsdp": 2},
    "inputs.whole_word": {"inputs.max_predictions": 8, "inputs.mask_rate": 0.5},
}
"""What a setting needs to have a meaning."""
ASIDE = {
    "train.eval_every_steps",
    "train.eval_batches",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "log.every_steps",
    "log.tensorboard",
    "log.stall_seconds",
    "inputs.num_workers",
}
"""Settings that decide when something is measured, saved or shown, or by which process: tests of the loop, of
checkpoints, of logs, of the watchdog, of the feed and of examples turn them."""


def paths(cls, prefix=""):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from paths(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def turned(config, changes):
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


@pytest.fixture(scope="module")
def computed(data):
    """What a config makes the machine do: the programs, where arrays lie, and what goes in at the first two steps."""
    store = PassageStore(data, "train")
    vocabulary = WordPiece.load(data / "vocab.txt")

    @functools.cache
    def computed(**changes):
        config = turned(CONFIG, changes)
        task = make_task(config, store, None, vocabulary)
        try:
            program = make_program(task, config)
        except UserError as error:
            return str(error)
        batches = task.batches(0, range(config.train.batch_size))
        first, second = next(batches), next(batches)
        batches.close()
        inputs = {name: (x.shape, x.tobytes()) for name, x in first.items()}, {n: x.shape for n, x in second.items()}
        shapes = {name: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for name, x in first.items()}
        with jax.set_mesh(program.mesh):
            step = program.step.trace(program.abstract_state, shapes).jaxpr
            init = program.init.trace(jax.random.key(config.seed)).jaxpr
        places = [leaf.sharding.spec for leaf in jax.tree.leaves(program.abstract_state)]
        return inputs, str(step), str(init), places, dict(program.mesh.shape)

    return computed


def test_every_setting_is_turned():
    assert set(TURNS) | ASIDE == set(paths(PretrainConfig)) and not set(TURNS) & ASIDE


@pytest.mark.parametrize("path", TURNS)
def test_turning_it_changes_what_is_computed(computed, path):
    before = WITH.get(path, {})
    assert computed(**before, **{path: TURNS[path]}) != computed(**before)


@functools.cache
def attributes_read():
    """Names of all attributes that the packages read, outside checks of ranges."""
    found = set()
    for package in (core_flax, bert_flax):
        for path in Path(package.__path__[0]).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            checks = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
            checked = {id(node) for check in checks for node in ast.walk(check)}
            found |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and id(node) not in checked}
    return found


@pytest.mark.parametrize("cls", [PretrainCommand, PrepareConfig, EvaluateCommand, FillMaskCommand])
def test_every_setting_is_read(cls):
    by_name = {*MESH_AXES, "beta1", "beta2", "epsilon"}  # read through getattr; turned above
    assert {path.rpartition(".")[2] for path in paths(cls)} - by_name <= attributes_read()
