"""Training on streams: resumed exactly, the same whatever the microbatches and the mesh; evaluation of all the text."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params, tokens

from core_flax.checkpoint import load_params
from core_flax.config import CheckpointConfig, LogConfig, MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.evaluate import make_evaluate
from core_flax.loop import train
from core_flax.losses import vocabulary_sums
from core_flax.program import make_program
from core_flax.sharding import make_mesh, place_batch
from lm_flax.config import InputsConfig, LSTMRun
from lm_flax.recurrent import LSTMConfig, LSTMLanguageModel
from lm_flax.task import make_task

V, ROWS, SEPARATOR = 61, 4, 0
CONFIG = LSTMRun(
    model=LSTMConfig(vocab_size=64, num_layers=1, width=16, dropout=0.3),
    inputs=InputsConfig(length=5, order="streams"),
    optimizer=OptimizerConfig("sgd", learning_rate=1.0, weight_decay=0.0, clip_norm=0.2),
    schedule=ScheduleConfig("constant"),
    train=TrainConfig(num_steps=6, batch_size=ROWS, eval_every_steps=0),
    checkpoint=CheckpointConfig(every_steps=0),
    log=LogConfig(every_steps=1, tensorboard=False),
)


def text(num_tokens, *ends, seed):
    made = tokens(num_tokens, seed=seed) % (V - 1) + 1
    ends = np.array([*ends, num_tokens])
    made[ends - 1] = SEPARATOR
    info = SimpleNamespace(tokens=num_tokens, bytes=4 * num_tokens)
    return SimpleNamespace(tokens_T=made, ends=ends, counts_V=np.bincount(made, minlength=V), info=info)


TRAIN, HELD_OUT = text(98, 30, 61, seed=2), text(47, 20, seed=3)
TASK = make_task(CONFIG, TRAIN, HELD_OUT, SEPARATOR)


def changed(**changes):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    """With dropout, in the midst of an epoch: the states of four rows go on."""
    program = make_program(TASK, CONFIG)
    whole = train(TASK, CONFIG, program, tmp_path / "whole")
    train(TASK, changed(num_steps=3), make_program(TASK, changed(num_steps=3)), tmp_path / "resumed")
    assert train(TASK, CONFIG, program, tmp_path / "resumed") == whole
    one, other = (load_params(tmp_path / name / "checkpoints")[0] for name in ("whole", "resumed"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_microbatches_and_the_mesh_change_nothing():
    def run(config, **mesh):
        config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
        program = make_program(TASK, config, jax.devices()[: np.prod([*mesh.values()])])
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(0))
            for batch in TASK.batches(0, range(ROWS)):
                state, _ = program.step(state, place_batch(batch, ROWS, program.mesh))
        return jax.device_get((state.params, state.carry))

    expected = run(CONFIG, data=1)
    for found in (run(changed(num_microbatches=2), data=2), run(CONFIG, data=1, fsdp=2, tensor=2)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)


def test_evaluation_is_the_same_whatever_the_microbatches():
    params = random_params(CONFIG.model)
    tasks = [make_task(config, TRAIN, HELD_OUT, SEPARATOR) for config in (CONFIG, changed(num_microbatches=2))]
    one, other = (make_evaluate(task.evaluators["held_out"], make_mesh(MeshConfig()))(params) for task in tasks)
    assert one == other


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_evaluation_predicts_each_token_once_from_all_before_it(packing):
    """By hand: each stream read at once, as sequences that separators begin."""
    inputs = InputsConfig(length=5, packing=packing, order="streams")
    task = make_task(dataclasses.replace(CONFIG, inputs=inputs), TRAIN, HELD_OUT, SEPARATOR)
    params = random_params(CONFIG.model)
    found = make_evaluate(task.evaluators["held_out"], make_mesh(MeshConfig()))(params)

    model, labels = LSTMLanguageModel(CONFIG.model), HELD_OUT.tokens_T
    read, total = np.concatenate([[SEPARATOR], labels[:-1]]), 0.0
    for start in range(0, len(labels), 12):
        row = read[None, start : start + 12]
        documents = np.cumsum(row == SEPARATOR, axis=1) if packing == "documents" else np.zeros_like(row)
        x_BLD = model.apply({"params": params}, row, sequences_BL=documents)
        label = labels[None, start : start + 12]
        total += float(vocabulary_sums(x_BLD, model.output_table(params), label, jnp.ones(label.shape)).loss)
    np.testing.assert_allclose(found["loss"], total / len(labels), rtol=1e-5)
