"""Placement: logical axes -> mesh axes. The only file that speaks of PartitionSpec.

Parameters are placed by the family's table (params.ParamRule), activations by ``constrain``; both name logical axes,
and the table below says over which axes of the mesh each is split. Modules thus carry no placement and work unchanged
in a program without a mesh, or with a mesh of other axes.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from core_flax.config import MeshConfig
from core_flax.params import ParamRule, leaves, map_rules, path_of
from core_flax.state import TrainState
from core_flax.types import Array, Params, RowNumbers, UserError

MESH_AXES = ("dcn_data", "dcn_fsdp", "data", "fsdp", "tensor", "sequence")
"""Those over which least is moved first: dcn_* alone cross the slow network between slices."""

PLACEMENT: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": ("dcn_data", "dcn_fsdp", "data", "fsdp"),
    "length": (),
    "sequence": ("sequence",),
    "width": (),
    # parameters (and the activations that are their outputs)
    "layer": (),
    "embed": ("dcn_fsdp", "fsdp"),
    "heads": ("tensor", "sequence"),
    "kv_heads": ("tensor", "sequence"),
    "head_width": (),
    "mlp": ("tensor", "sequence"),
    "vocab": ("tensor", "sequence", "dcn_fsdp", "fsdp"),
    "vocab_logits": ("tensor", "sequence"),
    "vocab_bias": (),
    "table_width": (),
    "small": (),
}
"""Logical axis -> axes of the mesh. "length" is that of tokens within a sublayer, where heads or features are split;
"sequence" the same between sublayers (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2)."""

OPTIMIZER_PLACEMENT: Mapping[str, tuple[str, ...]] = PLACEMENT | {
    name: (*PLACEMENT[name], "data") for name in ("embed", "vocab")
}
"""The same for the optimizer's state with ``--mesh.zero1``: over data too, where parameters are whole. Not over
dcn_data: what is updated would have to be gathered across the slow network."""

INSTEAD: Mapping[str, str] = {"vocab": "table_width"}
"""Where the size of the first does not divide, the array's dim of the second name is split over the same axes.

Published vocabularies (30522, 50257) divide by hardly anything, widths do. The first choice is the vocabulary, since
then each device looks up and scores its own part; by the width, tables are gathered before use (``gather_table``).
"""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh with the axes MESH_AXES over all devices.

    Raises:
      UserError: the axes do not multiply to the number of devices, or dcn_* not to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    if sizes["data"] == -1:
        sizes["data"] = max(1, len(devices) // -math.prod(sizes.values()))
    if math.prod(sizes.values()) != len(devices):
        shown = {name: size for name, size in sizes.items() if size > 1 or name in ("data", "fsdp", "tensor")}
        shape = " x ".join(f"{name}={size}" for name, size in shown.items())
        raise UserError(
            f"mesh {shape} has {math.prod(sizes.values())} places for {len(devices)} devices; "
            "choose --mesh.data, --mesh.fsdp and --mesh.tensor so that their product is the number of devices"
        )
    # Auto: shardings of intermediate values are XLA's to choose (jax.make_mesh defaults to Explicit axes).
    return Mesh(_arranged(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def flat_mesh(devices: list[Any]) -> Mesh:
    """All of them along "data" as they come, whatever network lies between: for what is small."""
    shape = [len(devices) if name == "data" else 1 for name in MESH_AXES]
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(devices: list[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """The devices in the mesh's shape: neighbours along its axes are neighbours in the torus, where there is one."""
    slow = {name: size for name, size in sizes.items() if name.startswith("dcn_")}
    across = math.prod(slow.values())
    by_host = devices[0].platform != "tpu"
    parts = len({device.process_index if by_host else getattr(device, "slice_index", 0) for device in devices})
    # Hosts of GPUs need not be told apart: in order of the devices, the axes that move most stay within one.
    if across == 1 and (by_host or parts == 1):
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    if across != parts:
        asked = " x ".join(f"--mesh.{name.replace('_', '-')} {size}" for name, size in slow.items())
        raise UserError(
            f"{asked}: the devices are {parts} {'host' if by_host else 'slice'}{'s' * (parts > 1)}; "
            "choose these two, which cross the slow network, so that their product is that number"
        )
    return mesh_utils.create_hybrid_device_mesh(
        [1 if name in slow else size for name, size in sizes.items()],
        [size if name in slow else 1 for name, size in sizes.items()],
        devices,
        process_is_granule=by_host,
        allow_split_physical_axes=True,
    )


def spec(names: tuple[str, ...], placement: Mapping[str, tuple[str, ...]] = PLACEMENT) -> PartitionSpec:
    """The placement of an array whose dims have these logical axes.

    Raises:
      ValueError: an unknown logical axis, or two dims over the same axis of the mesh.
    """
    unknown = [name for name in names if name not in PLACEMENT]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; sharding.PLACEMENT knows {', '.join(PLACEMENT)}")
    used = [axis for name in names for axis in placement[name]]
    if len(used) != len(set(used)):
        raise ValueError(f"two dims of one array over the same mesh axis: {names} -> {used}")
    return PartitionSpec(*(placement[name] or None for name in names))


