"""What a compiled program does, read from its text: operations, memory traffic, collectives, loops counted as they run.

XLA's own cost analysis counts the body of a loop once, and a model is a loop over its layers.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TRANSFER = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}[^"]*",_xla_megascale_transfer_type="(\w+)"')
_SPLASH = re.compile(r'op_name="[^"]*splash_m[hq]a_(fwd|dq|dkv)')
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
_FREE |= {"iota", "domain", "send", "recv"}


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      type: its result's type, as written: "f32[4,8]{1,0}" or a tuple of such.
      inside: what stands in its parentheses.
      operands: names of what it reads.
      rest: what is written after the operands.
    """

    name: str
    opcode: str
    type: str
    inside: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


Computation = Mapping[str, Instruction]
"""Instructions by name, in order."""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and size, over the whole step.

    Attributes:
      kind: "all-reduce" etc.
      group: devices that take part in one.
      bytes: of one, on one device: the result, but the operand of a reduce-scatter.
      count: how often it runs.
      slow: whether it is what slices do among each other; then ``group`` is their number.
    """

    kind: str
    group: int
    bytes: float
    count: float
    slow: bool = False


@dataclass
class Work:
    """What one device does in a step.

    Attributes:
      flops: of matrix products and convolutions, whatever computes them again included.
      bytes: read from and written to its memory.
      kernels: (flops, bytes, how often) of every instruction that reads or writes memory.
    """

    flops: float = 0.0
    bytes: float = 0.0
    kernels: list[tuple[float, float, float]] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)


def read_work(text: str) -> Work:
    """What a step does on one device.

    Args:
      text: ``compiled.as_text()`` of a program that is divided over devices: its shapes are those of one device.
    """
    entry, computations = parse(text)
    work = Work()
    _visit(computations, entry, 1.0, work)
    return work


def parse(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """(name of the entry computation, computations by name)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, last = "", {}, ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _NAME.match(line):
            last = found[2]
            current[last] = _instruction(line[found.end() :], last, bool(found[1]))
        elif line.startswith("}}"):  # what a kernel says of itself has lines of its own
            current[last] = dataclasses.replace(current[last], rest=current[last].rest + line)
    assert entry, "no ENTRY computation: this is no program's text"
    return entry, computations


def _instruction(text: str, name: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    begin = text.index("(", end)
    stop = _closing(text, begin)
    inside = text[begin + 1 : stop]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, text[end:begin].strip(), text[:end], inside, operands, text[stop + 1 :], is_root)


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis that opens at ``begin`` closes."""
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise AssertionError(f"parentheses do not match: {text[:80]}")


def arrays(type_text: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(element type, shape, layout) of every array in a type."""
    found = _ARRAY.findall(type_text)
    return [(kind, tuple(int(size) for size in dims.split(",") if size), layout) for kind, dims, layout in found]


def num_bytes(type_text: str, *, in_memory_only: bool = False) -> float:
    """Bytes of a type's arrays; without those that a TPU keeps on the chip (memory space 1 and up) if asked so."""
    return sum(
        math.prod(shape) * _element_bytes(kind)
        for kind, shape, layout in arrays(type_text)
        if not (in_memory_only and re.search(r"S\([1-9]\d*\)", layout))
    )


