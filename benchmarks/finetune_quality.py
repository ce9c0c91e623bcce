"""Fine-tune over seeds, ours and torch's by the same recipe, then ours by better ones, and write the figures.

    python benchmarks/finetune_quality.py glue --data DATA --weights FOLDER --workdir DIR
    python benchmarks/finetune_quality.py ner --data DATA --weights FOLDER --workdir DIR --seeds 0 --sides ours \\
        --recipe "--optimizer.learning-rate 3e-4 --epochs 10"

The first word is the report: glue, sst2, ner or squad. finetune_studies.py says what each trains on and how, and which
better recipes of ours are tried; --recipe gives other options of bert-flax finetune to try instead of these.
Figures are those after the last epoch, on the whole dev set: none is picked by the dev set. Theirs is
finetune_torch.py, with malloc set as ours has it; each of its batches is padded to its longest row, which changes its
time but no figure.

It may be stopped at any time, by Ctrl-C or SIGTERM, and started again with the same command: what DIR holds is not
repeated, and our own run goes on from where it was saved. The report is written anew after each run, from all that DIR
holds of these tasks and seeds, whatever recipes it was made by; --report writes it and runs nothing. --known takes the
runs of an earlier report into a new DIR. Needs what finetune_torch.py needs.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contest
from finetune_studies import MNLI, MNLI_OPTIONS, STUDIES, Recipe, Study, Task, Words

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results"
Lines = list[dict[str, Any]]
"""Runs, as ours.jsonl and torch.jsonl hold them."""


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES, help="the report")
    parser.add_argument("--data", type=Path, required=True, help="folder of glue, conll2003, squad and so on")
    parser.add_argument("--weights", type=Path, required=True, help="Hugging Face folder of a BERT")
    parser.add_argument("--workdir", type=Path, required=True, help="where runs and their figures stay")
    parser.add_argument("--tasks", nargs="+", help="some of the report's; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=("ours", "torch", "better"), default=["ours", "torch", "better"])
    parser.add_argument("--recipe", action="append", help="options to try, instead of finetune_studies.py's")
    parser.add_argument("--after-mnli", action="store_true", help="of each --recipe: train on a part of MNLI first")
    parser.add_argument("--known", type=Path, nargs="+", help="reports' .json files, whose runs count as made")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--output", type=Path, help="without an ending; default: docs/results/finetune_STUDY")
    options = parser.parse_args()
    known = [task.name for task in STUDIES[options.study].tasks]
    if unknown := set(options.tasks or ()) - set(known):
        parser.error(f"--tasks {' '.join(sorted(unknown))}: {options.study} has {' '.join(known)}")
    options.output = options.output or RESULTS / f"finetune_{options.study}"
    return options


def as_words(text: str) -> Words:
    """Options as they are written on a command line."""
    words: Words = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            words[name] = value if equals else None
        else:
            name = next(reversed(words))
            words[name] = word
    return words


def as_list(words: Words) -> list[str]:
    """The same as separate arguments."""
    return [part for name, value in words.items() for part in ((name,) if value is None else (name, value))]


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


def ours(task: Task, seed: int, recipe: Recipe, options: argparse.Namespace) -> Path:
    """One run of ours, and its line in ours.jsonl. Returns its workdir."""
    workdir = options.workdir.resolve() / "ours" / task.name / name_of(recipe)
    if find(options, task, seed, recipe):
        return workdir
    places = {"--data": task.data(options.data.resolve(), options.workdir.resolve() / "data")}
    if recipe.after_mnli:
        places["--init-from-task"] = ours(MNLI, 0, Recipe(MNLI_OPTIONS), options)
    else:
        places["--init"] = options.weights.resolve()
    places["--workdir"] = workdir
    words = [str(word) for pair in places.items() for word in pair] + ["--seed", str(seed), *as_list(recipe.options)]
    command = [sys.executable, "-m", "bert_flax.cli", "finetune", task.name, *words]
    path = workdir / f"seed-{seed}" / "result.json"
    load, began, was_there = os.getloadavg()[0], time.perf_counter(), path.exists()
    run_to_end(command, options.workdir / "ours.log")
    seconds = time.perf_counter() - began
    result = json.loads(path.read_text(encoding="utf-8"))
    line = {
        **wanted(options, task, seed, recipe),
        **contest.origin(),
        "command": shlex.join(["bert-flax", *without_paths(command[3:])]),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "metrics": {name.removeprefix("dev/"): figure for name, figure in result["last"].items()},
        "seconds": None if was_there or result["resumed"] else seconds,
        "load_before_and_after": [load, os.getloadavg()[0]],
    }
    with (options.workdir / "ours.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return workdir


def name_of(recipe: Recipe) -> str:
    """A folder's: what recipes mostly differ in, and a few letters that differ with the rest."""
    told = [recipe.options[name] for name in ("--optimizer.learning-rate", "--epochs", "--train.batch-size")]
    digest = hashlib.sha256(json.dumps([recipe.options, recipe.after_mnli], sort_keys=True).encode()).hexdigest()
    return "lr{}_epochs{}_batch{}_".format(*told) + digest[:6]


