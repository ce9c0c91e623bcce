"""Plan every preset for TPU slices, with the real compiler and without a TPU, and write docs/plan.md.

    python benchmarks/plan_table.py                         # all that is not planned yet, then the table
    python benchmarks/plan_table.py --presets bert_large llama_7b --topologies v5e:16x16
    python benchmarks/plan_table.py --table                 # the table alone

Each cell takes the first of a few settings that fits (``attempts``), each a process that runs ``flax-launch plan``; it
is one line of benchmarks/results/plan.jsonl, so a script that was stopped goes on where it was. Needs the extra [tpu].
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
CELLS, TABLE = ROOT / "benchmarks" / "results" / "plan.jsonl", ROOT / "docs" / "plan.md"
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x8", "v6e:16x16")
TOKENS = 8192
"""Tokens that each chip has at least: a preset's batch that is smaller, having been made for fewer chips, is raised."""

FIRST = (("bert_large", "v5e:16x16"), ("llama_7b", "v5p:4x4x8"))
"""Cells that are wanted before all others; the rest follow by the number of parameters, which compile in that order."""

LARGE = ("gpt2_xl", "llama_1b", "llama_7b")
"""Begin with their parameters split: whole on each chip, they and their optimizer's state would not fit."""

HEAD = """# Does it fit, and how fast

Every line is the training step of a preset, compiled by the TPU's own compiler for devices that were not there
(`python benchmarks/plan_table.py`; libtpu {libtpu}, jax {jax}): the first of a few settings that fits. MFU is estimated
by the roofline that [clusters.md](clusters.md#what-a-plan-says) describes, with attention counted over whole rows also
where it is causal: an upper bound, no measurement. Memory is a device's, of what it has.

BERT is planned with `--model.attention-dropout 0`: no kernel that leaves the scores on the chip knows dropout of
probabilities; with it the plain way is taken, and attention waits for the memory (`--explain-kernels` tells so).

"""


class PlanError(Exception):
    """A plan that ended neither with figures nor with a refusal."""


