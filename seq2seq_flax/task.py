"""The translation task: cross-entropy with label smoothing, each target token of the global batch weighing the same."""

import dataclasses
from collections.abc import Generator, Iterator

import jax
import jax.numpy as jnp

from core_flax.data.feed import prefetch
from core_flax.hardware import compute_dtype
from core_flax.sharding import same_share
from core_flax.task import Cost, Evaluator, MetricSums, Task
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import Array, Batch, Params, RowNumbers, Sums
from seq2seq_flax.architectures import Model, axis_fields, flops_per_row, is_transformer, make_model, param_rules
from seq2seq_flax.batches import PairBatches
from seq2seq_flax.config import AnyTranslateConfig
from seq2seq_flax.pairs import PairStore


def make_task(
    config: AnyTranslateConfig,
    train: PairStore,
    held_out: PairStore | None,
    tokenizer: SentencePiece,
    row_multiple: int = 1,
) -> Task:
    """The task of a run.

    Args:
      config: its settings.
      train: pairs to train on.
      held_out: pairs to evaluate on, if there are any.
      tokenizer: that of both.
      row_multiple: what the rows of a batch must divide by: devices that share it times microbatches.
    """
    num_rows = config.train.batch_size
    pairs = PairBatches(train, config.inputs, num_rows, tokenizer.bos_id, row_multiple)

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        def make_batch(step: int) -> Batch:
            batch = pairs.make_batch(step, config.seed)
            share = same_share(rows, num_rows, len(batch["target_labels"]))
            return {name: array[share] for name, array in batch.items()}

        return prefetch(make_batch, start_step, config.train.num_steps)

    evaluators = {}
    if held_out is not None:
        evaluators["held_out"] = make_evaluator(config, _model(config), held_out, tokenizer)
    source_tokens, target_tokens = pairs.mean_tokens()
    flops = num_rows * flops_per_row(config.model, *pairs.capacity)
    return dataclasses.replace(
        task_without_data(config),
        batches=batches,
        evaluators=evaluators,
        cost=lambda step: Cost(tokens=round(source_tokens + target_tokens), flops=flops),
    )


def _model(config: AnyTranslateConfig) -> Model:
    return make_model(config.model, compute_dtype(config.train.compute_dtype))


def task_without_data(config: AnyTranslateConfig) -> Task:
    """All of the task that settings alone decide: enough to compile its step for the shapes of ``batch_shapes``.

    Its cost is that of rows that are full on both sides.
    """
    model, num_rows, length = _model(config), config.train.batch_size, config.inputs.row_length
    cost = Cost(tokens=num_rows * 2 * length, flops=num_rows * flops_per_row(config.model, length, length))

    def loss_sums(params: Params, batch: Batch, key: Array | None) -> tuple[Sums, MetricSums]:
        return translation_sums(model, params, batch, key, config.inputs.label_smoothing)

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        raise AssertionError("a task without data has no batches")

    return Task(
        init=lambda key: init_params(model, key),
        loss_weights=loss_weights,
        loss_sums=loss_sums,
        batches=batches,
        param_rules=param_rules(config.model),
        axis_fields=axis_fields(config.model),
        row_lengths={"--inputs.row-length": length} if is_transformer(config.model) else {},
        cost=lambda step: cost,
    )


def batch_shapes(config: AnyTranslateConfig, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch of a step (``PairBatches``) whose sources have as many tokens as their targets."""
    del step  # all but a few have the same
    shape = jax.ShapeDtypeStruct((config.train.batch_size, config.inputs.row_length), "int32")
    source, target = ("tokens", "positions", "sequences"), ("inputs", "labels", "positions", "sequences")
    return {**{f"source_{name}": shape for name in source}, **{f"target_{name}": shape for name in target}}


def init_params(model: Model, key: Array) -> Params:
    """Parameters to begin with."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return model.init(key, ids, ids, source_sequences_BM=ids, target_sequences_BL=ids)["params"]


def make_evaluator(
    config: AnyTranslateConfig, model: Model, held_out: PairStore, tokenizer: SentencePiece
) -> Evaluator:
    """Loss (without smoothing) and accuracy over every held-out token, once each."""
    # What fits in training fits in evaluation; the sums are the same in whatever portions.
    num_rows = config.train.batch_size // config.train.num_microbatches
    pairs = PairBatches(held_out, config.inputs, num_rows, tokenizer.bos_id)

    def batches() -> Iterator[Batch]:
        return pairs.in_order(num_rows, config.train.eval_batches * config.train.num_microbatches)

    def metric_sums(params: Params, batch: Batch) -> MetricSums:
        _, metrics = translation_sums(model, params, batch, None, 0.0)
        return metrics

    return Evaluator(batches, metric_sums, objective="nll")


def target_weights(batch: Batch) -> Array:
    """1 at every target token, 0 at padding: float32 [R, L]."""
    return (batch["target_sequences"] > 0).astype(jnp.float32)


def loss_weights(batch: Batch) -> Sums:
    """Number of target tokens."""
    return {"loss": jnp.sum(target_weights(batch))}


def translation_sums(
    model: Model, params: Params, batch: Batch, key: Array | None, smoothing: float
) -> tuple[Sums, MetricSums]:
    """Sums over target tokens: of the smoothed loss, and of the plain one ("nll", nats) and of right predictions."""
    logits_BLV = model.apply(
        {"params": params},
        batch["source_tokens"],
        batch["target_inputs"],
        source_sequences_BM=batch["source_sequences"],
        target_sequences_BL=batch["target_sequences"],
        source_positions_BM=batch["source_positions"],
        target_positions_BL=batch["target_positions"],
        row_B=batch.get("row"),
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )
    weights_BL = target_weights(batch)
    smoothed, plain, correct = smoothed_sums(logits_BLV, batch["target_labels"], weights_BL, smoothing)
    total = jnp.sum(weights_BL)
    return {"loss": smoothed}, {"nll": (plain, total), "accuracy": (correct, total)}


def smoothed_sums(logits: Array, labels: Array, weights: Array, smoothing: float) -> tuple[Array, Array, Array]:
    """Weighted sums of the cross-entropy with smoothed labels, of that with plain ones, and of right predictions.

    The target distribution is ``1 - smoothing`` at the label plus ``smoothing / C`` everywhere, the label included
    (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    Args:
      logits: [..., C], any float type; the computation is in float32.
      labels: [...] int, in [0, C).
      weights: [...] float; 0 leaves a position out.
      smoothing: share spread over all classes.

    Returns:
      Three float32 scalars; losses in nats.
    """
    logits = logits.astype(jnp.float32)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)
    plain = total - label_logits
    spread = total - jnp.mean(logits, axis=-1)
    smoothed = (1.0 - smoothing) * plain + smoothing * spread
    correct = jnp.sum(logits >= label_logits[..., None], axis=-1) == 1
    return jnp.sum(smoothed * weights), jnp.sum(plain * weights), jnp.sum(correct * weights)