def theirs(task: Task, seed: int, recipe: Recipe, options: argparse.Namespace) -> None:
    """One run of finetune_torch.py, which appends its line to torch.jsonl unless it is there."""
    command = [sys.executable, str(HERE / "finetune_torch.py"), "--task", task.torch, "--seed", str(seed)]
    command += ["--data", str(task.data(options.data.resolve(), options.workdir.resolve() / "data"))]
    command += ["--weights", str(options.weights.resolve()), "--epochs", str(recipe.options["--epochs"])]
    command += ["--learning-rate", str(recipe.options["--optimizer.learning-rate"])]
    command += ["--output", str((options.workdir / "torch.jsonl").resolve()), "--pad", "longest", "--device", "cpu"]
    command += ["--keep-memory", *(["--group-by-length"] if STUDIES[options.study].grouped else [])]
    run_to_end(command, options.workdir / "torch.log")


def wanted(options: argparse.Namespace, task: Task, seed: int, recipe: Recipe) -> dict[str, Any]:
    """What tells a line of ours.jsonl from the others."""
    after = MNLI_OPTIONS if recipe.after_mnli else None
    return {
        "task": task.name,
        "seed": seed,
        "recipe": recipe.options,
        "after_mnli": after,
        "weights_sha256": weights_hash(options),
    }


def weights_hash(options: argparse.Namespace) -> str:
    """Of the file of weights."""
    return hashlib.sha256((options.weights / "model.safetensors").read_bytes()).hexdigest()


