"""The fine-tuning task: one loss for each kind of label, over packed units."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_flax.finetune.batches import PackedUnits
from bert_flax.finetune.config import FinetuneConfig
from bert_flax.finetune.inputs import Units
from bert_flax.finetune.model import BertForSequences, BertForTokens, num_outputs
from bert_flax.finetune.predictions import predict, score
from bert_flax.finetune.tasks import TaskSpec
from bert_flax.model import BertConfig, flops_per_example
from bert_flax.sharding import AXIS_FIELDS, PARAM_RULES
from core_flax.data.feed import prefetch
from core_flax.hardware import compute_dtype
from core_flax.losses import cross_entropy_sums
from core_flax.params import leaves
from core_flax.sharding import same_share
from core_flax.task import Cost, Evaluator, MetricSums, Outputs, Task
from core_flax.types import Array, Batch, Params, RowNumbers, Sums


@dataclass(frozen=True)
class Labelled:
    """A data set with the units made of it."""

    examples: Sequence[Any]
    units: Units


def make_task(
    config: FinetuneConfig,
    spec: TaskSpec,
    train: Units,
    held_out: Mapping[str, Labelled],
    pretrained: Params,
    row_multiple: int = 1,
) -> Task:
    """The task of a run.

    Args:
      config: its settings.
      spec: what is learned.
      train: training units with labels.
      held_out: data sets to evaluate on; the first one's primary metric ranks checkpoints.
      pretrained: parameters to begin with; of those that the model has not, none is used.
      row_multiple: what the rows of a batch must divide by: devices that share it times microbatches.
    """
    model = make_model(spec, config.model, compute_dtype(config.train.compute_dtype))
    packed = PackedUnits(train, config.inputs.max_length, row_multiple)

    def init(key: Array) -> Params:
        return model.init(key, _example_batch())["params"]

    def loss_sums(params: Params, batch: Batch, key: Array | None) -> tuple[Sums, MetricSums]:
        rngs = None if key is None else {"dropout": key}
        scores = model.apply({"params": params}, batch, row_B=batch["row"], deterministic=key is None, rngs=rngs)
        return scored_sums(spec, scores, batch)

    tokens = packed.mean_tokens(config.train.batch_size)
    rows = tokens / packed.row_length
    flops = rows * flops_per_example(config.model, packed.row_length, 0)
    shapes = dict(leaves(jax.eval_shape(init, jax.random.key(0))))
    return Task(
        init=init,
        loss_weights=lambda batch: {"loss": jnp.sum(label_weights(spec, batch))},
        loss_sums=loss_sums,
        batches=partial(_batches, packed, config),
        param_rules=PARAM_RULES,
        initial={path: array for path, array in leaves(pretrained) if path in shapes},
        axis_fields=AXIS_FIELDS,
        row_lengths={"--inputs.max-length": packed.row_length},
        evaluators={name: make_evaluator(config, spec, model, data, row_multiple) for name, data in held_out.items()},
        cost=lambda step: Cost(tokens=round(tokens), flops=flops),
    )


def _batches(
    packed: PackedUnits, config: FinetuneConfig, start_step: int, rows: RowNumbers
) -> Generator[Batch, None, None]:
    """This host's share of the rows of each batch, if ``rows`` are its share of the units."""
    batch_size = config.train.batch_size

    def make_batch(step: int) -> Batch:
        batch = packed.make_batch(step, batch_size, config.seed)
        share = same_share(rows, batch_size, len(batch["tokens"]))
        return {name: array[share] for name, array in batch.items()}

    return prefetch(make_batch, start_step, config.train.num_steps)


def make_model(spec: TaskSpec, config: BertConfig, dtype: Any = jnp.float32) -> BertForSequences | BertForTokens:
    """The encoder with the task's head."""
    scored = BertForTokens if spec.kind in ("span", "tagging") else BertForSequences
    return scored(config, num_outputs(spec), dtype)


def make_evaluator(
    config: FinetuneConfig,
    spec: TaskSpec,
    model: BertForSequences | BertForTokens,
    data: Labelled,
    row_multiple: int,
) -> Evaluator:
    """Official metrics over all examples of a data set, each counted once."""
    packed = PackedUnits(data.units, config.inputs.max_length, row_multiple)
    num_rows = -(-config.train.batch_size // row_multiple) * row_multiple

    def outputs(params: Params, batch: Batch) -> Outputs:
        return {"scores": model.apply({"params": params}, batch)}

    def figures(told: Sequence[tuple[Batch, Outputs]]) -> dict[str, float]:
        if not all(np.isfinite(outputs["scores"]).all() for _, outputs in told):
            raise FloatingPointError("a score")
        return dict(score(spec, data.examples, predict(spec, data.examples, data.units, told, config.inputs)))

    def batches() -> Iterator[Batch]:
        return packed.in_order(num_rows)

    return Evaluator(batches, lambda params, batch: {}, spec.primary, True, outputs, figures)


def label_weights(spec: TaskSpec, batch: Batch) -> Array:
    """What each label counts: [R, L] for tags, else [R, S]."""
    return (batch["labels"] >= 0).astype(jnp.float32) if spec.kind == "tagging" else batch["weights"]


def scored_sums(spec: TaskSpec, scores: Array, batch: Batch) -> tuple[Sums, MetricSums]:
    """Sums over the units of a batch: of the loss, and of correct predictions where there are classes.

    Cross-entropy over classes or choices; squared error of a score; for answers the mean of the cross-entropies of
    first and last token over all tokens of the window (section 4.2); for tags the cross-entropy of each labelled token.

    Args:
      spec: the task.
      scores: what the model returns for the batch.
      batch: see PackedUnits.
    """
    labels, weights = batch["labels"], label_weights(spec, batch)
    total = jnp.sum(weights)
    match spec.kind:
        case "regression":
            error_RS = scores[..., 0, 0] - labels
            return {"loss": jnp.sum(weights * error_RS**2)}, {}
        case "span":
            slots = 1 + jnp.arange(weights.shape[1])
            inside_RSL = batch["sequences"][:, None, :] == slots[:, None]
            scores_R2SL = jnp.where(
                inside_RSL[:, None], scores.transpose(0, 2, 1)[:, :, None], jnp.finfo(jnp.float32).min
            )
            both = jnp.stack([weights, weights], axis=1)
            loss, correct = cross_entropy_sums(scores_R2SL, labels.transpose(0, 2, 1), both)
            return {"loss": loss / 2}, {"accuracy": (correct / 2, total)}
        case "tagging":
            loss, correct = cross_entropy_sums(scores, jnp.maximum(labels, 0), weights)
        case "choice":
            loss, correct = cross_entropy_sums(scores[..., 0], labels, weights)
        case _:
            loss, correct = cross_entropy_sums(scores[..., 0, :], labels, weights)
    return {"loss": loss}, {"accuracy": (correct, total)}


def _example_batch() -> Batch:
    """Arrays of the right kinds, for shapes of parameters."""
    ids = np.zeros((1, 8), np.int32)
    return {
        "tokens": ids,
        "segments": ids,
        "positions": ids,
        "sequences": ids,
        "first_tokens": np.zeros((1, 1, 1), np.int32),
    }