def constrain(x: Array, *names: str) -> Array:
    """Ask XLA to place an activation by its logical axes; does nothing without a mesh in context (jax.set_mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return x
    if "sequence" in names:
        length = x.shape[names.index("sequence")]
        if length == 1:  # a step of decoding
            names = tuple("length" if name == "sequence" else name for name in names)
        else:
            check_divides("the length of rows", length, "sequence", mesh)
    return jax.lax.with_sharding_constraint(x, spec(names))


def no_mesh() -> contextlib.AbstractContextManager[Any]:
    """A context in which activations are placed nowhere: of what is not a batch, and too small to be split."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def check_divides(
    what: str, size: int, name: str, mesh: Any, placement: Mapping[str, tuple[str, ...]] = PLACEMENT
) -> None:
    """Raises UserError unless the mesh divides a logical axis of this size; ``what`` is the setting that it is."""
    ways = _ways(name, mesh, placement)
    if size % ways:
        used = [axis for axis in placement[name] if mesh.shape[axis] > 1]
        axes = " x ".join(f"--mesh.{axis.replace('_', '-')} {mesh.shape[axis]}" for axis in used)
        raise UserError(
            f"{what} = {size} cannot be split {ways} ways ({axes}): "
            f"choose a multiple of {ways} ({-(-size // ways) * ways} is the next) or another mesh"
        )


