"""What the training loop needs to know about one workload: a frozen dataclass of pure functions."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core_flax.params import ParamRule
from core_flax.types import Array, Batch, Params, RowNumbers, Sums

MetricSums = Mapping[str, tuple[Array, Array]]
"""Metric name -> (sum, sum of its weights): add over batches, then divide."""


Outputs = Mapping[str, Array]
"""What a model says of a batch: arrays whose first dim is the batch's."""


@dataclass(frozen=True)
class Evaluator:
    """One measurement on held-out data.

    Attributes:
      batches: () -> finite iterator over batches of one shape, in which every example has weight exactly once (a last,
        ragged batch is filled up with rows of weight zero).
      metric_sums: (params, batch) -> sums; jitted by the caller.
        With a ``carry`` it finds it as the batch's field "carry" and returns (sums, the next batch's carry).
      objective: the metric that checkpoints are ranked by.
      maximize: whether it is to become large, not small.
      outputs: (params, batch) -> arrays that are fetched, for metrics that are no sums; jitted together with the sums.
      score: every batch with its outputs, as numpy arrays -> metrics. FloatingPointError("a score") stops the run, if a
        number of which metrics are made is not finite. None: there are none, and no batch is kept.
      carry: () -> what the first batch finds, where each hands something to the next, row to row: a pytree of arrays
        whose first dim is the batch's. None: batches have nothing to do with each other.
    """

    batches: Callable[[], Iterator[Batch]]
    metric_sums: Callable[[Params, Batch], MetricSums | tuple[MetricSums, Any]]
    objective: str
    maximize: bool = False
    outputs: Callable[[Params, Batch], Outputs] = lambda params, batch: {}
    score: Callable[[Sequence[tuple[Batch, Outputs]]], Mapping[str, float]] | None = None
    carry: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Cost:
    """Size of one training step.

    Attributes:
      tokens: positions of the global batch, padding included; where rows are packed, on average and without it.
      flops: floating point operations of the model, forward and backward, as the matrix products of the architecture
        need them (no recomputation counted); 0: unknown.
    """

    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Task:
    """One workload.

    Attributes:
      init: key -> params.
      initial: parameters to begin with instead of those that ``init`` draws, by path; numpy arrays.
      loss_weights: batch -> the denominator of each loss term, from the data alone.
      loss_sums: (params, batch, key or None) -> (sum of each loss term, metric sums); the key is for dropout, None for
        none. The batch has the field "row", each example's number in the global batch, for ``layers.Dropout``. With a
        ``carry`` it has the field "carry" too, and the result a third part: the carry for the next step.
      batches: (start_step, rows) -> generator of the batches from that step on, of which only the given rows of
        train.batch_size are wanted on this host; closing it ends its threads. A pure function of the step. A batch may
        have another number of rows (packed examples), of which each host then gives the same share.
      param_rules: how each parameter is named, sharded and optimised.
      axis_fields: logical axis -> the config field that sets its size, for messages.
      row_lengths: the config field -> length of rows that it sets, of a model whose rows can be split along their
        length (mesh axis "sequence"); of others nothing.
      evaluators: by name; the first one's objective ranks checkpoints.
      cost: step -> what that training step amounts to; most tasks have one for all steps.
      carry: () -> what the first step finds, where each hands something to the next, row to row, as truncated
        back-propagation does: a pytree of arrays whose first dim is the example. It is part of the train state, so it
        is saved, and a resumed run goes on with it. None: steps hand on nothing.
    """

    init: Callable[[Array], Params]
    loss_weights: Callable[[Batch], Sums]
    loss_sums: Callable[[Params, Batch, Array | None], tuple[Sums, MetricSums] | tuple[Sums, MetricSums, Any]]
    batches: Callable[[int, RowNumbers], Generator[Batch, None, None]]
    param_rules: tuple[ParamRule, ...]
    initial: Mapping[str, Array] = field(default_factory=dict)
    axis_fields: Mapping[str, str] = field(default_factory=dict)
    row_lengths: Mapping[str, int] = field(default_factory=dict)
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)
    cost: Callable[[int], Cost] = lambda step: Cost()
    carry: Callable[[], Any] | None = None
