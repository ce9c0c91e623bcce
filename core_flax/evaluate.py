"""Measuring on held-out data: every example exactly once, sums first, one division at the end."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from core_flax import sharding
from core_flax.task import Evaluator
from core_flax.types import Params


def make_evaluate(evaluator: Evaluator, mesh: Mesh) -> Callable[[Params], dict[str, float]]:
    """A function from parameters to metrics; it compiles once and may be called again and again."""
    metric_sums = jax.jit(evaluator.metric_sums)

    def evaluate(params: Params) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        with jax.set_mesh(mesh):
            for batch in evaluator.batches():
                size = len(next(iter(batch.values())))
                rows = sharding.host_rows(size, mesh)
                local = {name: array[rows.start : rows.stop] for name, array in batch.items()}
                sums: Any = jax.device_get(metric_sums(params, sharding.place_batch(local, size, mesh)))
                for name, pair in sums.items():
                    # float64 on the host: the sums of a large set outgrow float32's 24 bits.
                    totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        return {name: float(total / weight) if weight else 0.0 for name, (total, weight) in totals.items()}

    return evaluate
