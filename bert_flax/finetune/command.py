"""``bert-flax finetune``: one task or all of GLUE, over seeds and recipes, and the table at the end."""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bert_flax.finetune.config import FinetuneSettings
from bert_flax.finetune.data import TaskData, load_data
from bert_flax.finetune.readers import find_labels
from bert_flax.finetune.runs import Result, TaskChoice, best_run, run
from bert_flax.finetune.tasks import TaskSpec
from bert_flax.huggingface import Pretrained, Report
from bert_flax.pretrained import load_init
from core_flax.params import leaves
from core_flax.types import UserError

RESULTS = "results.json"
SWEEP_BATCH_SIZES, SWEEP_LEARNING_RATES, SWEEP_EPOCHS = (16, 32), (5e-5, 3e-5, 2e-5), (2, 3, 4)
"""The grid of the paper (arXiv 1810.04805, appendix A.3)."""


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(FinetuneSettings):
    """Options of ``bert-flax finetune``: where, on what, from which model, and every setting of a run."""

    workdir: str
    """Folder of the runs, one inside for each seed. Runs that are there already are resumed, or taken as they are."""
    data: str
    """Folder with the task's official files (for GLUE also the folder of all its tasks), or tfds:NAME."""
    init: str | None = None
    """Model to begin with: a pretraining run, a folder of Hugging Face's, or what import-hf made."""
    init_from_task: str | None = None
    """Folder of fine-tuning runs whose best encoder to begin with, instead of --init (as MNLI's for RTE)."""
    keep_head: bool = False
    """Begin with the head that --init has, too, instead of a new one."""
    seeds: int = 1
    """Runs that differ in their seed only: --seed, --seed + 1, ..."""
    sweep: bool = False
    """Try the paper's grid first (batch 16, 32; learning rate 5e-5, 3e-5, 2e-5; 2, 3, 4 epochs) with --seed, and give
    the seeds the recipe that is best on the dev set."""
    columns: str = ""
    """Task custom: which column holds what, as in text=sentence,label=class; also text_pair= and id=."""
    regression: bool = False
    """Task custom: the label is a number to predict."""

    def __post_init__(self) -> None:
        """Raises UserError on what does not go together."""
        super().__post_init__()
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: must be 1 or more")

    @property
    def settings(self) -> FinetuneSettings:
        """The settings of a run alone."""
        fields = dataclasses.fields(FinetuneSettings)
        return FinetuneSettings(**{field.name: getattr(self, field.name) for field in fields})


def finetune(name: str, command: FinetuneCommand) -> None:
    """Trains on the task with every seed, and writes and prints the table.

    Raises:
      UserError: see load_data, load_init and runs.run.
    """
    if (command.init is None) == (command.init_from_task is None):
        raise UserError("give either --init FOLDER, a pretrained model, or --init-from-task WORKDIR, a fine-tuned one")
    if (name == "custom") != bool(command.columns):
        raise UserError(
            "--columns and the task custom go together: bert-flax finetune custom --columns text=...,label=..."
        )
    labels = find_labels(command.columns, command.data) if name == "custom" and not command.regression else ()
    task = TaskChoice(name, command.columns, labels, command.regression)
    pretrained, origin = _pretrained(task.spec, command)
    data = load_data(task.spec, command.data, pretrained.vocabulary, command.inputs)
    for line in (*pretrained.report.lines(), *data.remarks):
        print(line)
    home = Path(command.workdir)
    settings, sweep = command.settings, {}
    if command.sweep:
        settings, sweep = _sweep(home / "sweep", task, settings, pretrained, data, (command.data, origin))
    results = []
    for seed in range(command.seed, command.seed + command.seeds):
        print(f"{name}, seed {seed}", flush=True)
        one = dataclasses.replace(settings, seed=seed)
        results.append(run(home / f"seed-{seed}", task, one, pretrained, data, (command.data, origin)))
    summary = summarize(task.spec, results, sweep)
    (home / RESULTS).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(table(summary))


def _pretrained(spec: TaskSpec, command: FinetuneCommand) -> tuple[Pretrained, str]:
    """The model to begin with, with the head as ``head`` among its parameters if it is kept, and where it is from."""
    if command.init_from_task is not None:
        if command.keep_head:
            raise UserError("--keep-head goes with --init; with --init-from-task the encoder alone is taken")
        best = best_run(command.init_from_task)
        params, step = best.params()
        encoder = {"encoder": {name: part for name, part in params.items() if name == "encoder"}["encoder"]}
        report = Report((f"{best.workdir}, step {step}",), ("head of the task",))
        return Pretrained(best.config.model, _numpy(encoder), best.vocabulary, report), command.init_from_task
    assert command.init is not None
    found = load_init(command.init)
    if command.keep_head:
        found = dataclasses.replace(found, params={**found.params, "head": _head(spec, found, command.init)})
    return found, command.init


