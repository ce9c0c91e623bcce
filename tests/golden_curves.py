"""What the tests of golden curves share: taking the steps of a run on one device."""

import jax

from core_flax import sharding
from core_flax.program import first_state, make_program


def take_steps(task, config, shown):
    """The figures of each step that are named, rounded. Batches may differ in their number of rows."""
    program, figures, compiled = make_program(task, config, jax.devices()[:1]), [], {}
    with jax.set_mesh(program.mesh):
        state = first_state(task, program, config.seed)
        for batch in task.batches(0, range(config.train.batch_size)):
            num_rows = len(next(iter(batch.values())))
            placed = sharding.place_batch(batch, num_rows, program.mesh)
            if num_rows not in compiled:  # in a hurry: what is computed is the same
                lowered = program.step.lower(state, placed)
                compiled[num_rows] = lowered.compile({"xla_backend_optimization_level": 0})
            state, metrics = compiled[num_rows](state, placed)
            figures.append({name: round(float(metrics[name]), 6) for name in shown})
    return figures
