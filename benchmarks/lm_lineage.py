"""The lineage of neural language models on one text: nplm, gated convolutions, LSTM, Transformer.

All have about the same number of parameters, read the same text and take the same number of tokens: a step has 700, and
every model takes as many steps. What differs besides the architecture is each one's recipe, written down below: nplm
and conv have AdamW's, the LSTM its paper's, and the Transformer char_small's, by Muon: on the first 20 batches of the
held-out text it learned faster than by AdamW at four learning rates, and with a dropout of 0.1 better than with 0.3.
Each run is one of ``lm-flax train`` in the workdir: started again, this goes on where it was stopped, and the report is
written anew after every run.

    python benchmarks/lm_lineage.py --data ptb --workdir runs/lineage
    python benchmarks/lm_lineage.py --data ptb --workdir runs/lineage --speed

The second one, for a machine with nothing else to do, takes SPEED_STEPS of each and reports their rate in place of that
of the runs, which may have had company.

``--data`` is a folder with ptb.train.txt(.gz) and ptb.valid.txt, or what lm-flax prepare made of such files. Hours on
a CPU.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contest

TOKENS_PER_STEP = 700
STEPS_PER_EPOCH = 1328
"""Of the Penn Treebank's 929,589 tokens."""
SPEED_STEPS = 200
RESULTS = Path(__file__).parent.parent / "docs" / "results"


@dataclass(frozen=True)
class Contestant:
    """One model of the lineage.

    Attributes:
      preset: of lm-flax train.
      source: where the architecture was published.
      num_rows: rows of a step; each has TOKENS_PER_STEP / num_rows tokens.
      options: what differs from the preset, for size and recipe.
    """

    preset: str
    source: str
    num_rows: int
    options: dict[str, Any] = field(default_factory=dict)


