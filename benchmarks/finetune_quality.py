"""Fine-tune on GLUE tasks over seeds, ours and torch's, by the same recipe, and write the figures side by side.

    python benchmarks/finetune_quality.py --data GLUE --weights FOLDER --workdir DIR
    python benchmarks/finetune_quality.py --data GLUE --weights FOLDER --workdir DIR --tasks rte --seeds 0

Batch 32, learning rate 5e-5, 3 epochs, length 128, warmup 10 % and linear decay, weight decay 0.01, dropout 0.1, for
both. Compared are the figures after the last epoch, on the whole dev set: none is picked by the dev set. Theirs is
finetune_torch.py; each of its batches is padded to its longest row, which changes its time but no figure.

It may be stopped at any time, by Ctrl-C or SIGTERM, and started again with the same command: what DIR holds is not
repeated, and our own run goes on from where it was saved. The report is written anew after each run, from all that DIR
holds of these tasks and seeds; --report writes it and runs nothing. Needs what finetune_torch.py needs.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contest

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "docs" / "results" / "finetune_glue"
TASKS = ("mrpc", "rte", "cola", "stsb")
RECIPE = {
    "--train.batch-size": 32,
    "--optimizer.learning-rate": 5e-5,
    "--optimizer.weight-decay": 0.01,
    "--epochs": 3,
    "--warmup-share": 0.1,
    "--inputs.max-length": 128,
    "--dropout": 0.1,
    "--attention-dropout": 0.1,
}
METRICS = {
    "mrpc": {"accuracy": "accuracy", "f1": "f1"},
    "rte": {"accuracy": "accuracy"},
    "cola": {"matthews": "mcc"},
    "stsb": {"pearson": "pearson", "spearman": "spearman"},
}
"""For each task, our names of its figures and theirs."""


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in GLUE's layout")
    parser.add_argument("--weights", type=Path, required=True, help="Hugging Face folder of a BERT")
    parser.add_argument("--workdir", type=Path, required=True, help="where runs and their figures stay")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--output", type=Path, default=REPORT, help="without an ending")
    return parser.parse_args()


def run_to_end(command: list[str], log: Path) -> None:
    """Runs a command. A signal meanwhile is passed on; if it failed or was stopped, this program ends likewise."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal tells the child, too
    status = process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if status in (75, -signal.SIGINT, -signal.SIGTERM):
        sys.exit(75)
    if status:
        sys.exit(f"status {status}: {' '.join(command)}\n{log} has its messages")