def _head(spec: TaskSpec, found: Pretrained, init: str) -> Mapping[str, np.ndarray]:
    outputs = {"span": 2, "choice": 1, "regression": 1}.get(spec.kind, len(spec.labels))
    if found.head is None:
        raise UserError(f"--keep-head: {init} has no head of a task")
    if found.head.kernel.shape[1] != outputs:
        raise UserError(f"--keep-head: {init} has {found.head.kernel.shape[1]} outputs, {spec.name} needs {outputs}")
    return {"kernel": found.head.kernel, "bias": found.head.bias}


def _numpy(params: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, array in leaves(params):
        *folders, name = path.split("/")
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = np.asarray(array)
    return nested


def _sweep(
    folder: Path,
    task: TaskChoice,
    settings: FinetuneSettings,
    pretrained: Pretrained,
    data: TaskData,
    origin: tuple[str, str],
) -> tuple[FinetuneSettings, dict[str, float]]:
    """The settings with the best recipe, and the primary figure of each."""
    figures, recipes = {}, {}
    grid = list(itertools.product(SWEEP_BATCH_SIZES, SWEEP_LEARNING_RATES, SWEEP_EPOCHS))
    for number, (batch_size, rate, epochs) in enumerate(grid, 1):
        name = f"batch{batch_size}_lr{rate:g}_epochs{epochs}"
        print(f"{task.name}, recipe {number} of {len(grid)}: {name}", flush=True)
        recipes[name] = dataclasses.replace(
            settings,
            epochs=epochs,
            train=dataclasses.replace(settings.train, batch_size=batch_size),
            optimizer=dataclasses.replace(settings.optimizer, learning_rate=rate),
        )
        result = run(folder / name, task, recipes[name], pretrained, data, origin)
        figures[name] = result.last[f"dev/{task.spec.primary}"]
    best = max(figures, key=lambda name: figures[name])
    print(f"{task.name}: best recipe on the dev set is {best}: {task.spec.primary} {figures[best]:.2f}")
    return recipes[best], figures


def summarize(spec: TaskSpec, results: Sequence[Result], sweep: Mapping[str, float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure after the last epoch and of the best one."""
    figures = {}
    for name in results[0].last:
        for moment in ("last", "best"):
            values = [getattr(result, moment)[name] for result in results]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            figures.setdefault(name, {})[moment] = {"mean": statistics.fmean(values), "deviation": deviation}
    return {
        "task": spec.name,
        "primary": f"dev/{spec.primary}",
        "seeds": [result.seed for result in results],
        "figures": figures,
        "seconds": [result.seconds for result in results],
        "runs": [dataclasses.asdict(result) for result in results],
        "sweep": dict(sweep),
    }


def table(summary: Mapping[str, Any]) -> str:
    """The table at the end: figures with their deviation over seeds, after the last epoch and at the best one."""
    seeds, seconds = len(summary["seeds"]), statistics.fmean(summary["seconds"])
    head = f"{summary['task']}, {seeds} seed{'s' * (seeds > 1)}, {seconds:.0f} s each"
    width = max(len(head), *map(len, summary["figures"]))
    lines = [f"{head:<{width}}  {'last epoch':>15}  {'best epoch':>15}"]
    for name, moments in summary["figures"].items():
        cells = (_cell(**moments[moment]) for moment in ("last", "best"))
        mark = " *" if name == summary["primary"] else ""
        lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>15}" for cell in cells) + mark)
    return "\n".join([*lines, "* by which the best epoch is chosen"])


def table_of_all(paths: Sequence[Path]) -> str:
    """One line for each task: its primary figure."""
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    lines = [f"{'task':<8} {'metric':<14} {'last epoch':>15}  {'best epoch':>15}"]
    for summary in summaries:
        moments = summary["figures"][summary["primary"]]
        cells = "  ".join(f"{_cell(**moments[moment]):>15}" for moment in ("last", "best"))
        lines.append(f"{summary['task']:<8} {summary['primary'].removeprefix('dev/'):<14} {cells}")
    return "\n".join(lines)


def _cell(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"
