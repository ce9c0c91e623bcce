"""The compiled parts of a run: what the settings, the devices and a task make together."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from core_flax import kernels, sharding
from core_flax.config import RunConfig
from core_flax.optim import make_optimizer
from core_flax.params import ParamRule, leaves, path_of
from core_flax.schedule import make_schedule
from core_flax.state import TrainState
from core_flax.step import Metrics, make_train_step
from core_flax.task import Task
from core_flax.types import Batch


@dataclass(frozen=True)
class Program:
    """The compiled parts of a run, and where its arrays lie.

    Attributes:
      mesh: the devices.
      init: key -> initial state, placed.
      step: (state, batch) -> (state, metrics); the state passed in is given up.
      abstract_state: shapes, types and placements of the state.
    """

    mesh: Mesh
    init: Callable[[Any], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    abstract_state: TrainState


def make_program(task: Task, config: RunConfig, devices: list[Any] | None = None) -> Program:
    """Everything that the mesh decides.

    Raises:
      UserError: settings that do not fit the devices or each other.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch_size(config.train.batch_size, config.train.num_microbatches, mesh)
    sharding.check_lengths(task.row_lengths, mesh)
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.train.num_steps)
    optimizer = make_optimizer(config.optimizer, schedule, task.param_rules)

    def init(key: Any) -> TrainState:
        # Of the row or so that parameters are made with nothing is told, and none of it is split.
        with kernels.telling(None), sharding.no_mesh():
            params = task.init(key)
        carry = task.carry() if task.carry else None
        ema = None if config.train.ema_decay is None else params
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry, ema)

    shapes = jax.eval_shape(init, jax.random.key(0))
    params = sharding.param_shardings(shapes.params, task.param_rules, mesh, task.axis_fields)
    of_optimizer = None
    if config.mesh.zero1:
        wide = sharding.OPTIMIZER_PLACEMENT
        of_optimizer = sharding.param_shardings(shapes.params, task.param_rules, mesh, task.axis_fields, wide)
    placed = sharding.state_shardings(shapes, params, mesh, of_optimizer)

    def step(state: TrainState, batch: Batch, seed: Any) -> tuple[TrainState, Metrics]:
        train = config.train
        return make_train_step(task, optimizer, schedule, seed, train.num_microbatches, train.ema_decay)(state, batch)

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)))
    return Program(
        mesh=mesh,
        init=jax.jit(init, out_shardings=placed),
        step=_Seeded(jitted, np.int32(config.seed)),
        abstract_state=jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed),
    )


class _Seeded:
    """A jitted function of which the seed is the last argument: runs that differ in it alone share what is compiled.

    It is called, and its stages taken, without the seed.
    """

    def __init__(self, stage: Any, seed: np.int32) -> None:
        self._stage, self._seed = stage, seed

    def __call__(self, *args: Any) -> Any:
        return self._stage(*args, self._seed)

    def trace(self, *args: Any) -> Any:
        return self._stage.trace(*args, self._seed)

    def lower(self, *args: Any) -> "_Seeded":
        return _Seeded(self._stage.lower(*args, self._seed), self._seed)

    def compile(self, *options: Any) -> "_Seeded":
        return _Seeded(self._stage.compile(*options), self._seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


def check_settings(config: RunConfig, rules: tuple[ParamRule, ...]) -> None:
    """Raises UserError if settings do not fit each other or the devices: before any data is read or written."""
    sharding.check_batch_size(config.train.batch_size, config.train.num_microbatches, sharding.make_mesh(config.mesh))
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.train.num_steps)
    make_optimizer(config.optimizer, schedule, rules)


def first_state(task: Task, program: Program, seed: int) -> TrainState:
    """What ``program.init`` draws, and the task's own parameters where it has some."""
    state = program.init(jax.random.key(seed))

    def place(keys: tuple[Any, ...], drawn: Any) -> Any:
        given = task.initial.get(path_of(keys))
        if given is None:
            return drawn
        assert given.shape == drawn.shape, f"{path_of(keys)}: {given.shape} is given, {drawn.shape} is wanted"
        return jax.make_array_from_callback(drawn.shape, drawn.sharding, lambda index: given[index].astype(drawn.dtype))

    unknown = set(task.initial) - {path for path, _ in leaves(state.params)}
    assert not unknown, f"no such parameters: {sorted(unknown)}"
    params = jax.tree_util.tree_map_with_path(place, state.params)
    # A copy: the step gives up each array of the state, and none can be given up twice.
    return dataclasses.replace(state, params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))
