"""Measuring on held-out data: every example exactly once, sums first, one division at the end."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from core_flax import sharding
from core_flax.task import Evaluator, MetricSums, Outputs
from core_flax.types import Batch, Params


def make_evaluate(evaluator: Evaluator, mesh: Mesh) -> Callable[[Params], dict[str, float]]:
    """A function from parameters to metrics; it compiles once and may be called again and again."""
    measure = _make_measure(evaluator, mesh)

    def evaluate(params: Params) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        told: list[tuple[Batch, Outputs]] = []
        for batch, sums, outputs in measure(params):
            if evaluator.score:
                told.append((batch, outputs))
            for name, pair in sums.items():
                # float64 on the host: the sums of a large set outgrow float32's 24 bits.
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        means = {name: float(total / weight) if weight else 0.0 for name, (total, weight) in totals.items()}
        return {**means, **(evaluator.score(told) if evaluator.score else {})}

    return evaluate


def make_collect(evaluator: Evaluator, mesh: Mesh) -> Callable[[Params], list[tuple[Batch, Outputs]]]:
    """A function from parameters to every batch with its outputs, for predictions without labels."""
    measure = _make_measure(evaluator, mesh)
    return lambda params: [(batch, outputs) for batch, _, outputs in measure(params)]


def _make_measure(
    evaluator: Evaluator, mesh: Mesh
) -> Callable[[Params], Iterator[tuple[Batch, Mapping[str, tuple[float, float]], Outputs]]]:
    """A function from parameters to each batch with its sums and outputs, in numpy."""

    @jax.jit
    def measure(params: Params, batch: Batch) -> tuple[MetricSums, Outputs, Any]:
        sums: Any = evaluator.metric_sums(params, batch)
        sums, carry = sums if evaluator.carry else (sums, None)
        return sums, evaluator.outputs(params, batch), carry

    start = jax.jit(evaluator.carry, out_shardings=sharding.batch_sharding(mesh)) if evaluator.carry else None

    def measured(params: Params) -> Iterator[tuple[Batch, Mapping[str, tuple[float, float]], Outputs]]:
        carried = {"carry": start()} if start else {}
        for batch in evaluator.batches():
            size = len(next(iter(batch.values())))
            rows = sharding.host_rows(size, mesh)
            local = {name: array[rows] for name, array in batch.items()}
            with jax.set_mesh(mesh):
                sums, outputs, carry = measure(params, sharding.place_batch(local, size, mesh) | carried)
            carried = {"carry": carry} if start else {}
            fetched = {name: sharding.fetch(array) for name, array in outputs.items()}
            yield batch, jax.device_get(dict(sums)), fetched

    return measured