def ways(name: str) -> int:
    """Among how many devices of the mesh in context a logical axis is divided; 1 without our mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names) else _ways(name, mesh)


def is_split() -> bool:
    """Whether the mesh in context has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def on_each_device(
    function: Callable[..., Array], inputs: tuple[tuple[str, ...], ...], output: tuple[str, ...]
) -> Callable[..., Array]:
    """A function of each device's part of arrays, for what XLA cannot divide by itself, such as kernels.

    Args:
      function: of arrays, to one array; without our mesh in context it is called as it is.
      inputs: logical axes of each of its arguments; they must divide.
      output: those of its result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return function
    return jax.shard_map(function, in_specs=tuple(map(spec, inputs)), out_specs=spec(output), check_vma=False)


def gather_table(table_VD: Array, rows: str) -> Array:
    """An embedding table whole in its width, which may be split where it is kept (``INSTEAD``), before it is used.

    Said here, since XLA would rather look up parts of rows and then move all rows to other devices ("involuntary full
    rematerialisation"). Does nothing without our mesh, or where the entries are split.

    Args:
      table_VD: the table; gradients are added up in its type, so that to look up is float32.
      rows: logical axis of the entries where it is used: "small" to look up, "vocab_logits" to score.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return table_VD
    ways = _ways("vocab", mesh)
    return table_VD if ways > 1 and table_VD.shape[0] % ways == 0 else _gathered(table_VD, rows)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(table_VD: Array, rows: str) -> Array:
    # By way of the whole, or XLA would go there with a warning: an axis cannot move from one dim to the other.
    return constrain(constrain(table_VD, "small", "table_width"), rows, "table_width")


def _gathered_forward(table_VD: Array, rows: str) -> tuple[Array, None]:
    return _gathered(table_VD, rows), None


def _gathered_backward(rows: str, nothing: None, grad_VD: Array) -> tuple[Array]:
    # As it was used: the split of the table, or with ZeRO-1 of its moments, left to spread, would reach through the
    # hidden states into the layers, whose products then gather them all, or gather the ids of a look-up.
    return (constrain(grad_VD, rows, "table_width"),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _ways(name: str, mesh: Any, placement: Mapping[str, tuple[str, ...]] = PLACEMENT) -> int:
    """Among how many devices a logical axis is divided."""
    return math.prod(mesh.shape[axis] for axis in placement[name])


def _placed(
    shape: tuple[int, ...], names: tuple[str, ...], mesh: Mesh, placement: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """The names by which an array of this shape is placed: those of its line, or others as ``INSTEAD`` says."""
    names_of = dict(zip(names, shape, strict=False))
    for first, second in INSTEAD.items():
        if first in names_of and second in names_of and names_of[first] % _ways(first, mesh, placement):
            swapped = {first: second, second: first}
            names = tuple(swapped.get(name, name) for name in names)
    return names


def param_shardings(
    params: Params,
    rules: tuple[ParamRule, ...],
    mesh: Mesh,
    axis_fields: Mapping[str, str] | None = None,
    placement: Mapping[str, tuple[str, ...]] = PLACEMENT,
) -> Any:
    """The NamedSharding of every parameter.

    Args:
      params: arrays or shapes.
      rules: the family's table; every parameter must match exactly one line.
      mesh: from ``make_mesh``.
      axis_fields: logical axis -> config field, for the message about a size that does not divide.
      placement: logical axis -> mesh axes; ``OPTIMIZER_PLACEMENT`` for what the optimizer keeps of each parameter.

    Raises:
      UserError: a dim that its mesh axes do not divide.
    """
    fields = axis_fields or {}

    def place(path: str, leaf: Array, rule: ParamRule) -> NamedSharding:
        spec(rule.names, placement)  # refuses a line that cannot be
        placed = _placed(leaf.shape, rule.names, mesh, placement)
        for size, name, own in zip(leaf.shape, placed, rule.names, strict=True):
            if size % _ways(name, mesh, placement):
                # Of a table that can be split by neither of its dims, the vocabulary is the one that is easily changed.
                size = leaf.shape[rule.names.index(name)] if own != name else size
                check_divides(fields.get(name, path), size, name, mesh, placement)
        return NamedSharding(mesh, spec(placed, placement))

    return map_rules(place, params, rules)


def state_shardings(
    abstract_state: TrainState, params_shardings: Any, mesh: Mesh, optimizer_shardings: Any = None
) -> Any:
    """Shardings for a whole train state: optimizer arrays that mirror a parameter are placed like it.

    Or as ``optimizer_shardings`` says, where it is given. An array of the state belongs to the parameter whose path
    ends its own path and whose shape it has; what batches hand to each other (state.carry) lies with their rows;
    whatever else there is (counters, factored moments) is replicated.
    """
    shapes = {path: leaf.shape for path, leaf in leaves(abstract_state.params)}
    by_path = dict(leaves(params_shardings))
    of_optimizer = by_path if optimizer_shardings is None else dict(leaves(optimizer_shardings))

    def place(keys: tuple[Any, ...], leaf: Array) -> NamedSharding:
        path = path_of(keys)
        if path.startswith("carry/"):
            return batch_sharding(mesh)
        for name, sharding in (of_optimizer if path.startswith("opt_state/") else by_path).items():
            if f"/{path}".endswith(f"/{name}") and leaf.shape == shapes[name]:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every array of a batch is placed: its first dim over data and fsdp."""
    return NamedSharding(mesh, spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def ways_of_batch(mesh: Mesh) -> int:
    """Among how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in PLACEMENT["batch"])


def check_batch_size(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Raises UserError unless every microbatch divides over the devices that share it."""
    ways = ways_of_batch(mesh)
    if num_microbatches < 1 or batch_size % num_microbatches or (batch_size // num_microbatches) % ways:
        step = ways * max(1, num_microbatches)
        raise UserError(
            f"--train.batch-size {batch_size} does not divide by {num_microbatches} microbatches x {ways} devices: "
            f"choose a multiple of {step}, such as {max(step, round(batch_size / step) * step)}"
            f"{_or_hosts(batch_size, max(1, num_microbatches), mesh)}"
        )


def check_lengths(row_lengths: Mapping[str, int], mesh: Mesh) -> None:
    """Raises UserError unless rows can be split along their length as often as the mesh wants it."""
    ways = _ways("sequence", mesh)
    if ways > 1 and not row_lengths:
        raise UserError(f"--mesh.sequence {ways}: this model reads along the length; take --mesh.tensor {ways} instead")
    for option, length in row_lengths.items():
        check_divides(option, length, "sequence", mesh)


def _or_hosts(batch_size: int, num_microbatches: int, mesh: Mesh) -> str:
    """ ", or 4 hosts instead of 3": the nearest number of hosts, each with as many devices, that does divide."""
    hosts = len({device.process_index for device in mesh.devices.flat})
    each = ways_of_batch(mesh) // hosts
    if hosts == 1 or each * hosts != ways_of_batch(mesh):
        return ""
    fitting = [count for count in range(1, 2 * hosts) if batch_size % (num_microbatches * each * count) == 0]
    if not fitting:
        return ""
    near = min(fitting, key=lambda count: abs(count - hosts))
    return f", or {near} host{'s' * (near > 1)} instead of {hosts}"


def host_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of the global batch that this host's devices need, ascending.

    They are seldom neighbours: the mesh follows the torus, of which a host has a square.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def same_share(rows: RowNumbers, batch_size: int, num_rows: int) -> np.ndarray:
    """Which of ``num_rows`` rows the host has that has ``rows`` of ``batch_size``, both divided over the same devices.

    For batches that have another number of rows than ``--train.batch-size`` says, such as packed ones.
    """
    # A device has neighbours, and as large a part of either batch: the row that begins as far into the batch tells.
    return np.flatnonzero(np.isin(np.arange(num_rows) * batch_size // num_rows, rows))


def place_batch(batch: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch on the devices from this host's rows of it, in the order of ``host_rows``."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array on every host, wherever its parts lie."""
    # What this host has by itself, it may be alone in asking for.
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def table(params: Params, rules: tuple[ParamRule, ...]) -> list[tuple[str, tuple[int, ...], str]]:
    """(path, shape, placement) of every parameter, to print or to pin in a golden file."""
    placements = map_rules(lambda path, leaf, rule: str(spec(rule.names)), params, rules)
    return [(path, tuple(leaf.shape), str(dict(leaves(placements))[path])) for path, leaf in leaves(params)]
