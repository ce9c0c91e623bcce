"""The pretraining task: masked tokens and next sentences, each loss divided by its own weight."""

import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bert_flax.config import InputsConfig, PretrainConfig
from bert_flax.examples import PairExamples, eval_batches
from bert_flax.model import BertForPreTraining, flops_per_example
from bert_flax.sharding import AXIS_FIELDS, PARAM_RULES
from core_flax.data.feed import prefetch
from core_flax.data.records import PassageStore
from core_flax.hardware import compute_dtype
from core_flax.losses import cross_entropy_sums
from core_flax.task import Cost, Evaluator, MetricSums, Task
from core_flax.text.wordpiece import WordPiece
from core_flax.types import Array, Batch, Params, RowNumbers, Sums


def make_task(
    config: PretrainConfig, train: PassageStore, held_out: PassageStore | None, vocabulary: WordPiece
) -> Task:
    """The task of a run.

    Args:
      config: its settings.
      train: text to train on; how often each token occurs in it is the baseline that evaluation compares with.
      held_out: text to evaluate on, if there is any.
      vocabulary: that of both.
    """
    phases = _phases(config, train, vocabulary)
    task = task_without_data(config)

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        make_batch = partial(phases.make_batch, rows=rows)
        return prefetch(make_batch, start_step, config.train.num_steps, num_workers=config.inputs.num_workers)

    if held_out is not None:
        model = _model(config)
        task = dataclasses.replace(
            task, evaluators={"held_out": _evaluator(config, model, train, held_out, vocabulary)}
        )
    return dataclasses.replace(task, batches=batches)


def _model(config: PretrainConfig) -> BertForPreTraining:
    return BertForPreTraining(config.model, compute_dtype(config.train.compute_dtype))


def task_without_data(config: PretrainConfig) -> Task:
    """All of the task that settings alone decide: enough to compile its step for the shapes of ``batch_shapes``."""
    model, batch_size = _model(config), config.train.batch_size

    def init(key: Array) -> Params:
        ids = jnp.zeros((1, 8), jnp.int32)
        return model.init(key, ids, ids, jnp.ones((1, 8), bool), ids[:, :2])["params"]

    def loss_sums(params: Params, batch: Batch, key: Array | None) -> tuple[Sums, MetricSums]:
        return pretraining_sums(model, params, batch, key)

    def batches(start_step: int, rows: RowNumbers) -> Generator[Batch, None, None]:
        raise AssertionError("a task without data has no batches")

    def cost(step: int) -> Cost:
        inputs = inputs_at(config, step)
        flops = flops_per_example(config.model, inputs.length, inputs.max_predictions)
        return Cost(tokens=batch_size * inputs.length, flops=batch_size * flops)

    return Task(
        init=init,
        loss_weights=loss_weights,
        loss_sums=loss_sums,
        batches=batches,
        param_rules=PARAM_RULES,
        axis_fields=AXIS_FIELDS,
        row_lengths={
            "--inputs.length": config.inputs.length,
            **({} if config.inputs.long_from_step is None else {"--model.max-length": config.model.max_length}),
        },
        cost=cost,
    )


@dataclass(frozen=True)
class Phases:
    """Examples of the usual length, and from a step on of the model's full length."""

    inputs: InputsConfig
    short: PairExamples
    long: PairExamples | None = None

    def at(self, step: int) -> PairExamples:
        """The examples of a step."""
        switch = self.inputs.long_from_step
        return self.short if self.long is None or switch is None or step < switch else self.long

    def make_batch(self, step: int, rows: RowNumbers) -> Batch:
        """The batch of a step."""
        return self.at(step).make_batch(step, rows)


def _phases(config: PretrainConfig, train: PassageStore, vocabulary: WordPiece) -> Phases:
    def examples(inputs: InputsConfig) -> PairExamples:
        return PairExamples(train, vocabulary, inputs, config.seed, config.train.batch_size)

    long = None if config.inputs.long_from_step is None else examples(long_inputs(config))
    return Phases(config.inputs, examples(config.inputs), long)


