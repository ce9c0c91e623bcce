"""``flax-launch plan``: the training step, compiled by the real compiler for devices that are not here."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from core_flax import hardware, sharding
from core_flax.config import RunConfig
from core_flax.program import Program, make_program
from core_flax.task import Cost, Task
from launch.chips import Topology
from launch.hlo import Collective, Work, read_work

_MOVED = {"all-reduce": 2.0}
"""How often the bytes of a collective pass a ring of its devices; once if it is not named."""


class OutOfMemoryError(Exception):
    """The compiler found that the step does not fit; the text is what it said, shortened.

    Attributes:
      needed: bytes that it would take; None if it was not told.
      compiled: whether it took a compilation to know; False: what the step is given is too large by itself.
    """

    def __init__(self, text: str, needed: float | None, compiled: bool = True) -> None:
        super().__init__(text)
        self.needed, self.compiled = needed, compiled


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs.

    Attributes:
      params: parameters.
      opt_state: state of the optimizer, the moving average of parameters, and what a model carries from row to row.
      batch: the batch.
      temporaries: activations, gradients and all else that lives within a step.
      program: the program itself, and what else the compiler adds to the arguments: padding of their layouts.
      capacity: what the device has; None: unknown.
    """

    params: float
    opt_state: float
    batch: float
    temporaries: float
    program: float
    capacity: float | None

    @property
    def total(self) -> float:
        """All of it."""
        return self.params + self.opt_state + self.batch + self.temporaries + self.program


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least; None where the device's figures are unknown.

    Attributes:
      compute: its matrix products at the device's peak.
      memory: its memory traffic at the memory's bandwidth.
      network: its collectives between chips of a slice.
      slow_network: those between slices.
      step: every kernel at its own bound, one after another; collectives beside them, if they take no longer.
    """

    compute: float | None
    memory: float | None
    network: float | None
    slow_network: float | None
    step: float | None

    @property
    def bound(self) -> str | None:
        """What the step is bound by."""
        if self.step is None or self.compute is None:
            return None
        if self.slow_network is not None and self.slow_network >= self.step:
            return "the network between slices"
        if self.network is not None and self.network >= self.step:
            return "the network between chips"
        return "matrix products" if self.compute >= 0.5 * self.step else "memory bandwidth"


@dataclass(frozen=True)
class Plan:
    """All that is known of a step before it is run."""

    topology: str
    device_kind: str
    mesh: Mapping[str, int]
    batch_size: int
    num_microbatches: int
    cost: Cost
    memory: Memory
    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    roofline: Roofline

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens, padding included, of all devices."""
        return self.cost.tokens / self.roofline.step if self.roofline.step else None

    @property
    def mfu(self) -> float | None:
        """Share of the devices' peak that the model's own operations are (task.Cost)."""
        peak = hardware.peak_flops(self.device_kind)
        if not self.roofline.step or not peak or not self.cost.flops:
            return None
        return self.cost.flops / (self.roofline.step * peak * math.prod(self.mesh.values()))

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None: unknown."""
        return None if self.memory.capacity is None else self.memory.total <= self.memory.capacity


def make_plan(task: Task, config: RunConfig, batch: Mapping[str, Any], topology: Topology) -> Plan:
    """Compiles the step and reads what it does.

    Args:
      task: without data; only its model is used.
      config: the settings, with the mesh.
      batch: shapes of the global batch, as arrays or jax.ShapeDtypeStruct.
      topology: for what to compile.

    Raises:
      UserError: settings that do not fit the devices or each other.
      OutOfMemoryError: the memory does not suffice, as the compiler says, or for the state alone.
    """
    program = make_program(task, config, list(topology.devices))
    state = _per_device(program.abstract_state)
    if topology.chip.memory is not None and state > topology.chip.memory:
        raise OutOfMemoryError("parameters and optimizer state", state, compiled=False)
    rows = sharding.batch_sharding(program.mesh)
    placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch.items()}
    compiled = _compile(program, placed)
    work = read_work(compiled.as_text())
    return Plan(
        topology=topology.name,
        device_kind=topology.devices[0].device_kind,
        mesh=dict(program.mesh.shape),
        batch_size=config.train.batch_size,
        num_microbatches=config.train.num_microbatches,
        cost=task.cost(config.train.num_steps - 1),
        memory=_memory(compiled.memory_analysis(), program, placed, topology),
        flops=work.flops,
        bytes=work.bytes,
        collectives=_grouped(work.collectives),
        roofline=_roofline(work, topology),
    )


def _compile(program: Program, batch: Mapping[str, Any]) -> Any:
    with jax.set_mesh(program.mesh):
        step: Any = program.step  # what jax.jit returns
        lowered = step.lower(program.abstract_state, batch)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if "RESOURCE_EXHAUSTED" not in text and "memory" not in text:
                raise
            raise OutOfMemoryError(" ".join(text.split())[:300], needed_bytes(text)) from error


def needed_bytes(text: str) -> float | None:
    """How much the step would take, as the compiler says when it does not fit; None if it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of|required for HLO temporaries \(([\d.]+)([KMGT])\)", text)
    if not found:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * 1024 ** " KMGT".index(unit)


def _per_device(tree: Any) -> float:
    """Bytes of a tree's arrays on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _memory(analysis: Any, program: Program, batch: Mapping[str, Any], topology: Topology) -> Memory:
    params = _per_device(program.abstract_state.params)
    opt_state = _per_device(program.abstract_state) - params
    inputs = _per_device(dict(batch))
    extra = analysis.argument_size_in_bytes - params - opt_state - inputs
    # Outputs that take the place of arguments given up are not new.
    temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        params=params,
        opt_state=opt_state,
        batch=inputs,
        temporaries=temporaries,
        program=max(0.0, extra) + analysis.generated_code_size_in_bytes,
        capacity=topology.chip.memory,
    )


def _grouped(collectives: list[Collective]) -> tuple[Collective, ...]:
    """Those of one kind, group and size as one, the heaviest first."""
    counts: dict[Collective, float] = {}
    for each in collectives:
        key = dataclasses.replace(each, count=0)
        counts[key] = counts.get(key, 0) + each.count
    grouped = [dataclasses.replace(key, count=count) for key, count in counts.items()]
    return tuple(sorted(grouped, key=lambda each: -each.bytes * each.count))


def collective_seconds(each: Collective, topology: Topology) -> float | None:
    """What one collective takes, bound by bandwidth; None where that is unknown."""
    bandwidth = topology.chip.slow_bandwidth if each.slow else topology.bandwidth(each.group)
    if bandwidth is None:
        return None
    return _MOVED.get(each.kind, 1.0) * each.bytes * (each.group - 1) / each.group / bandwidth


def _roofline(work: Work, topology: Topology) -> Roofline:
    peak = hardware.peak_flops(topology.devices[0].device_kind)
    bandwidth = topology.chip.memory_bandwidth
    times = [(each, collective_seconds(each, topology)) for each in work.collectives]
    known = all(seconds is not None for _, seconds in times)
    fast, slow = (
        sum(each.count * seconds for each, seconds in times if seconds is not None and each.slow == slow)
        for slow in (False, True)
    )
    if not peak or not bandwidth:
        return Roofline(work.flops / peak if peak else None, None, None, None, None)
    kernels = sum(times * max(flops / peak, moved / bandwidth) for flops, moved, times in work.kernels)
    return Roofline(
        compute=work.flops / peak,
        memory=work.bytes / bandwidth,
        network=fast if known else None,
        slow_network=slow if known else None,
        step=max(kernels, fast, slow) if known else None,
    )