def _element_bytes(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    bits = re.match(r"[a-z]+(\d+)", kind)
    return int(bits[1]) / 8 if bits else 0


def _visit(computations: Mapping[str, Computation], name: str, times: float, work: Work) -> None:
    """Adds what a computation does when it runs ``times`` times; not for one that is a fusion's inside."""
    computation = computations[name]
    seen: set[str] = set()  # a collective may begin, go on and end in several fusions, under one channel
    for each in computation.values():
        if each.opcode == "while":
            _visit(computations, _called(each)[0], times * _trip_count(computations, each), work)
        elif each.opcode in ("call", "conditional", "async-start"):
            inner = _called(each)
            for called in inner:
                _visit(computations, called, times / (len(inner) if each.opcode == "conditional" else 1), work)
        else:
            _add(computations, computation, each, times, work, seen)


def _add(
    computations: Mapping[str, Computation],
    home: Computation,
    each: Instruction,
    times: float,
    work: Work,
    seen: set[str],
) -> None:
    inside = _called(each) if each.opcode == "fusion" else []
    flops = _flops(home, each) + sum(_flops_inside(computations, called) for called in inside)
    for channel, collective in _collectives(computations, home, each, inside, ""):
        if channel not in seen and collective.group > 1:
            work.collectives.append(dataclasses.replace(collective, count=times))
        seen |= {channel} - {""}
    moved = 0.0
    if each.opcode == "copy-start":  # (to, from, context)
        moved = num_bytes(each.type, in_memory_only=True)
    elif each.opcode not in _FREE and not each.opcode.endswith(("-start", "-done", "-update")):
        moved = _traffic(computations, home, each, inside)
    work.flops += times * flops
    work.bytes += times * moved
    if (flops or moved) and each.opcode != "copy-start":  # which goes on beside what follows
        work.kernels.append((flops, moved, times))


def _called(each: Instruction) -> list[str]:
    branches = _BRANCHES.search(each.rest)
    listed = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    return [*_CALLS.findall(each.rest), *listed]


def _trip_count(computations: Mapping[str, Computation], loop: Instruction) -> int:
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    assert condition, f"a loop without a condition: {loop.name}"
    # A scan's condition compares its counter with the one constant there is.
    bounds = [each.inside for each in computations[condition[1]].values() if each.opcode == "constant"]
    return max((int(bound) for bound in bounds if bound.isdecimal()), default=1)


def _flops_inside(computations: Mapping[str, Computation], name: str) -> float:
    total = 0.0
    for each in computations[name].values():
        total += _flops(computations[name], each)
        total += sum(_flops_inside(computations, called) for called in _called(each) if each.opcode == "fusion")
    return total


def _flops(home: Computation, each: Instruction) -> float:
    if each.opcode == "custom-call":
        return _kernel_flops(home, each)
    if each.opcode not in ("dot", "convolution"):
        return 0.0
    (_, out, _), *_ = arrays(each.type)
    (_, left, _), *_ = arrays(home[each.operands[0]].type)
    if each.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
        dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
        return 2.0 * math.prod(out) * math.prod(left[dim] for dim in dims)
    (_, right, _), *_ = arrays(home[each.operands[1]].type)
    return _convolution_flops(left, right, out, each.rest)


def _kernel_flops(home: Computation, each: Instruction) -> float:
    """Of attention's kernel for TPUs (core_flax.kernels.splash), which is no text: what causality spares it is counted.

    Forward there are two products of L x M x K for each head; backward, of scores, probabilities, queries, keys and
    values, as many as it makes gradients, and the first two.
    """
    phase = _SPLASH.search(each.rest)
    if not phase:
        return 0.0
    read = [each for name in each.operands if name in home for each in arrays(home[name].type)]
    # Of a single row XLA drops the dim of the batch. Masks and numbers of sequences are integers.
    (kind, queries, _), (_, keys, _) = [each for each in read if len(each[1]) >= 3 and "f" in each[0]][:2]
    ends, rank = (queries[-2:], keys[-2:]), len(queries)
    # What it adds up in is among its results as well, of a block of one row in float32.
    made = [each for each in arrays(each.type) if each[1][-2:] in ends]
    heads = [shape for one, shape, _ in made if len(shape) > rank or (len(shape) == rank and one == kind)]
    products = 2 if phase[1] == "fwd" else 2 + len(heads)
    return 2.0 * products * math.prod(queries) * keys[-2]


def _convolution_flops(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], rest: str) -> float:
    """Multiplications with what is really there, neither padding nor the holes of a dilation, two for each.

    TPUs express batched matrix products as convolutions over padded, dilated windows.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels, f"a convolution without dim_labels: {rest[:80]}"
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    window = dict(re.findall(r"(\w+)=([\w_]+)", (re.search(r"window=\{([^}]*)\}", rest) or [""])[0][8:-1]))
    spatial = sorted(label for label in of_out if label.isdigit())

    def setting(name: str, place: int, default: str) -> str:
        return window[name].split("x")[place] if name in window else default

    pairs = 1
    for place, label in enumerate(spatial):
        size, kernel = left[of_left.index(label)], right[of_right.index(label)]
        stride, holes = int(setting("stride", place, "1")), int(setting("lhs_dilate", place, "1"))
        spread = int(setting("rhs_dilate", place, "1"))
        low = int(re.match(r"-?\d+", window["pad"].split("x")[place])[0]) if "pad" in window else 0  # type: ignore
        positions = np.arange(out[of_out.index(label)])[:, None] * stride + np.arange(kernel) * spread - low
        pairs *= int(np.sum((positions >= 0) & (positions <= (size - 1) * holes) & (positions % holes == 0)))
    groups = re.search(r"batch_group_count=(\d+)", rest)
    batch, outputs = left[of_left.index("b")], right[of_right.index("o")]
    return 2.0 * pairs * batch * outputs * right[of_right.index("i")] / (int(groups[1]) if groups else 1)


def _traffic(computations: Mapping[str, Computation], home: Computation, each: Instruction, inside: list[str]) -> float:
    """Bytes that an instruction reads and writes: where it takes or changes but a slice of something, the slice."""
    operands = [home[name] for name in each.operands if name in home]
    if each.opcode == "dynamic-slice":
        return 2 * num_bytes(each.type, in_memory_only=True)
    if each.opcode == "dynamic-update-slice":
        return 2 * num_bytes(operands[1].type, in_memory_only=True)
    if not inside:
        return num_bytes(each.type, in_memory_only=True) + sum(
            num_bytes(operand.type, in_memory_only=True) for operand in operands
        )
    body = computations[inside[0]]
    read = sum(_read_of(computations, body, place, operand) for place, operand in enumerate(operands))
    return read + _written(computations, body, each)


def _parameter(body: Computation, place: int) -> Instruction | None:
    found = (each for each in body.values() if each.opcode == "parameter" and int(each.inside) == place)
    return next(found, None)


def _users(computations: Mapping[str, Computation], body: Computation, name: str) -> Iterator[Instruction]:
    """What uses a value, seen through bitcasts and within fusions."""
    for each in body.values():
        if name not in each.operands:
            continue
        if each.opcode == "bitcast":
            yield from _users(computations, body, each.name)
        elif each.opcode == "fusion":
            inner = computations[_called(each)[0]]
            for place, operand in enumerate(each.operands):
                if operand == name and (parameter := _parameter(inner, place)):
                    yield from _users(computations, inner, parameter.name)
        else:
            yield each


def _read_of(computations: Mapping[str, Computation], body: Computation, place: int, operand: Instruction) -> float:
    whole, parameter = num_bytes(operand.type, in_memory_only=True), _parameter(body, place)
    if parameter is None or not whole:
        return whole
    # What is only handed on is not read.
    users = _users(computations, body, parameter.name)
    users = [user for user in users if not (user.is_root and user.opcode == "tuple")]
    if all(user.opcode in ("dynamic-slice", "dynamic-update-slice") for user in users):
        sliced = (num_bytes(user.type) for user in users if user.opcode == "dynamic-slice")
        return min(whole, sum(sliced))
    return whole


def _updates(computations: Mapping[str, Computation], body: Computation) -> Iterator[tuple[float, float]]:
    """(bytes of the whole, of what is written to it) of what changes a slice of something."""
    for each in body.values():
        if each.opcode == "dynamic-update-slice":
            yield num_bytes(each.type), num_bytes(body[each.operands[1]].type)
        elif each.opcode == "fusion":
            yield from _updates(computations, computations[_called(each)[0]])


def _written(computations: Mapping[str, Computation], body: Computation, each: Instruction) -> float:
    written = num_bytes(each.type, in_memory_only=True)
    root = next((one for one in body.values() if one.is_root), each)
    if root.opcode == "tuple":
        handed_on = [body[name].type for name in root.operands if body[name].opcode == "parameter"]
        written -= sum(num_bytes(kind, in_memory_only=True) for kind in handed_on)
    for whole, part in _updates(computations, body):
        written = max(part, written - whole + part)
    return max(0.0, written)


def _collectives(
    computations: Mapping[str, Computation], home: Computation, each: Instruction, inside: list[str], fusion: str
) -> Iterator[tuple[str, Collective]]:
    """(channel, collective) of those that an instruction is, or has inside; ``fusion`` is the one that it is in."""
    kind = each.opcode.removesuffix("-start")
    if each.opcode == "send" and (transfer := _TRANSFER.search(each.rest)):
        size, slices = num_bytes(home[each.operands[0]].type), _num_listed(transfer[1])
        done = transfer[2].lower().replace("_", "-")
        yield "", Collective(done, slices, size * slices if done == "all-gather" else size, 1, slow=True)
    if kind in COLLECTIVES:
        operands = sum(num_bytes(home[name].type) for name in each.operands if name in home)
        result = num_bytes(each.type)
        if each.opcode.endswith("-start") and each.type.startswith("("):  # (operands, results, ...)
            result = operands if kind == "all-reduce" else max(operands, result - operands)
        if "all-reduce-scatter" in fusion:  # each device takes its slice of the sum, inside of the fusion
            kind = "reduce-scatter"
        channel = re.search(r"channel_id=(\d+)", each.rest)
        size = operands if kind == "reduce-scatter" else result
        yield channel[1] if channel else "", Collective(kind, _group_size(each.rest), size, 1)
    for called in inside:
        for inner in computations[called].values():
            deeper = _called(inner) if inner.opcode == "fusion" else []
            yield from _collectives(computations, computations[called], inner, deeper, called)


def _num_listed(text: str) -> int:
    """How many numbers "1,2" or "0:3" lists."""
    spans = [part.split(":") for part in text.split(",")]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def _group_size(rest: str) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        # 'axis' is all of it, 'axis':(2)4 the part of it that is four long.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2 if "source_target_pairs" in rest else 1