def stored(options: argparse.Namespace, side: str) -> Lines:
    """The complete runs of a side."""
    path = options.workdir / f"{side}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def take_known(options: argparse.Namespace) -> None:
    """Adds the runs of the reports named to the files of runs, but for those that these hold."""
    for report in options.known or ():
        for run in json.loads(report.read_text(encoding="utf-8"))["runs"]:
            line = {name: value for name, value in run.items() if name != "side"}
            if line not in stored(options, run["side"]):
                with (options.workdir / f"{run['side']}.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def find(options: argparse.Namespace, task: Task, seed: int, recipe: Recipe) -> dict[str, Any] | None:
    """The line of a run of ours; None if it is not complete."""
    own = wanted(options, task, seed, recipe)
    return next((line for line in stored(options, "ours") if own.items() <= line.items()), None)


def find_theirs(options: argparse.Namespace, task: Task, seed: int, recipe: Recipe) -> dict[str, Any] | None:
    """The line of a run of torch's; None if it is not complete."""
    settings = {
        "epochs": int(recipe.options["--epochs"] or 0),
        "learning_rate": float(recipe.options["--optimizer.learning-rate"] or 0),
        "length": int(recipe.options["--inputs.max-length"] or 0),
        "pad": "longest",
        "max_train_rows": None,
        "weights_sha256": weights_hash(options),
    }
    if STUDIES[options.study].grouped:
        settings["group_by_length"] = True
    for line in stored(options, "torch"):
        if (line["task"], line["seed"]) == (task.torch, seed) and settings.items() <= line["settings"].items():
            return line
    return None


def recipes_tried(options: argparse.Namespace, task: Task, shared: Recipe) -> list[Recipe]:
    """Recipes of which there are runs, besides the shared one, in the order of their first runs."""
    found = []
    for line in stored(options, "ours"):
        recipe = Recipe(line["recipe"], line["after_mnli"] is not None)
        if find(options, task, line["seed"], recipe) == line and recipe not in (shared, *found):
            found.append(recipe)
    return found


def compare(task: Task, runs: dict[str, Lines], num_seeds: int) -> list[dict[str, Any]]:
    """A task's figures: mean and standard deviation over seeds, ours and theirs, and whether ours is as good.

    It is if its mean is not lower than theirs by more than one standard deviation of a seed, as the sides that have
    several estimate it: the root of the mean of their variances. None as long as a run of ours is missing.
    """
    rows = []
    for ours_name, theirs_name in task.metrics.items():
        names = {"ours": ours_name, "torch": theirs_name}
        values = {side: [round(run["metrics"][names[side]], 3) for run in each] for side, each in runs.items()}
        means = {side: statistics.fmean(each) if each else None for side, each in values.items()}
        deviations = {side: statistics.stdev(each) if len(each) > 1 else None for side, each in values.items()}
        verdict = None
        if len(values["ours"]) == num_seeds > 1 and values["torch"]:
            known = [deviation for deviation in deviations.values() if deviation is not None]
            deviation = statistics.fmean(deviation**2 for deviation in known) ** 0.5
            verdict = means["ours"] >= means["torch"] - deviation
        rows.append({"task": task.name, "metric": ours_name, "values": values, "mean": means, "deviation": deviations})
        rows[-1]["at_least_equal_within_one_deviation"] = verdict
    return rows


def report(options: argparse.Namespace, tasks: list[Task]) -> None:
    """Writes both files from the runs there are."""
    study = STUDIES[options.study]
    shared, same, tried, lines = Recipe(study.options), [], [], []
    for task in tasks:
        runs = {
            side: [line for seed in options.seeds if (line := look(options, task, seed, shared))]
            for side, look in (("ours", find), ("torch", find_theirs))
        }
        same += [{**row, "seconds": seconds(runs)} for row in compare(task, runs, len(options.seeds))]
        lines += [{"side": side, **cleaned(line)} for side, each in runs.items() for line in each]
        for recipe in recipes_tried(options, task, shared):
            own = [line for seed in options.seeds if (line := find(options, task, seed, recipe))]
            about = {"recipe": recipe.options, "after_mnli": recipe.after_mnli, "seconds": seconds({"ours": own})}
            tried += [{**row, **about} for row in compare(task, {"ours": own, "torch": []}, len(options.seeds))]
            lines += [{"side": "ours", **cleaned(line)} for line in own]
    if not lines:
        sys.exit(f"{options.workdir} holds no complete run")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"recipe": study.options, "seeds": options.seeds, "figures": same, "other_recipes": tried, "runs": lines}
    options.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    page = markdown(options, study, same, tried, lines)
    options.output.with_suffix(".md").write_text(page, encoding="utf-8")


def seconds(runs: dict[str, Lines]) -> dict[str, float | None]:
    """Mean wall-clock time of the runs that were not interrupted."""
    whole = {side: [run["seconds"] for run in each if run["seconds"] is not None] for side, each in runs.items()}
    return {side: statistics.fmean(each) if each else None for side, each in whole.items()}


def cleaned(line: dict[str, Any]) -> dict[str, Any]:
    """The line, of its command's absolute paths the last part."""
    return {**line, "command": " ".join(without_paths(line["command"].split(" ")))}


def without_paths(words: Iterable[str]) -> list[str]:
    """Words of a command, of absolute paths the last part."""
    return [Path(word).name if word.startswith("/") else word for word in words]