def ours(task: str, seed: int, options: argparse.Namespace) -> None:
    """One run of ours, and its line in ours.jsonl."""
    if find(options, "ours.jsonl", task, seed):
        return
    recipe = [str(word) for pair in RECIPE.items() for word in pair]
    shown = ["bert-flax", "finetune", task, "--data", options.data.name, "--init", options.weights.name]
    shown += ["--workdir", f"ours/{task}", "--seed", str(seed), *recipe]
    places = {"--data": options.data, "--init": options.weights, "--workdir": options.workdir / "ours" / task}
    command = [sys.executable, "-m", "bert_flax.cli", *shown[1:]]
    for name, place in places.items():
        command[command.index(name) + 1] = str(place.resolve())
    path = places["--workdir"] / f"seed-{seed}" / "result.json"
    load, began, was_there = os.getloadavg()[0], time.perf_counter(), path.exists()
    run_to_end(command, options.workdir / "ours.log")
    seconds = time.perf_counter() - began
    result = json.loads(path.read_text(encoding="utf-8"))
    line = {
        **wanted(options, task, seed),
        **contest.origin(),
        "command": " ".join(shown),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "metrics": {name.removeprefix("dev/"): figure for name, figure in result["last"].items()},
        "seconds": None if was_there or result["resumed"] else seconds,
        "load_before_and_after": [load, os.getloadavg()[0]],
    }
    with (options.workdir / "ours.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def theirs(task: str, seed: int, options: argparse.Namespace) -> None:
    """One run of finetune_torch.py, which appends its line to torch.jsonl unless it is there."""
    command = [sys.executable, str(HERE / "finetune_torch.py"), "--task", task, "--seed", str(seed)]
    command += ["--data", str(options.data.resolve()), "--weights", str(options.weights.resolve())]
    command += ["--output", str((options.workdir / "torch.jsonl").resolve()), "--pad", "longest", "--device", "cpu"]
    run_to_end(command, options.workdir / "torch.log")


def wanted(options: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """What tells a line of ours.jsonl from the others."""
    return {"task": task, "seed": seed, "recipe": RECIPE, "weights_sha256": weights_hash(options)}


def weights_hash(options: argparse.Namespace) -> str:
    """Of the file of weights."""
    return hashlib.sha256((options.weights / "model.safetensors").read_bytes()).hexdigest()


def find(options: argparse.Namespace, file: str, task: str, seed: int) -> dict[str, Any] | None:
    """The line of a run; None if it is not complete."""
    path = options.workdir / file
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    own = wanted(options, task, seed)
    for line in lines:
        if file == "ours.jsonl" and own.items() <= line.items():
            return line
        settings = line.get("settings", {})
        plain = settings.get("pad") == "longest" and settings.get("max_train_rows") is None
        same = (line["task"], line["seed"], settings.get("weights_sha256")) == (task, seed, own["weights_sha256"])
        if file == "torch.jsonl" and same and plain:
            return line
    return None


def compare(task: str, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A task's figures: mean and standard deviation over seeds, ours and theirs, and whether ours is as good.

    It is if its mean is not lower than theirs by more than one standard deviation of a seed, of which both sides give
    an estimate: the root of the mean of their variances. None as long as a run is missing, or there is one seed.
    """
    rows = []
    for ours_name, theirs_name in METRICS[task].items():
        names = {"ours": ours_name, "torch": theirs_name}
        values = {side: [round(run["metrics"][names[side]], 3) for run in each] for side, each in runs.items()}
        means = {side: statistics.fmean(each) if each else None for side, each in values.items()}
        deviations = {side: statistics.stdev(each) if len(each) > 1 else None for side, each in values.items()}
        verdict = None
        if len(values["ours"]) == len(values["torch"]) > 1:
            deviation = (statistics.fmean(deviation**2 for deviation in deviations.values())) ** 0.5
            verdict = means["ours"] >= means["torch"] - deviation
        rows.append({"task": task, "metric": ours_name, "values": values, "mean": means, "deviation": deviations})
        rows[-1]["at_least_equal_within_one_deviation"] = verdict
    return rows


def report(options: argparse.Namespace) -> None:
    """Writes both files from the runs there are."""
    rows, lines = [], []
    for task in options.tasks:
        runs = {
            side: [line for seed in options.seeds if (line := find(options, f"{side}.jsonl", task, seed))]
            for side in ("ours", "torch")
        }
        rows += [{**row, "seconds": seconds(runs)} for row in compare(task, runs)]
        lines += [{"side": side, **without_paths(line)} for side, each in runs.items() for line in each]
    if not lines:
        sys.exit(f"{options.workdir} holds no complete run")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    stored = json.dumps({"recipe": RECIPE, "seeds": options.seeds, "figures": rows, "runs": lines}, indent=1)
    options.output.with_suffix(".json").write_text(stored + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(options, rows, lines), encoding="utf-8")


def seconds(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Mean wall-clock time of the runs that were not interrupted."""
    whole = {side: [run["seconds"] for run in each if run["seconds"] is not None] for side, each in runs.items()}
    return {side: statistics.fmean(each) if each else None for side, each in whole.items()}


def without_paths(line: dict[str, Any]) -> dict[str, Any]:
    """The line, of its command's absolute paths the last part."""
    words = [Path(word).name if word.startswith("/") else word for word in line["command"].split(" ")]
    return {**line, "command": " ".join(words)}


def markdown(options: argparse.Namespace, rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    """The report as a page."""
    text = [
        "# GLUE, fine-tuned by the same recipe: ours and torch",
        "",
        "| task | dev metric | ours | torch | at least equal within one sd | s a run, ours | torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["task"], row["metric"], *(cell(row, side, len(options.seeds)) for side in ("ours", "torch"))]
        cells.append({None: "-", True: "yes", False: "**no**"}[row["at_least_equal_within_one_deviation"]])
        cells += ["-" if each is None else f"{each:.0f}" for each in row["seconds"].values()]
        text.append(f"| {' | '.join(cells)} |")
    text += [
        "",
        "Per cent (correlations times 100), mean and standard deviation over the seeds, on the whole dev set after the",
        "last epoch, for ours too, although it keeps the best checkpoint. *Within one sd*: our mean is not below",
        "torch's by more than the standard deviation of a seed, the root of the mean of both variances. A run of ours",
        "is the whole command: start, compilation and evaluations included; torch's does without its imports.",
        "Interrupted runs count in the figures and not in the seconds.",
        "",
        "## Where it comes from",
        "",
        f"Every run, with its own commit, machine, load and seconds, is in [{options.output.name}.json]"
        f"({options.output.name}.json). Seeds {', '.join(map(str, options.seeds))}.",
        f"Weights: sha256 {weights_hash(options)}.",
        "",
    ]
    for side in ("ours", "torch"):
        own = [line for line in lines if line["side"] == side]
        if own:
            text += [f"**{side}**: {about(own)}", "", "```", own[0]["command"], "```", ""]
    return "\n".join(text)


def about(lines: list[dict[str, Any]]) -> str:
    """Commits, dates, versions and machines of runs."""
    commits = sorted({line["commit"][:12] + " with changes" * is_changed(line) for line in lines})
    dates = sorted({line["date"][:10] for line in lines})
    machines = sorted({f"{line['hardware']['cores']} cores of {line['hardware']['cpu']}" for line in lines})
    versions = sorted({", ".join(f"{name} {number}" for name, number in line["versions"].items()) for line in lines})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"commit {', '.join(commits)}; {days}; {'; '.join(versions)}; {'; '.join(machines)}, float32. The first run:"


def is_changed(line: dict[str, Any]) -> bool:
    """Whether files differed from the commit."""
    return bool(line.get("changed_files")) or line["commit"].endswith("-dirty")


def cell(row: dict[str, Any], side: str, num_seeds: int) -> str:
    """Mean and deviation, and how many seeds there are if some are missing."""
    mean, deviation, there = row["mean"][side], row["deviation"][side], len(row["values"][side])
    if mean is None:
        return "-"
    missing = f" ({there} of {num_seeds} seeds)" if there < num_seeds else ""
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "") + missing


def main() -> None:
    """Run what is missing, seed by seed, so that whatever it is stopped at can be compared."""
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    for seed in () if options.report else options.seeds:
        for task in options.tasks:
            for side in (ours, theirs):
                print(f"{side.__name__}: {task}, seed {seed}", flush=True)
                side(task, seed, options)
                report(options)
    report(options)
    print(f"written to {options.output}.md and .json")


if __name__ == "__main__":
    main()
