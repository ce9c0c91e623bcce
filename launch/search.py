"""``flax-launch plan``: one plan, or the best of many."""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Collection, Iterator
from typing import Any

from core_flax import kernels
from core_flax.config import check_range
from core_flax.types import UserError
from launch import chips, report
from launch.families import PRESETS, settings
from launch.plan import OutOfMemoryError, Plan, make_plan


def plan(name: str, command: Any, given: Collection[str] = ()) -> None:
    """Prints the plan of a preset, or the best few of a search; ``given`` as in families.settings.

    Raises:
      UserError: it does not fit (with what would help), or settings do not fit each other or the devices.
    """
    check_range("", command, "compilations", least=1)
    topology = chips.find(command.topology)
    config = settings(name, command, topology.is_cpu, given)
    family = PRESETS[name]

    def make(config: Any) -> Plan:
        return make_plan(family.task(config), config, family.batch(config, config.train.num_steps - 1), topology)

    told: list[str] = []
    with kernels.telling(told.append):
        if command.search:
            _search(make, config, topology, command)
        else:
            _one(make, config, topology, command)
    # Beside the JSON, not in it.
    if command.explain_kernels and told:
        print("\n".join(told), file=sys.stderr if command.json else sys.stdout)
    elif any(kernels.NO_DROPOUT in line for line in told):
        _tell(
            "attention is computed in the plain way and waits for the memory: no kernel knows its dropout; see "
            "--model.attention-dropout 0"
        )


def _one(make: Any, config: Any, topology: chips.Topology, command: Any) -> None:
    try:
        found = make(config)
    except OutOfMemoryError as error:
        raise UserError(_too_large(config, topology, error)) from error
    print(json.dumps(report.as_json(found)) if command.json else "\n".join(report.lines(found, topology)))
    if found.fits is False:
        raise UserError(_too_large(config, topology, OutOfMemoryError("", found.memory.total)))


def _too_large(config: Any, topology: chips.Topology, error: OutOfMemoryError) -> str:
    capacity = topology.chip.memory
    size = "more than there is" if error.needed is None else f"{error.needed / chips.GIB:.1f} GiB"
    what = "the step needs" if error.compiled else "parameters and optimizer state alone need"
    has = "" if capacity is None else f", which has {capacity / chips.GIB:.0f}"
    return f"out of memory: {what} {size} on a device{has}; try {', '.join(_remedies(config, topology, error))}"


def _remedies(config: Any, topology: chips.Topology, error: OutOfMemoryError) -> list[str]:
    """What would help; fewer rows at a time or computing again do nothing for a state that is too large by itself."""
    fsdp, slice_size = config.mesh.fsdp, len(topology.devices) // topology.num_slices
    if not error.compiled:
        assert error.needed and topology.chip.memory
        if error.needed * fsdp / slice_size > topology.chip.memory:
            return ["a larger topology"]
        # Half of the memory at most, so that there is room for a step.
        ways = fsdp * 2 ** math.ceil(math.log2(2 * error.needed / topology.chip.memory))
        return [f"--mesh.fsdp {min(slice_size, ways)}", "or a larger topology"]
    return [
        *([f"--mesh.fsdp {min(slice_size, max(2, 4 * fsdp))}"] if fsdp < slice_size else []),
        f"--train.num-microbatches {2 * config.train.num_microbatches}",
        *(["--model.remat block"] if _has_remat(config) and config.model.remat != "block" else []),
        # On accelerators, kernels that leave the scores on the chip know no dropout of probabilities.
        *(["--model.attention-dropout 0"] if not topology.is_cpu and _has_attention_dropout(config) else []),
        "a smaller --batch",
        "or --search",
    ]


def candidates(config: Any, num_devices: int) -> Iterator[Any]:
    """Settings to try on the devices of a slice.

    All splits of the parameters come first, with nothing else changed; then those with one change (another remat
    policy, two microbatches, a tensor axis), then with two, so that a search that is cut short has seen some of each.
    """
    fsdps = [ways for ways in _powers(num_devices) if ways in (1, 4, 16, 64, 256) or ways == num_devices]
    remats = [*dict.fromkeys((config.model.remat, "none", "elementwise", "block"))] if _has_remat(config) else [None]
    changes = itertools.product(range(len(remats)), range(4), range(4))
    for remat, microbatches, tensor in sorted(changes, key=sum):
        for fsdp in fsdps:
            if fsdp * 2**tensor <= num_devices:
                yield dataclasses.replace(
                    config,
                    mesh=dataclasses.replace(config.mesh, data=-1, fsdp=fsdp, tensor=2**tensor, sequence=1),
                    train=dataclasses.replace(config.train, num_microbatches=2**microbatches),
                    model=dataclasses.replace(config.model, remat=remats[remat]) if remats[remat] else config.model,
                )


def _has_attention_dropout(config: Any) -> bool:
    return getattr(config.model, "attention_dropout", 0.0) > 0


def _has_remat(config: Any) -> bool:
    return hasattr(config.model, "remat")  # recurrent models keep what they keep


def _powers(number: int) -> list[int]:
    return [2**power for power in range(number.bit_length()) if number % 2**power == 0]


def _search(make: Any, config: Any, topology: chips.Topology, command: Any) -> None:
    plans: list[tuple[str, Plan]] = []
    tried = 0
    if topology.num_slices > 1 and config.mesh.dcn_fsdp == 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, dcn_data=topology.num_slices))
    for candidate in candidates(config, len(topology.devices) // topology.num_slices):
        if tried == command.compilations:
            break
        remat = candidate.model.remat if _has_remat(candidate) else "-"
        try:
            found = make(candidate)
        except UserError:
            continue  # such a mesh cannot be
        except OutOfMemoryError as error:
            tried += error.compiled
            if error.compiled:
                _tell(f"{tried}/{command.compilations}: {_settings(candidate, remat)}: does not fit")
            continue
        tried += 1
        row = report.table([(remat, found)])[1]
        _tell(f"{tried}/{command.compilations}: {row}{' does not fit' * (found.fits is False)}")
        if found.fits is not False:
            plans.append((remat, found))
    if not plans:
        raise UserError(
            f"none of {tried} settings tried fits; try a larger topology, a smaller --batch or more --compilations"
        )
    best = sorted(plans, key=lambda pair: pair[1].roofline.step or pair[1].memory.total)[:5]
    if command.json:
        print(json.dumps([report.as_json(found) | {"remat": remat} for remat, found in best]))
    else:
        print("\n".join([f"{tried} tried, {len(plans)} fit", *report.table(best)]))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _settings(config: Any, remat: str) -> str:
    mesh, train = config.mesh, config.train
    return f"fsdp={mesh.fsdp} x tensor={mesh.tensor}, {train.num_microbatches} microbatches, remat {remat}"