def markdown(options: argparse.Namespace, study: Study, same: Lines, tried: Lines, lines: Lines) -> str:
    """The report as a page."""
    text = [
        f"# {study.title}, fine-tuned: ours and torch",
        "",
        *([study.about, ""] if study.about else []),
        "## By the same recipe",
        "",
        "| task | dev metric | ours | torch | at least equal within one sd | s a run, ours | torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in same:
        cells = [row["task"], row["metric"], *(cell(row, side, len(options.seeds)) for side in ("ours", "torch"))]
        cells.append({None: "-", True: "yes", False: "**no**"}[row["at_least_equal_within_one_deviation"]])
        cells += ["-" if each is None else f"{each:.0f}" for each in row["seconds"].values()]
        text.append(f"| {' | '.join(cells)} |")
    text += ["", f"Recipe: `{' '.join(as_list(study.options))}`", ""]
    text += [
        "Per cent (correlations times 100), mean and standard deviation over the seeds, on the whole dev set after the",
        "last epoch, for ours too, although it keeps the best checkpoint. *Within one sd*: our mean is not below",
        "torch's by more than the standard deviation of a seed: the root of the mean of both variances, or ours where",
        "torch has one seed. A run of ours is the whole command: start, compilation and evaluations included; torch's",
        "does without its imports.",
        "Runs that were interrupted, or paused, count in the figures and not in the seconds.",
        "",
        *better(options, study, same, tried),
        "## Where it comes from",
        "",
        f"Every run, with its own command, commit, machine, load and seconds, is in [{options.output.name}.json]"
        f"({options.output.name}.json). Seeds {', '.join(map(str, options.seeds))}.",
        f"Weights: sha256 {weights_hash(options)}. All of it again: `{page_command(options)}`",
        "",
    ]
    for side in ("ours", "torch"):
        own = [line for line in lines if line["side"] == side]
        if own:
            text += [f"**{side}**: {about(own)}", "", "```", own[0]["command"], "```", ""]
    return "\n".join(text)


def better(options: argparse.Namespace, study: Study, same: Lines, tried: Lines) -> list[str]:
    """Lines on the recipes of ours that were tried, those of the best mean in bold."""
    if not tried:
        return []
    text = ["## By other recipes, ours", "", "| task | dev metric | ours | s a run | recipe |", "|---|---|---|---|---|"]
    for task in study.tasks:
        every = [{"recipe": study.options, "after_mnli": False, **row} for row in same] + tried
        rows = [row for row in every if row["task"] == task.name and row["mean"]["ours"] is not None]
        ranked = [row["mean"]["ours"] for row in rows if row["metric"] == [*task.metrics][-1]]
        for place, row in enumerate(rows):
            mark = "**" * (ranked[place // len(task.metrics)] == max(ranked))
            words = {name: value for name, value in row["recipe"].items() if study.options.get(name, "") != value}
            recipe = (f"`{' '.join(as_list(words))}`" if words else "as above") + ", after MNLI" * row["after_mnli"]
            spent = row["seconds"]["ours"]
            cells = [task.name, row["metric"], mark + cell(row, "ours", len(options.seeds)) + mark]
            text.append(f"| {' | '.join([*cells, '-' if spent is None else f'{spent:.0f}', recipe])} |")
    return [
        *text,
        "",
        "Options that are not named are those above. Bold is the recipe with the best mean of its last metric: it is",
        "picked on the dev set, which flatters it. *After MNLI*: `--init-from-task`, the encoder of a run on 8,999",
        f"rows of MNLI with `{' '.join(as_list(MNLI_OPTIONS))}`, whose time is not counted.",
        "",
    ]


def page_command(options: argparse.Namespace) -> str:
    """The command that makes this report."""
    words = ["--data", "DATA", "--weights", "FOLDER", "--workdir", "DIR", "--seeds", *map(str, options.seeds)]
    return " ".join(["python", "benchmarks/finetune_quality.py", options.study, *words])


def about(lines: list[dict[str, Any]]) -> str:
    """Commits, dates, versions and machines of runs."""
    commits = sorted({line["commit"][:12] + " with changes" * is_changed(line) for line in lines})
    dates = sorted({line["date"][:10] for line in lines})
    machines = sorted({contest.machine(line["hardware"]) for line in lines})
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
    """Run what is missing, seed by seed, so that whatever it is stopped at can be compared; better recipes last."""
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    take_known(options)
    study = STUDIES[options.study]
    tasks = [task for task in study.tasks if task.name in (options.tasks or [task.name])]
    given = [Recipe(as_words(text), options.after_mnli) for text in options.recipe or ()]
    same = [(Recipe({}), run) for side, run in (("ours", ours), ("torch", theirs)) if side in options.sides]
    others = [(recipe, ours) for recipe in given or study.better if "better" in options.sides or given]
    for part in () if options.report else (same, others):
        for seed in options.seeds:
            for task in tasks:
                for recipe, run in part:
                    if recipe.tasks and task.name not in recipe.tasks:
                        continue
                    whole = Recipe({**study.options, **recipe.options}, recipe.after_mnli)
                    print(f"{run.__name__}: {task.name}, seed {seed}, {' '.join(as_list(recipe.options))}", flush=True)
                    run(task, seed, whole, options)
                    report(options, tasks)
    report(options, tasks)
    print(f"written to {options.output}.md and .json")


if __name__ == "__main__":
    main()
