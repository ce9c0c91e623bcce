"""A plan, for people and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from launch.chips import GIB, Topology
from launch.plan import Plan, collective_seconds


def lines(plan: Plan, topology: Topology) -> list[str]:
    """The plan as text."""
    mesh = _mesh(plan)
    devices = math.prod(plan.mesh.values())
    found = [
        f"{plan.topology}: {devices} x {plan.device_kind}, mesh {mesh}",
        f"batch of {plan.batch_size:,} in {plan.num_microbatches} microbatches, {plan.cost.tokens:,} tokens a step",
        "",
        *_memory(plan),
        "",
        "work per step and device",
        f"  {'operations':<28}{plan.flops / 1e12:>10.3f} TFLOP{_ms(plan.roofline.compute)}",
        f"  {'memory traffic':<28}{plan.bytes / 1e9:>10.3f} GB   {_ms(plan.roofline.memory)}",
    ]
    for each in plan.collectives:
        what = f"{each.kind} x {each.count:g} over {each.group}{' slices' * each.slow}"
        seconds = collective_seconds(each, topology)
        total = None if seconds is None else seconds * each.count
        found.append(f"  {what:<28}{each.bytes * each.count / 1e9:>10.3f} GB   {_ms(total)}")
    return [*found, "", *_estimate(plan)]


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1 or axis == "data")


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    parts = {
        "parameters": memory.params,
        "optimizer state": memory.opt_state,
        "batch": memory.batch,
        "activations, temporaries": memory.temporaries,
        "program, padding": memory.program,
        "total": memory.total,
    }
    rows = [f"  {name:<28}{size / GIB:>10.3f} GiB" for name, size in parts.items()]
    if memory.capacity:
        rows[-1] += f"  of {memory.capacity / GIB:.1f} ({memory.total / memory.capacity:.0%})"
    return ["memory per device", *rows]


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:>12.3f} ms"


def _estimate(plan: Plan) -> list[str]:
    step, rate, mfu = plan.roofline.step, plan.tokens_per_second, plan.mfu
    if step is None or rate is None:
        return ["no estimate of time: bandwidths or peak of this device are not known"]
    share = "" if mfu is None else f", MFU {mfu:.1%}"
    return [
        f"estimate (roofline): {1000 * step:.2f} ms a step, {rate:,.0f} tokens/s{share}; bound by {plan.roofline.bound}"
    ]


def table(plans: Sequence[tuple[str, Plan]]) -> list[str]:
    """The best of a search, a line each."""
    head = f"{'mesh':<34}{'microbatches':>13}{'remat':>13}{'GiB':>8}{'ms':>10}{'MFU':>7}"
    rows = []
    for remat, plan in plans:
        step = "-" if plan.roofline.step is None else f"{1000 * plan.roofline.step:.2f}"
        mfu = "-" if plan.mfu is None else f"{plan.mfu:.1%}"
        memory = plan.memory.total / GIB
        rows.append(f"{_mesh(plan):<34}{plan.num_microbatches:>13}{remat:>13}{memory:>8.2f}{step:>10}{mfu:>7}")
    return [head, *rows]


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures, in bytes, operations and seconds, of one device unless named otherwise."""
    derived = {"tokens_per_second": plan.tokens_per_second, "mfu": plan.mfu, "fits": plan.fits}
    memory = dataclasses.asdict(plan.memory) | {"total": plan.memory.total}
    roofline = dataclasses.asdict(plan.roofline) | {"bound": plan.roofline.bound}
    return dataclasses.asdict(plan) | derived | {"memory": memory, "roofline": roofline, "mesh": dict(plan.mesh)}