def _evaluator(
    config: PretrainConfig,
    model: BertForPreTraining,
    train: PassageStore,
    held_out: PassageStore,
    vocabulary: WordPiece,
) -> Evaluator:
    """Held-out losses beside those of the training text's unigram model."""
    # One is added to every count, so that what the training text lacks is not impossible.
    log_unigram_V = np.log((train.unigram + 1) / (train.unigram + 1).sum()).astype(np.float32)

    def batches() -> Iterator[Batch]:
        # What fits in training fits in evaluation; the examples are the same in whatever portions.
        portions = config.train.num_microbatches
        size, number = config.train.batch_size // portions, config.train.eval_batches * portions
        return eval_batches(held_out, vocabulary, config.inputs, size, number)

    def metric_sums(params: Params, batch: Batch) -> MetricSums:
        return held_out_sums(model, params, batch, log_unigram_V)

    return Evaluator(batches, metric_sums, objective="mlm_loss")


def inputs_at(config: PretrainConfig, step: int) -> InputsConfig:
    """What the examples of a step look like."""
    switch = config.inputs.long_from_step
    return config.inputs if switch is None or step < switch else long_inputs(config)


def batch_shapes(config: PretrainConfig, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch of a step (``PairExamples.examples``)."""
    inputs, batch = inputs_at(config, step), (config.train.batch_size,)
    length, predictions = (*batch, inputs.length), (*batch, inputs.max_predictions)
    shapes = {
        "tokens": (length, "int32"),
        "segments": (length, "int32"),
        "valid": (length, "bool"),
        "masked_positions": (predictions, "int32"),
        "masked_tokens": (predictions, "int32"),
        "masked_weights": (predictions, "float32"),
        "next_is_random": (batch, "int32"),
        "example_weights": (batch, "float32"),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def long_inputs(config: PretrainConfig) -> InputsConfig:
    """The inputs stretched to the model's full length, with as many more predictions."""
    inputs, length = config.inputs, config.model.max_length
    return dataclasses.replace(inputs, length=length, max_predictions=inputs.max_predictions * length // inputs.length)


def loss_weights(batch: Batch) -> Sums:
    """Number of masked tokens and of sentence pairs."""
    return {"mlm": jnp.sum(batch["masked_weights"]), "next_sentence": jnp.sum(batch["example_weights"])}


def pretraining_sums(
    model: BertForPreTraining, params: Params, batch: Batch, key: Array | None
) -> tuple[Sums, MetricSums]:
    """Sums of both losses, and the accuracies."""
    mlm_BPV, next_BC = model.apply(
        {"params": params},
        batch["tokens"],
        batch["segments"],
        batch["valid"],
        batch["masked_positions"],
        row_B=batch.get("row"),
        deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )
    mlm, mlm_correct = cross_entropy_sums(mlm_BPV, batch["masked_tokens"], batch["masked_weights"])
    next_sentence, next_correct = cross_entropy_sums(next_BC, batch["next_is_random"], batch["example_weights"])
    weights = loss_weights(batch)
    return {"mlm": mlm, "next_sentence": next_sentence}, {
        "mlm_accuracy": (mlm_correct, weights["mlm"]),
        "next_sentence_accuracy": (next_correct, weights["next_sentence"]),
    }


def held_out_sums(model: BertForPreTraining, params: Params, batch: Batch, log_unigram_V: Array) -> MetricSums:
    """Losses and accuracies without dropout, beside those of the unigram model for the same masked tokens."""
    losses, metrics = pretraining_sums(model, params, batch, None)
    weights = loss_weights(batch)
    labels_BP, weights_BP = batch["masked_tokens"], batch["masked_weights"]
    unigram = -jnp.sum(jnp.asarray(log_unigram_V)[labels_BP] * weights_BP)
    most_frequent = jnp.sum((labels_BP == int(np.argmax(log_unigram_V))) * weights_BP)
    return {
        "mlm_loss": (losses["mlm"], weights["mlm"]),
        "unigram_loss": (unigram, weights["mlm"]),
        "mlm_accuracy": metrics["mlm_accuracy"],
        "unigram_accuracy": (most_frequent, weights["mlm"]),
        "next_sentence_loss": (losses["next_sentence"], weights["next_sentence"]),
        "next_sentence_accuracy": metrics["next_sentence_accuracy"],
    }
