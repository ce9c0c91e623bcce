"""gpt_speedrun against the GPT-2 recipe on one text at small width: in how many tokens it reaches the same loss.

    lm-flax prepare --input train.txt.gz --valid valid.txt.gz --document-start ' = [^=]' --vocab-size 8192 --output wiki
    python benchmarks/speedrun_quality.py --data wiki --workdir runs/speedrun

The GPT-2 recipe: GPT-2's architecture, AdamW with beta2 0.95 and weight decay 0.1, warmup and cosine decay to a tenth
over all of its steps; of a few learning rates the best, so that it is not beaten for a badly chosen one (the report
says so if that is the least or the largest tried). gpt_speedrun has 60 % of the steps. Both have the same rows, layers,
width and heads; gpt_speedrun's output layer is a table of its own, GPT-2's is the embedding, so the parameters stand
beside the loss. Each run is one of ``lm-flax train`` in the workdir, so this can be started again. Writes
docs/results/gpt_speedrun.md and .json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import contest

from lm_flax.runs import load_run, num_parameters

DOCS = Path(__file__).parent.parent / "docs" / "results"
SHARE = 0.6
"""Of the GPT-2 recipe's tokens: what gpt_speedrun has."""
RATE = 1e-2
"""gpt_speedrun's learning rate."""
LM_FLAX = ("-m", "lm_flax.cli")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_sizes(parser)
    parser.add_argument("--gpt2-rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3], help="learning rates")
    parser.add_argument("--speedrun-rates", type=float, nargs="+", default=[RATE], help="learning rates")
    return parser.parse_args()


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that say what is trained, and on how much."""
    parser.add_argument("--data", type=Path, required=True, help="folder made by lm-flax prepare")
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the GPT-2 recipe")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the result")


def train(
    options: argparse.Namespace,
    preset: str,
    rate: float,
    steps: int,
    program: Sequence[str] = LM_FLAX,
    name: str = "",
    **more: str | float,
) -> dict:
    """A run, made or gone on with: its tokens, its held-out loss at the end and on the way.

    ``program`` is what Python is to run; ``name`` tells this run's folder from others; ``more`` are settings besides.
    """
    home = options.workdir / f"{preset}{name}-{rate:g}-{steps}"
    settings = {
        "model.num-layers": options.layers,
        "model.width": options.width,
        "model.num-heads": options.heads,
        "model.mlp-width": 4 * options.width,
        "model.max-length": options.length,
        "inputs.length": options.length,
        "loss.num-chunks": 1,
        "optimizer.learning-rate": rate,
        "schedule.warmup-steps": min(100, steps // 4),
        "train.num-steps": steps,
        "train.batch-size": options.batch,
        "train.eval-every-steps": max(1, options.steps // 5),
        "train.eval-batches": 0,
        "checkpoint.every-steps": 0,
        "seed": options.seed,
    }
    settings |= {"schedule.decay-steps": steps // 2} if preset == "gpt_speedrun" else {}
    settings |= more
    command = [sys.executable, *program, "train", preset, "--workdir", str(home), "--data", str(options.data)]
    flags = [f"--{name}={value}" for name, value in settings.items()]
    print(f"{preset}{name}, learning rate {rate:g}, {steps} steps", flush=True)
    done = subprocess.run([*command, *flags, "--log.no-tensorboard"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(line["step"], line["held_out/loss"]) for line in lines if "held_out/loss" in line]
    return {
        "preset": preset,
        "learning_rate": rate,
        "parameters": num_parameters(load_run(home)[0].config),
        "steps": steps,
        "tokens": steps * options.batch * options.length,
        "held_out_loss": curve[-1][1],
        "curve": curve,
        "settings": settings,
    }


def verdict(runs: list[dict]) -> str:
    """Whether the best of gpt_speedrun's runs reaches the best of GPT-2's, and whether that could be better still."""
    best = {}
    for run in sorted(runs, key=lambda run: run["held_out_loss"]):
        best.setdefault(run["preset"], run)
    theirs, ours = best["gpt2"], best["gpt_speedrun"]
    rates = [run["learning_rate"] for run in runs if run["preset"] == "gpt2"]
    at_end = theirs["learning_rate"] in (min(rates), max(rates))
    edge = " GPT-2's learning rate is at the end of those tried, so another may be better." if at_end else ""
    reaches = "reaches" if ours["held_out_loss"] <= theirs["held_out_loss"] else "does not reach"
    losses = f"{ours['held_out_loss']:.4f} beside {theirs['held_out_loss']:.4f}"
    return f"With that, gpt_speedrun {reaches} the best of GPT-2's recipe: {losses}.{edge}"


def main() -> None:
    """Train all, print the table, write the result."""
    options = parse()
    runs = [train(options, "gpt2", rate, options.steps) for rate in options.gpt2_rates]
    fewer = round(SHARE * options.steps)
    runs += [train(options, "gpt_speedrun", rate, fewer) for rate in options.speedrun_rates]
    rows = [
        f"| {run['preset']} | {run['learning_rate']:g} | {run['parameters']:,} | {run['tokens']:,} | "
        f"{run['held_out_loss']:.4f} |"
        for run in runs
    ]
    report = {"what": "held-out loss, nats a token", **contest.origin(), "seed": options.seed, "runs": runs}
    contest.write(report, options.output / "gpt_speedrun.json")
    head = ["| preset | learning rate | parameters | tokens | held-out loss, nats a token |", "|---|---|---|---|---|"]
    table = "\n".join([*head, *rows])
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    text = (
        f"# gpt_speedrun beside the GPT-2 recipe\n\n{options.layers} layers, {options.width} wide, rows of "
        f"{options.length} tokens, seed {options.seed}; gpt_speedrun has {SHARE:.0%} of the tokens, and more "
        f"parameters: its output layer is not its embedding.\n\n{table}\n\n{verdict(runs)} "
        "Losses are those at the end of each run, over all of the held-out text, by which learning rates were chosen, "
        "too.\n\n"
        f"`{report['command']}`, commit {report['commit'][:7]}, {versions}, "
        f"{contest.machine(report['hardware'])}, {report['date'][:10]}. Curves and settings: "
        "[gpt_speedrun.json](gpt_speedrun.json).\n"
    )
    (options.output / "gpt_speedrun.md").write_text(text, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