def attempts(preset: str, num_devices: int) -> Iterator[dict[str, str]]:
    """Settings to try, those that move and compute the least first."""
    wide = str(min(num_devices, 64))
    if preset not in LARGE:
        yield {}
        yield {"--mesh.fsdp": wide}
    yield {"--mesh.fsdp": wide if num_devices > 64 else str(num_devices)}
    yield {"--mesh.fsdp": str(num_devices)}
    yield {"--mesh.fsdp": str(num_devices), "--model.remat": "block"}
    yield {"--mesh.fsdp": str(num_devices // 4), "--mesh.tensor": "4", "--model.remat": "block"}
    yield {"--mesh.fsdp": wide, "--model.remat": "block"}  # of widths that all devices do not divide
    yield {"--mesh.fsdp": wide, "--model.remat": "block", "--train.num-microbatches": "8"}


def options_of(preset: str, num_devices: int) -> dict[str, str]:
    """The batch, and what else all attempts have."""
    sys.path.insert(0, str(ROOT))
    from launch.families import PRESETS

    config = PRESETS[preset].presets[preset]()
    fields = PRESETS[preset].batch(config, config.train.num_steps - 1)
    length = max(x.shape[1] for x in fields.values() if len(x.shape) > 1)
    rows = max(config.train.batch_size, num_devices * max(1, TOKENS // length))
    options = {"--batch": str(-(-rows // num_devices) * num_devices)}
    if preset.startswith("bert_"):
        options["--model.attention-dropout"] = "0"
    return options


def plan(preset: str, topology: str, options: dict[str, str]) -> tuple[dict | None, str]:
    """(the plan's figures, or None if it does not fit; what was said)."""
    words = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "launch.cli", "plan", preset, "--topology", topology, "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode not in (0, 2):
        raise PlanError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return (json.loads(done.stdout) if done.returncode == 0 else None), done.stderr.strip()[-300:]


def cell(preset: str, topology: str) -> dict:
    """The first attempt that fits, and what was said of those before it."""
    num_devices = math.prod(map(int, topology.split(":")[1].split("x")))
    common, began, said, tried = options_of(preset, num_devices), time.time(), [], []
    for attempt in attempts(preset, num_devices):
        if attempt in tried:
            continue
        tried.append(attempt)
        found, words = plan(preset, topology, common | attempt)
        if found:
            found["collectives"] = found["collectives"][:8]
            return {
                "preset": preset,
                "topology": topology,
                "options": common | attempt,
                "before": said,
                "plan": found,
                "seconds": round(time.time() - began),
                "versions": {name: version(name) for name in ("jax", "libtpu")},
            }
        said.append(words)
    return {"preset": preset, "topology": topology, "options": common, "before": said, "plan": None}


def read() -> list[dict]:
    """The cells that are there."""
    return [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []


def write_table(num_missing: int) -> None:
    """docs/plan.md, from the cells; it says how many of them are not planned yet."""
    rows = [
        "| preset | slice | settings | GiB | step, ms | tokens/s | MFU | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = sorted(read(), key=lambda each: (TOPOLOGIES.index(each["topology"]), each["preset"]))
    for each in found:
        options = " ".join(
            f"{name} {value}" for name, value in each["options"].items() if name != "--model.attention-dropout"
        )
        if each["plan"] is None:
            rows.append(f"| {each['preset']} | {each['topology']} | {options} | does not fit | | | | |")
            continue
        figures, roofline, memory = each["plan"], each["plan"]["roofline"], each["plan"]["memory"]
        mfu = "-" if figures["mfu"] is None else f"{figures['mfu']:.1%}"
        rows.append(
            f"| {each['preset']} | {each['topology']} | {options} "
            f"| {memory['total'] / 2**30:.1f} of {memory['capacity'] / 2**30:.0f} | {1000 * roofline['step']:.1f} "
            f"| {figures['tokens_per_second']:,.0f} | {mfu} | {roofline['bound']} |"
        )
    versions = next((each["versions"] for each in found if "versions" in each), {"jax": "-", "libtpu": "-"})
    missing = f"{num_missing} more are not planned yet.\n\n" if num_missing else ""
    TABLE.write_text(HEAD.format(**versions) + missing + "\n".join(rows) + "\n", encoding="utf-8")


def in_order(presets: list[str], topologies: list[str]) -> list[tuple[str, str]]:
    """The cells, those of ``FIRST`` before the others, small models before large ones."""
    import jax

    from launch.families import PRESETS

    def num_params(preset: str) -> int:
        task = PRESETS[preset].task(PRESETS[preset].presets[preset]())
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))

    sizes = {preset: num_params(preset) for preset in presets}
    cells = [
        (preset, topology) for preset in sorted(presets, key=lambda preset: sizes[preset]) for topology in topologies
    ]
    return sorted(cells, key=lambda each: each not in FIRST)


def main() -> None:
    """All cells that are asked for and not there yet, then the table."""
    sys.path.insert(0, str(ROOT))
    from launch.families import PRESETS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES))
    parser.add_argument("--table", action="store_true", help="plan nothing, write the table")
    asked = parser.parse_args()
    there = {(each["preset"], each["topology"]) for each in read()}
    for preset, topology in [] if asked.table else in_order(asked.presets, asked.topologies):
        if (preset, topology) in there:
            continue
        try:
            line = cell(preset, topology)
        except PlanError as error:  # left out: the next run tries it again
            print(preset, topology, error, flush=True)
            continue
        with CELLS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = line["plan"]
        print(preset, topology, figures and (figures["mfu"], figures["roofline"]["bound"]), flush=True)
    write_table(len(PRESETS) * len(TOPOLOGIES) - len(read()))


if __name__ == "__main__":
    main()
