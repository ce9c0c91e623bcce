"""Tiny language models learn four rows by heart."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_tasks import in_a_hurry
from tiny_models import tokens

from core_flax import sharding
from core_flax.config import OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.program import make_program
from lm_flax.config import GPT2Run, InputsConfig, SpeedrunRun
from lm_flax.model import GPT2Config
from lm_flax.speedrun import SpeedrunConfig
from lm_flax.task import make_task

STEPS, ROWS, LENGTH, END = 60, 4, 16, 60
SIZES = {"vocab_size": 61, "num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 64, "max_length": LENGTH}
RECIPE = {
    "inputs": InputsConfig(length=LENGTH),
    "schedule": ScheduleConfig("constant", warmup_steps=5),
    "train": TrainConfig(num_steps=STEPS, batch_size=ROWS),
}
CONFIGS = {
    "gpt2": GPT2Run(
        **RECIPE,
        model=GPT2Config(**SIZES, dropout=0.0, attention_dropout=0.0),
        optimizer=OptimizerConfig(learning_rate=2e-2, weight_decay=0.0),
    ),
    "speedrun": SpeedrunRun(
        **RECIPE, model=SpeedrunConfig(**SIZES), optimizer=OptimizerConfig("muon", learning_rate=2e-2, weight_decay=0.0)
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_four_rows_are_learned_by_heart(kind):
    made = tokens(ROWS * LENGTH) % END
    ends = np.array([ROWS * LENGTH])  # of several documents, nobody could tell how one begins
    made[ends - 1] = END
    store, config = SimpleNamespace(tokens_T=made, ends=ends), CONFIGS[kind]
    task = make_task(config, store, None, END)
    with in_a_hurry():
        program = make_program(task, config, jax.devices()[:1])
        with jax.set_mesh(program.mesh):
            batch = sharding.place_batch(next(task.batches(0, range(ROWS))), ROWS, program.mesh)
            state, losses = program.init(jax.random.key(0)), []
            for _ in range(STEPS):
                state, metrics = program.step(state, batch)
                losses.append(float(metrics["loss"]))
    assert losses[0] > 3.9  # as good as guessing
    assert losses[-1] < 0.05 and metrics["accuracy"] == 1
