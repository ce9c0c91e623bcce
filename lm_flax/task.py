"""The language modelling task: cross-entropy of the next token, every token of the global batch weighing the same."""

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_flax.data.feed import prefetch
from core_flax.hardware import compute_dtype
from core_flax.losses import vocabulary_sums
from core_flax.task import Cost, Evaluator, MetricSums, Task
from core_flax.types import Array, Batch, Params, RowNumbers, Sums, UserError
from lm_flax.architectures import ARCHITECTURES, context, init_params, make_model, soft_cap
from lm_flax.batches import Rows, TextBatches, in_order
from lm_flax.config import AnyLM
from lm_flax.data import TokenStore
from lm_flax.streams import Streams


def make_task(config: AnyLM, train: TokenStore, held_out: TokenStore | None, before: int | None) -> Task:
    """The task of a run.

    Args:
      config: its settings.
      train: text to train on.
      held_out: text to evaluate on, if there is any.
      before: the token that ends documents (Tokenizer.end_id), and so stands before each.

    Raises:
      UserError: the text is shorter than one row, or nothing of the held-out text is predicted.
    """
    batch_size, inputs = config.train.batch_size, config.inputs
    if inputs.order == "streams":
        source: Streams | TextBatches = make_streams(config, train, before, batch_size)
    else:
        rows = Rows(train.tokens_T, train.ends, before, inputs)
        source = TextBatches(rows, inputs.order, config.seed, batch_size)

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        return prefetch(partial(source.make_batch, rows=rows), start_step, config.train.num_steps)

    evaluators = {}
    if held_out is not None:
        evaluators["held_out"] = make_evaluator(config, _model(config), held_out, before)
    return dataclasses.replace(task_without_data(config), batches=batches, evaluators=evaluators)


def _model(config: AnyLM) -> Any:
    return make_model(config.model, compute_dtype(config.train.compute_dtype))


def task_without_data(config: AnyLM) -> Task:
    """All of the task that settings alone decide: enough to compile its step for the shapes of ``batch_shapes``."""
    model, architecture = _model(config), ARCHITECTURES[type(config.model)]
    batch_size, length = config.train.batch_size, config.inputs.length
    cost = Cost(batch_size * length, batch_size * architecture.flops_per_example(config.model, length))

    def loss_sums(params: Params, batch: Batch, key: Array | None) -> Any:
        sums, *carry = token_sums(config, model, params, batch, key)
        return {"loss": sums.loss}, {"accuracy": (sums.correct, jnp.sum(batch["weights"]))}, *carry

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        raise AssertionError("a task without data has no batches")

    return Task(
        init=partial(init_params, model),
        loss_weights=loss_weights,
        loss_sums=loss_sums,
        batches=batches,
        param_rules=architecture.rules,
        axis_fields=architecture.axis_fields,
        row_lengths={} if context(config.model) is None else {"--inputs.length": length},
        cost=lambda step: cost,
        carry=partial(model.init_cache, batch_size, 0) if config.inputs.order == "streams" else None,
    )


def batch_shapes(config: AnyLM, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch of a step, of a text with several documents (``Rows.at``, ``Streams.make_batch``)."""
    del step  # all have the same
    fields = {"tokens": "int32", "labels": "int32", "weights": "float32"}
    if config.inputs.order == "streams":
        fields["starts"] = "bool"
    elif config.inputs.packing == "documents":
        fields |= {"sequences": "int32", "positions": "int32"}
    shape = config.train.batch_size, config.inputs.length
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in fields.items()}


def make_streams(config: AnyLM, store: TokenStore, before: int | None, num_rows: int) -> Streams:
    """A text as parallel streams; with packing "documents", what was read is forgotten at each document's end."""
    starts_T = None
    if config.inputs.packing == "documents" and len(store.ends) > 1:
        starts_T = np.zeros(len(store.tokens_T), bool)
        starts_T[store.ends - 1] = True  # reading the token that ends a document, a model begins the next
    return Streams(store.tokens_T, before, starts_T, num_rows, config.inputs.length)


def loss_weights(batch: Batch) -> Sums:
    """Number of predicted tokens."""
    return {"loss": jnp.sum(batch["weights"])}


def token_sums(config: AnyLM, model: Any, params: Params, batch: Batch, key: Array | None) -> tuple[Any, ...]:
    """(sums over the batch's predicted tokens, VocabularySums,) and, of a batch with a carry, the one for the next.

    Args:
      config: the settings: the loss's, and the model's cap.
      model: the module.
      params: its parameters.
      batch: as ``Rows.at`` or ``Streams.make_batch`` makes it.
      key: for dropout; None: none.
    """
    how = {
        "row_B": batch.get("row"),
        "deterministic": key is None,
        "rngs": None if key is None else {"dropout": key},
    }
    variables, carry = {"params": params}, []
    if "carry" in batch:
        read = batch["tokens"], batch["carry"], batch["starts"]
        x_BLD, states = model.apply(variables, *read, method="go_on", **how)
        carry = [states]
    else:
        packed = {"positions_BL": batch.get("positions"), "sequences_BL": batch.get("sequences")}
        x_BLD = model.apply(variables, batch["tokens"], **packed, **how)
    sums = vocabulary_sums(
        x_BLD,
        model.output_table(params),
        batch["labels"],
        batch["weights"],
        num_chunks=config.loss.num_chunks,
        z_weight=config.loss.z_weight,
        soft_cap=soft_cap(config.model),
    )
    return sums, *carry


def make_evaluator(
    config: AnyLM, model: Any, held_out: TokenStore, before: int | None, stride: int | None = None
) -> Evaluator:
    """Cross-entropy ("loss", nats a token), bits per byte and accuracy over every held-out token, once each.

    Args:
      config: the settings.
      model: the module.
      held_out: the text to evaluate on.
      before: the token that stands before each document, and before the text.
      stride: as in ``batches.in_order``; not for streams, of which nothing is forgotten.

    Raises:
      UserError: nothing of the text is predicted.
    """
    recurrent = config.inputs.order == "streams"
    # What fits in training fits in evaluation, and rows are the same in whatever portions. Streams are not: of another
    # number of them each would begin elsewhere.
    portions = 1 if recurrent else config.train.num_microbatches
    num_rows, most = config.train.batch_size // portions, config.train.eval_batches * portions
    # Exact over the whole text, whose bytes and tokens are counted; an estimate over a part of it.
    bytes_per_token = held_out.info.bytes / held_out.info.tokens
    if recurrent:
        batches: Callable[[], Iterator[Batch]] = partial(
            make_streams(config, held_out, before, num_rows).in_order, most
        )
    else:
        rows = Rows(held_out.tokens_T, held_out.ends, before, config.inputs)
        if not rows.num_predicted:
            raise UserError("the held-out text is one token, which nothing stands before to predict it: hold out more")
        batches = partial(in_order, rows, num_rows, most, stride)

    def metric_sums(params: Params, batch: Batch) -> Any:
        (sums, *carry), total = token_sums(config, model, params, batch, None), jnp.sum(batch["weights"])
        metrics: MetricSums = {
            "loss": (sums.cross_entropy, total),
            "bits_per_byte": (sums.cross_entropy / math.log(2), total * bytes_per_token),
            "accuracy": (sums.correct, total),
        }
        return (metrics, *carry) if recurrent else metrics

    carry = partial(model.init_cache, num_rows, 0) if recurrent else None
    return Evaluator(batches, metric_sums, objective="loss", carry=carry)
