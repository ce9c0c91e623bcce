"""Training of word vectors: every (word, context) pair of the global batch weighs the same."""

import dataclasses
from collections.abc import Generator, Iterator
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from core_flax.data.feed import prefetch
from core_flax.hardware import compute_dtype
from core_flax.task import Cost, Evaluator, MetricSums, Task
from core_flax.types import Array, Batch, Params, RowNumbers, Sums
from lm_flax.config import Word2VecRun
from lm_flax.data import TokenStore
from lm_flax.sharding import AXIS_FIELDS, WORD2VEC_RULES
from lm_flax.windows import WindowBatches
from lm_flax.word2vec import Word2Vec, loss_weights, word2vec_sums


def make_task(config: Word2VecRun, train: TokenStore, held_out: TokenStore | None) -> Task:
    """The task of a run.

    Args:
      config: its settings.
      train: the text to train on; how often each word occurs in it decides what is left out, and noise.
      held_out: the text to evaluate on, if there is any.
    """
    batch_size, task = config.train.batch_size, task_without_data(config)

    def windows_of(text: TokenStore, batch_size: int) -> WindowBatches:
        return WindowBatches(text.tokens_T, text.ends, train.counts_V, config.inputs, config.seed, batch_size)

    windows = windows_of(train, batch_size)

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        return prefetch(partial(windows.make_batch, rows=rows), start_step, config.train.num_steps)

    def evaluator(held_out: WindowBatches) -> Evaluator:
        def in_order() -> Iterator[Batch]:
            return held_out.in_order(config.train.eval_batches * config.train.num_microbatches)

        def metric_sums(params: Params, batch: Batch) -> MetricSums:
            losses, metrics = cast(tuple[Sums, MetricSums], task.loss_sums(params, batch, None))
            return {"loss": (losses["loss"], metrics["above_noise"][1]), **metrics}

        return Evaluator(in_order, metric_sums, objective="loss")

    evaluators = {}
    if held_out is not None:
        # What fits in training fits in evaluation; the sums are the same in whatever portions.
        evaluators["held_out"] = evaluator(windows_of(held_out, batch_size // config.train.num_microbatches))
    return dataclasses.replace(task, batches=batches, evaluators=evaluators)


def task_without_data(config: Word2VecRun) -> Task:
    """All of the task that settings alone decide: enough to compile its step for the shapes of ``batch_shapes``."""
    model = Word2Vec(config.model, compute_dtype(config.train.compute_dtype))
    inputs, tokens = config.inputs, config.train.batch_size * config.inputs.length

    def init(key: Array) -> Params:
        ids = jnp.zeros((1, 2), jnp.int32)
        return model.init(key, ids, ids[..., None], jnp.ones((1, 2, 2), bool))["params"]

    def loss_sums(params: Params, batch: Batch, key: Array | None) -> tuple[Sums, MetricSums]:
        del key
        return word2vec_sums(model, params, batch, inputs.window)

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        raise AssertionError("a task without data has no batches")

    return Task(
        init=init,
        loss_weights=lambda batch: loss_weights(batch, config.model, inputs.window),
        loss_sums=loss_sums,
        batches=batches,
        param_rules=WORD2VEC_RULES,
        axis_fields=AXIS_FIELDS,
        cost=lambda step: Cost(tokens=tokens),
    )


def batch_shapes(config: Word2VecRun, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch of a step (``WindowBatches``)."""
    del step  # all have the same
    shape = config.train.batch_size, config.inputs.length
    words = {name: shape for name in ("tokens", "sequences", "reach")}
    shapes = {**words, "negatives": (*shape, config.inputs.num_negatives)}
    return {name: jax.ShapeDtypeStruct(each, "int32") for name, each in shapes.items()}
