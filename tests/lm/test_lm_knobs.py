"""No setting of lm-flax is accepted and ignored: every one is read, and turning it changes what is computed."""

import ast
import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import tokens

import core_flax
import lm_flax
from core_flax.config import OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.program import make_program
from core_flax.sharding import MESH_AXES
from core_flax.types import UserError
from lm_flax.config import ConvRun, GPT2Run, InputsConfig, LlamaRun, LMConfig, LSTMRun, SpeedrunRun, check_rows
from lm_flax.convolution import ConvConfig
from lm_flax.evaluate import EvaluateCommand
from lm_flax.generate import GenerateCommand
from lm_flax.llama import LlamaConfig
from lm_flax.model import GPT2Config
from lm_flax.prepare import PrepareConfig
from lm_flax.recurrent import LSTMConfig
from lm_flax.runs import COMMANDS, make_task
from lm_flax.score import ScoreCommand
from lm_flax.speedrun import SpeedrunConfig

END = 60
SIZES = {"vocab_size": 64, "num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 48, "max_length": 32}
RECIPE = {
    "inputs": InputsConfig(length=16),
    "optimizer": OptimizerConfig(),
    "schedule": ScheduleConfig(warmup_steps=2),
    "train": TrainConfig(num_steps=10, batch_size=4),
}
CONFIGS = {
    "gpt2": GPT2Run(**RECIPE, model=GPT2Config(**SIZES)),
    "llama": LlamaRun(**RECIPE, model=LlamaConfig(**SIZES, num_kv_heads=4)),
    "speedrun": SpeedrunRun(**RECIPE, model=SpeedrunConfig(**SIZES, dropout=0.1)),
    "conv": ConvRun(**RECIPE, model=ConvConfig(vocab_size=64, num_layers=2, embedding_width=16, width=16)),
    "lstm": LSTMRun(**RECIPE, model=LSTMConfig(vocab_size=64, width=16)),
}
COMMON = {
    "inputs.length": 8,
    "inputs.packing": "stream",
    "inputs.order": "random",
    "loss.z_weight": 0.1,
    "loss.num_chunks": 2,
    "model.vocab_size": 72,
    "model.num_layers": 3,
}
TRANSFORMER = {
    "model.width": 64,
    "model.num_heads": 2,
    "model.mlp_width": 96,
    "model.max_length": 64,
    "model.remat": "block",
    "model.unroll": 1,
}
OWN = {
    "gpt2": TRANSFORMER
    | {
        "model.dropout": 0.2,
        "model.attention_dropout": 0.2,
        "model.init_stddev": 0.03,
        "model.norm_epsilon": 1e-6,
    },
    "llama": TRANSFORMER
    | {
        "model.num_heads": 8,
        "model.num_kv_heads": 2,
        "model.rope_theta": 500.0,
        "model.tied": True,
        "model.init_stddev": 0.03,
        "model.norm_epsilon": 1e-6,
    },
    "speedrun": TRANSFORMER
    | {"model.rope_theta": 500.0, "model.dropout": 0.2, "model.soft_cap": 5.0, "model.embedding_stddev": 0.5}
    | {"model.activation": "squared_relu"},
    "conv": {
        "model.embedding_width": 32,
        "model.width": 32,
        "model.kernel_width": 3,
        "model.gated": False,
        "model.direct": True,
        "model.dropout": 0.2,
        "model.init_stddev": 0.2,
    },
    "lstm": {
        "model.width": 32,
        "model.dropout": 0.2,
        "model.init_limit": 0.2,
        "model.forget_bias": 1.0,
        "inputs.order": "streams",
    },
}
"""Each setting of lm-flax's own and another value; those of every run are turned in tests/core/test_knobs.py."""
REFUSED = {"model.max_length"}
"""Where nothing is computed from it (rotary positions): it is what rows may not exceed."""


def paths(cls, prefix=""):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from paths(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def turned(config, path, value):
    section, _, name = path.rpartition(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def store():
    made = tokens(400) % END
    ends = np.arange(20, 401, 20)
    made[ends - 1] = END
    return SimpleNamespace(tokens_T=made, ends=ends)


@functools.cache
def computed(config):
    """The programs and what goes in at the first step."""
    try:
        task = make_task(config, store(), None, END)
        program = make_program(task, config, jax.devices()[:1])
    except UserError as error:
        return str(error)
    batches = task.batches(0, range(config.train.batch_size))
    batch = next(batches)
    batches.close()
    shapes = {name: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for name, x in batch.items()}
    with jax.set_mesh(program.mesh):
        step = program.step.trace(program.abstract_state, shapes).jaxpr
        init = program.init.trace(jax.random.key(config.seed)).jaxpr
        if isinstance(config, LSTMRun):  # constants in it are not shown
            init = [x.tobytes() for x in jax.tree.leaves(jax.device_get(program.init(jax.random.key(config.seed))))]
    return {name: x.tobytes() for name, x in batch.items()}, str(step), str(init)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_is_turned(kind):
    own = {path for path in paths(type(CONFIGS[kind])) if path.split(".")[0] in ("model", "inputs", "loss")}
    assert set(COMMON | OWN[kind]) == own


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind in CONFIGS for path in COMMON | OWN[kind]])
def test_turning_it_changes_what_is_computed(kind, path):
    if kind != "gpt2" and path in ("inputs.length", "inputs.packing", "loss.z_weight", "loss.num_chunks"):
        return  # the same code as GPT-2's
    config = turned(CONFIGS[kind], path, (COMMON | OWN[kind])[path])
    if kind != "gpt2" and path in REFUSED:
        small = turned(CONFIGS[kind], path, 15)
        with pytest.raises(UserError, match="15, the tokens that the model can take"):
            check_rows(small)
        return
    assert computed(config) != computed(CONFIGS[kind])


@functools.cache
def attributes_read():
    """Names of all attributes that the packages read, outside checks of ranges."""
    found = set()
    for package in (core_flax, lm_flax):
        for path in Path(package.__path__[0]).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            checks = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
            checked = {id(node) for check in checks for node in ast.walk(check)}
            found |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and id(node) not in checked}
    return found


@pytest.mark.parametrize(
    "cls", [*COMMANDS.values(), PrepareConfig, EvaluateCommand, GenerateCommand, ScoreCommand, LMConfig]
)
def test_every_setting_is_read(cls):
    by_name = {*MESH_AXES, "beta1", "beta2", "epsilon"}  # read through getattr
    assert {path.rpartition(".")[2] for path in paths(cls)} - by_name <= attributes_read()
