"""What there is to plan for: chips, what each can do at best, and the shapes they come in."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from core_flax.types import UserError

GIB, GIGA = 2**30, 1e9


@dataclass(frozen=True)
class Chip:
    """What one device can do at best; None where it is not known.

    Attributes:
      memory: bytes.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second, one way, of one link to a neighbour in the torus.
      torus_dims: dims of the torus: a chip has two links for each.
      wraps_at: length of a dim of a slice from which on its ends are joined.
      slow_bandwidth: bytes a second, one way, of its share of the network between slices.
    """

    memory: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    torus_dims: int = 0
    wraps_at: int = 0
    slow_bandwidth: float | None = None


CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, 1228 * GIGA, 2400 / 8 / 6 * GIGA, torus_dims=3, wraps_at=4),
    "v5e": Chip(
        16 * GIB, 819 * GIGA, 1600 / 8 / 4 * GIGA, torus_dims=2, wraps_at=16, slow_bandwidth=6400 / 256 / 8 * GIGA
    ),
    "v5p": Chip(95 * GIB, 2765 * GIGA, 4800 / 8 / 6 * GIGA, torus_dims=3, wraps_at=4, slow_bandwidth=50 / 8 * GIGA),
    "v6e": Chip(
        32 * GIB, 1600 * GIGA, 3200 / 8 / 4 * GIGA, torus_dims=2, wraps_at=16, slow_bandwidth=25600 / 256 / 8 * GIGA
    ),
}
"""TPUs by version. Peak operations are in core_flax/hardware.py.

Sources: docs.cloud.google.com/tpu/docs/ + v4, v5e, v5p, v6e: HBM capacity and bandwidth, and "inter-chip interconnect
bandwidth" per chip in Gbit/s one way, here divided by 8 bits and by its links (two for each dim of the torus); "data
center network bandwidth" per pod of 256 chips (v5e, v6e), or per chip (v5p).
"""

GPUS: tuple[tuple[str, Chip], ...] = (
    (r"A100.*80GB", Chip(80 * GIGA, 2039 * GIGA)),
    (r"A100", Chip(40 * GIGA, 1555 * GIGA)),
    (r"H200", Chip(141 * GIGA, 4800 * GIGA)),
    (r"H100 PCIe", Chip(80 * GIGA, 2000 * GIGA)),
    (r"H100", Chip(80 * GIGA, 3350 * GIGA)),
)
"""NVIDIA's data sheets; pattern in ``jax.Device.device_kind``, the first that is found counts."""

_SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as it was asked for.
      devices: real ones, or those of a machine that is not here.
      chip: what one of them can do.
      shape: lengths of the torus, of one slice; () where there is none.
      num_slices: slices, which the slow network joins.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip
    shape: tuple[int, ...] = ()
    num_slices: int = 1

    @property
    def is_cpu(self) -> bool:
        """Whether it computes in float32 by default."""
        return self.devices[0].platform == "cpu"

    def bandwidth(self, group: int) -> float | None:
        """Bytes a second at which a device takes part in a ring over ``group`` devices of the torus.

        A ring along one dim uses its links both ways if its ends are joined; a group that is larger than a dim spans
        several dims and uses the links of each.
        """
        if not self.chip.link_bandwidth:
            return None
        spanned, length = 0, 1
        for size in sorted(self.shape, reverse=True):
            if length < group and size > 1:
                spanned, length = spanned + 1, length * size
        ways = 2 if max(self.shape) >= self.chip.wraps_at else 1
        return self.chip.link_bandwidth * ways * max(1, spanned)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """("cpu", (4,)), ("local", ()) or ("v5e", (16, 16)). Raises UserError that lists what there is."""
    kind, _, shape = name.partition(":")
    if (kind == "local" and not shape) or (kind == "cpu" and re.fullmatch(r"[1-9]\d*", shape)):
        return kind, (int(shape),) if shape else ()
    if shape in _SLICES.get(kind, ()):
        return kind, tuple(int(size) for size in shape.split("x"))
    tpus = "; ".join(f"{version}: {', '.join(shapes)}" for version, shapes in _SLICES.items())
    raise UserError(f"unknown topology {name!r}; there are cpu:N, local, and TPU slices as in v5e:16x16 ({tpus})")


def parse_slices(name: str) -> tuple[str, int]:
    """(what one slice is, how many) of v5e:16x16x2-slices, or of one alone."""
    several = re.fullmatch(r"(v.*:.+)x([1-9]\d*)-slices", name)
    return (several[1], int(several[2])) if several else (name, 1)


def prepare_environment(name: str) -> None:
    """What has to be set before jax is asked for devices. Raises UserError as parse_topology."""
    kind, shape = parse_topology(parse_slices(name)[0])
    if kind == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={shape[0]}"
    if kind != "local":
        jax.config.update("jax_platforms", "cpu")  # the accelerator that may be here is not asked
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing but the compiler is used: others may use it too
        }


def find(name: str) -> Topology:
    """The devices of a topology; ``prepare_environment`` comes first.

    Raises:
      UserError: there is no such topology, or the TPU's compiler is not installed.
    """
    one, slices = parse_slices(name)
    kind, shape = parse_topology(one)
    if kind == "cpu":
        return Topology(name, jax.devices("cpu")[: shape[0]], Chip())
    if kind == "local":
        devices = jax.devices()
        gpu = next((chip for pattern, chip in GPUS if re.search(pattern, devices[0].device_kind)), Chip())
        return Topology(f"{len(devices)} local devices", devices, gpu)
    if kind == "v4":
        raise UserError(
            f"{name} cannot be planned for: the TPU compiler takes the two cores of a v4 chip for two devices, which "
            "are one on a machine; plan for v5p, which has the same torus"
        )
    try:
        options = {"num_slices": slices} if slices > 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=one, **options)
    except Exception as error:  # whatever a plugin that is missing or too old may raise
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: the TPU compiler cannot be used ({said}); pip install flax-pretraining[tpu]"
        ) from error
    assert len(found.devices) == math.prod(shape) * slices, f"{name} has {len(found.devices)} devices"
    return Topology(name, found.devices, CHIPS[kind], shape, slices)