ADAM = {
    "optimizer.name": "adamw",
    "optimizer.learning-rate": 1e-3,
    "optimizer.weight-decay": 0.0,
    "optimizer.clip-norm": 1.0,
    "schedule.name": "cosine",
    "schedule.final-fraction": 0.1,
    "schedule.warmup-steps": lambda num_steps: min(200, num_steps // 10),
}
"""A function makes a setting of the number of steps."""
MUON = {
    "optimizer.name": "muon",
    "optimizer.learning-rate": 1e-2,
    "optimizer.weight-decay": 0.0,
    "optimizer.beta2": 0.99,
    "schedule.name": "linear",
    "schedule.warmup-steps": lambda num_steps: min(100, num_steps // 10),
}
CONTESTANTS = {
    "nplm": Contestant(
        "nplm",
        "Bengio et al. 2003",
        num_rows=10,
        options=ADAM
        | {"model.embedding-width": 200, "model.width": 244, "model.no-direct": None, "model.dropout": 0.3},
    ),
    "conv": Contestant(
        "conv_lm",
        "Dauphin et al. 2017",
        num_rows=10,
        options=ADAM | {"model.num-layers": 4, "model.embedding-width": 180, "model.width": 180, "model.dropout": 0.3},
    ),
    "lstm": Contestant(
        "lstm_small",
        "Zaremba et al. 2014",
        num_rows=20,
        options={"schedule.decay-steps": lambda num_steps: num_steps // 2},
    ),
    "transformer": Contestant(
        "gpt2",
        "Radford et al. 2019",
        num_rows=10,
        options=MUON
        | {
            "model.num-layers": 2,
            "model.width": 256,
            "model.num-heads": 4,
            "model.mlp-width": 1536,
            "model.max-length": TOKENS_PER_STEP // 10,
            "model.dropout": 0.1,
            "model.attention-dropout": 0.1,
            "loss.num-chunks": 1,
        },
    ),
}


def main() -> None:
    """Prepare, train what is not trained yet, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with ptb.train.txt(.gz) and ptb.valid.txt")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--num-steps", type=int, default=8 * STEPS_PER_EPOCH, help="of each run")
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, default=list(CONTESTANTS), help="which of them")
    parser.add_argument("--output", type=Path, default=RESULTS / "lm_lineage", help="of the report, without ending")
    parser.add_argument("--speed", action="store_true", help="measure how fast each of them trains")
    options = parser.parse_args()
    data = prepare(options.data, options.workdir / "data")
    for name in options.only:
        if options.speed:
            shutil.rmtree(options.workdir / f"{name}_speed", ignore_errors=True)
            train(CONTESTANTS[name], data, options.workdir / f"{name}_speed", SPEED_STEPS)
        else:
            train(CONTESTANTS[name], data, options.workdir / name, options.num_steps)
        report(options.workdir, options.num_steps, options.output)


def lm_flax(*words: Any) -> None:
    """Runs the command line. Ends this program with its status if that is not 0."""
    done = subprocess.run([sys.executable, "-m", "lm_flax.cli", *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)


def prepare(source: Path, folder: Path) -> Path:
    """The prepared text: words as they are, the end of a line a word of its own, all of it one document."""
    if (source / "manifest.json").exists():
        return source
    if not (folder / "manifest.json").exists():
        train = next(path for path in sorted(source.glob("ptb.train.txt*")))
        words = ["--input", train, "--valid", source / "ptb.valid.txt", "--tokenizer", "word"]
        lm_flax("prepare", *words, "--output", folder)
    return folder


def train(contestant: Contestant, data: Path, workdir: Path, num_steps: int) -> None:
    """Trains, or goes on."""
    settings = {
        "inputs.length": TOKENS_PER_STEP // contestant.num_rows,
        "inputs.packing": "stream",
        "train.batch-size": contestant.num_rows,
        "train.num-steps": num_steps,
        "train.eval-every-steps": STEPS_PER_EPOCH,
        "train.eval-batches": 0,
        "checkpoint.every-steps": STEPS_PER_EPOCH,
        "log.every-steps": 50,
        **contestant.options,
    }
    settings = {name: value(num_steps) if callable(value) else value for name, value in settings.items()}
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in settings.items()]
    origin = workdir / "origin.json"
    if not origin.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        origin.write_text(json.dumps(contest.origin() | {"load": os.getloadavg()[0], "options": flags}))
    lm_flax("train", contestant.preset, "--workdir", workdir, "--data", data, *flags)


def figures(workdir: Path) -> dict[str, Any] | None:
    """What a run has come to; None before its first evaluation."""
    records = metrics(workdir)
    held_out = {record["step"]: record["held_out/loss"] for record in records if "held_out/loss" in record}
    if not held_out:
        return None
    speed = workdir.with_name(f"{workdir.name}_speed")
    alone = bool(metrics(speed))
    rates = [record["tokens_per_second"] for record in metrics(speed) or records if "tokens_per_second" in record]
    best, rate = min(held_out, key=lambda step: held_out[step]), statistics.median(rates)
    return {
        "steps": max(held_out),
        "best_step": best,
        "loss": held_out[best],
        "perplexity": math.exp(held_out[best]),
        "last_perplexity": math.exp(held_out[max(held_out)]),
        "tokens_per_second": rate,
        "speed_origin": json.loads((speed / "origin.json").read_text(encoding="utf-8")) if alone else None,
        "train_seconds": max(held_out) * TOKENS_PER_STEP / rate,
        "parameters": num_parameters(workdir),
        "losses": held_out,
        "origin": json.loads((workdir / "origin.json").read_text(encoding="utf-8")),
    }


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """What a run has written down; nothing if there is none."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def num_parameters(workdir: Path) -> int:
    """Of the newest checkpoint."""
    steps = [folder for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit()]
    newest = max(steps, key=lambda folder: int(folder.name))
    manifest = json.loads((newest / "manifest" / "manifest.json").read_text(encoding="utf-8"))
    return sum(math.prod(entry["shape"]) for name, entry in manifest["arrays"].items() if name.startswith("params/"))


def report(workdir: Path, num_steps: int, output: Path) -> None:
    """Writes what has come to its end, as a table and as JSON."""
    found = {name: figures(workdir / name) for name in CONTESTANTS}
    found = {name: each for name, each in found.items() if each and each["steps"] == num_steps}
    contest.write({"tokens_per_step": TOKENS_PER_STEP, "num_steps": num_steps, "runs": found}, Path(f"{output}.json"))
    rows = [line(name, each) for name, each in found.items()]
    text = [
        "# The lineage of neural language models on the Penn Treebank",
        "",
        f"Words, {num_steps:,} steps of {TOKENS_PER_STEP} tokens for each model "
        f"({num_steps / STEPS_PER_EPOCH:.1f} epochs). Perplexity of the validation text, each of its tokens once, at "
        "the best evaluation, which flatters it, and at the last one; time is that of training alone, at the median "
        "rate of the run or, if there is one, of a run of its own on an idle machine. The LSTM reads the validation "
        "text on and on, as in training; the others read it in rows, as in training, and see nothing of the row "
        "before.",
        "",
        "| model | source | parameters | valid loss (nats) | perplexity | at the end | tokens/s | time |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *sorted({sentence(each["origin"]) for each in found.values()}),
        "",
        *sorted({"Speed: " + sentence(each["speed_origin"]) for each in found.values() if each["speed_origin"]}),
        "",
        f"Loss after every epoch, options and origin of each run: [{output.name}.json]({output.name}.json). Command:",
        "",
        "```",
        contest.origin()["command"],
        "```",
    ]
    Path(f"{output}.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def line(name: str, each: dict[str, Any]) -> str:
    """A row of the table."""
    minutes = each["train_seconds"] / 60
    cells: Sequence[str] = (
        name,
        CONTESTANTS[name].source,
        f"{each['parameters']:,}",
        f"{each['loss']:.3f}",
        f"{each['perplexity']:.1f}",
        f"{each['last_perplexity']:.1f}",
        f"{each['tokens_per_second']:,.0f}",
        f"{minutes:.0f} min",
    )
    return f"| {' | '.join(cells)} |"


def sentence(origin: dict[str, Any]) -> str:
    """Where a run's figures come from."""
    changed = " with changes" if origin["changed_files"] else ""
    versions = "".join(f"{name} {number}, " for name, number in origin.get("versions", {}).items())
    return (
        f"Commit {origin['commit'][:12]}{changed}, {origin['date'][:10]}, seed 0, Python {origin['python']}, {versions}"
        f"{contest.machine(origin['hardware'])}, load {origin['load']:.1f} at the start."
    )


if __name__ == "__main__":
    main()
