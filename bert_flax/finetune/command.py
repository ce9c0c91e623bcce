"""``bert-flax finetune``: one task or all of GLUE, over seeds and recipes, and the table at the end."""

import dataclasses
import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bert_flax.finetune.config import FinetuneSettings
from bert_flax.finetune.data import load_data
from bert_flax.finetune.inputs import Units
from bert_flax.finetune.model import architecture, num_outputs
from bert_flax.finetune.readers import TFDS, find_labels
from bert_flax.finetune.runs import CONFIG, RESULT, SEED, Origin, Result, TaskChoice, best_run, run
from bert_flax.finetune.score import is_per_cent
from bert_flax.finetune.tables import shorten
from bert_flax.finetune.tasks import TaskSpec
from bert_flax.huggingface import Pretrained, Report
from bert_flax.huggingface_names import HEADS
from bert_flax.pretrained import load_init
from core_flax import kernels, storage
from core_flax.distributed import first_does, join
from core_flax.sharding import check_batch_size, make_mesh
from core_flax.types import UserError

RESULTS, SWEEP = "results.json", "sweep"
SWEEP_BATCH_SIZES, SWEEP_LEARNING_RATES, SWEEP_EPOCHS = (16, 32), (5e-5, 3e-5, 2e-5), (2, 3, 4)
"""The grid of the paper (arXiv 1810.04805, appendix A.3)."""
POOLER = HEADS["encoder/pooler"]
SWEPT = ("--train.batch-size", "--optimizer.learning-rate", "--epochs")


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(FinetuneSettings):
    """Options of ``bert-flax finetune``: where, on what, from which model, and every setting of a run."""

    workdir: str
    """Folder of the runs, or gs://BUCKET/FOLDER, one inside for each seed. Runs that are there already are resumed, or
    taken as they are."""
    data: str
    """Folder with the task's official files (for GLUE also the folder of all its tasks), or tfds:NAME."""
    init: str | None = None
    """Model to begin with: a pretraining run, a folder of Hugging Face's, or what import-hf made. Needed, unless
    --init-from-task is given."""
    init_from_task: str | None = None
    """Folder of fine-tuning runs whose best encoder to begin with, instead of --init (as MNLI's for RTE)."""
    keep_head: bool = False
    """Begin with the head that --init has, too, instead of a new one."""
    seeds: int = 1
    """How many runs, which differ in their seed alone: --seed, --seed + 1, ..."""
    sweep: bool = False
    """Try the paper's grid first (batch 16, 32; learning rate 5e-5, 3e-5, 2e-5; 2, 3, 4 epochs) with --seed, and give
    the seeds the recipe that is best on the dev set."""
    columns: str = ""
    """Task custom: which column of its tables is what, as in text=sentence,label=class; also text_pair= and id=."""
    regression: bool = False
    """Task custom: the label is a number to predict."""
    explain_kernels: bool = False
    """Tell in which way attention is computed here, and why in no faster one."""

    def __post_init__(self) -> None:
        """Raises UserError on what does not go together."""
        super().__post_init__()
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: must be 1 or more")
        dataclasses.replace(self.settings, seed=self.seed + self.seeds - 1)  # the last seed must be one, too

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
    home = _checked_home(name, command)
    join()
    _check_batch_sizes(command)
    labels = find_labels(command.columns, command.data) if name == "custom" and not command.regression else ()
    task = TaskChoice(name, command.columns, labels, command.regression)
    pretrained, init = _pretrained(task.spec, command)
    data = load_data(task.spec, command.data, pretrained.vocabulary, command.inputs)
    _check_segments(pretrained, data.train, init)
    found = [f"custom, labels: {shorten(labels)}"] if labels else []
    for line in (*_about(task.spec, pretrained, init), *found, *data.remarks):
        print(line)
    start = partial(
        run, task=task, pretrained=pretrained, data=data, origin=Origin.of(command.data, data, init, pretrained)
    )
    settings, sweep, results = command.settings, {}, []
    with kernels.explained(command.explain_kernels):
        if command.sweep:
            settings, sweep = _sweep(home, task.spec, settings, start)
        for seed in range(command.seed, command.seed + command.seeds):
            print(f"{name}, seed {seed}", flush=True)
            results.append(start(home / f"{SEED}{seed}", settings=dataclasses.replace(settings, seed=seed)))
    summary = summarize(task.spec, results, sweep)
    _write(home / RESULTS, summary)
    print(table(summary))
    print(f"written to {home / RESULTS}")


def _checked_home(name: str, command: FinetuneCommand) -> Path:
    """The workdir. Raises UserError if options do not go together or with the task."""
    if (command.init is None) == (command.init_from_task is None):
        raise UserError("give either --init FOLDER, a pretrained model, or --init-from-task WORKDIR, a fine-tuned one")
    if (name == "custom") != bool(command.columns) or (command.regression and name != "custom"):
        raise UserError(
            "--columns and --regression go with the task custom: bert-flax finetune custom --columns text=...,label=..."
        )
    if name == "custom" and command.data.startswith(TFDS):
        raise UserError(f"--data {command.data}: task custom reads tables; give the folder of train and dev files")
    home = storage.folder("--workdir", command.workdir)
    if (home / CONFIG).exists():
        raise UserError(f"--workdir {home} is the folder of one run or model; give a folder for the runs of this task")
    if others := sorted({path.parent.name for path in home.glob(f"*/{SEED}*")}):
        raise UserError(
            f"--workdir {home} holds the runs of several tasks ({', '.join(others)}); give one for this task alone"
        )
    if command.sweep and not (home / SWEEP).exists() and any(home.glob(f"{SEED}*")):
        raise UserError(f"--workdir {home} holds runs of one recipe; give another for a --sweep")
    return home


def _check_batch_sizes(command: FinetuneCommand) -> None:
    """Raises UserError if the devices do not share a batch evenly: before anything is read."""
    mesh = make_mesh(command.mesh)
    for size in {command.train.batch_size, *(SWEEP_BATCH_SIZES if command.sweep else ())}:
        check_batch_size(size, command.train.num_microbatches, mesh)


def _check_segments(pretrained: Pretrained, units: Units, init: str) -> None:
    """Raises UserError if pairs of texts are to be shown to a model that tells no second one from a first."""
    if pretrained.config.num_segments < 2 and (units.lengths > units.num_first).any():
        raise UserError(
            f"{init} has one segment (type_vocab_size 1), and the task's texts are pairs; take another model"
        )


def _pretrained(spec: TaskSpec, command: FinetuneCommand) -> tuple[Pretrained, str]:
    """The model to begin with, with the head as ``head`` among its parameters if it is kept, and where it is from."""
    if command.init_from_task is not None:
        if command.keep_head:
            raise UserError("--keep-head goes with --init; with --init-from-task the encoder alone is taken")
        best = best_run(str(storage.folder("--init-from-task", command.init_from_task)))
        params, step = best.params()
        encoder = jax.tree.map(np.asarray, {"encoder": params["encoder"]})
        report = Report((f"{best.workdir}, step {step}",), ("head of the task",))
        return Pretrained(best.config.model, encoder, best.vocabulary, report), command.init_from_task
    assert command.init is not None
    found = load_init(command.init)
    if command.keep_head:
        found = dataclasses.replace(found, params={**found.params, "head": _head(spec, found, command.init)})
    return found, command.init


def _about(spec: TaskSpec, pretrained: Pretrained, init: str) -> list[str]:
    """Lines on what the runs begin with. That it has no heads of pretraining is as it should be.

    Nor does it matter that position_ids are not used: they are 0, 1, 2 ..., which old files hold. Scores of tokens need
    no pooler.
    """
    report, head = pretrained.report, "its head" if "head" in pretrained.params else "a new head"
    first = f"begins with the encoder of {init} ({', '.join(report.files)}) and {head}"
    lacks_pooler = POOLER in report.missing and spec.kind not in ("span", "tagging")
    new = [f"{init} has no pooler: a new one is trained, as the head is"] * lacks_pooler
    unused = [f"unused: {name}" for name in report.unused if not name.endswith(".position_ids")]
    return [first, *new, *unused, *report.notes]


def _head(spec: TaskSpec, found: Pretrained, init: str) -> Mapping[str, np.ndarray]:
    """The head of a model, its outputs in the order of the task's labels."""
    head, wanted = found.head, architecture(spec)
    if head is None:
        raise UserError(f"--keep-head: {init} has no head of a task")
    if head.architecture != wanted or len(head.bias) != num_outputs(spec):
        raise UserError(
            f"--keep-head: {init} has the head of a {head.architecture} with {len(head.bias)} outputs; task "
            f"{spec.name} needs that of a {wanted} with {num_outputs(spec)}"
        )
    places = _places(spec, head.labels, init)
    return {"kernel": head.kernel[:, places], "bias": head.bias[places]}


def _places(spec: TaskSpec, labels: Sequence[str] | None, init: str) -> list[int]:
    """Which output of a head with these labels stands for each label of the task."""
    as_they_are = list(range(num_outputs(spec)))
    if labels is None or spec.kind not in ("classification", "tagging"):
        return as_they_are
    for case in (str, str.lower):  # as they are, then whatever their capitals
        theirs, ours = ([case(label) for label in side] for side in (labels, spec.labels))
        if sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours):
            return [theirs.index(label) for label in ours]
    if all(label.isdecimal() for label in ours):  # whose order among the labels is that of texts: 10 before 2
        ranked = sorted(map(int, ours))
        return [ranked.index(int(label)) for label in ours]
    if theirs == [f"label_{place}" for place in as_they_are]:
        return as_they_are  # numbers on their side: ours have names, in the task's order
    raise UserError(
        f"--keep-head: {init} has the labels {', '.join(labels)}; task {spec.name} has {', '.join(spec.labels)}"
    )


def _sweep(
    home: Path, spec: TaskSpec, settings: FinetuneSettings, start: Callable[..., Result]
) -> tuple[FinetuneSettings, dict[str, float]]:
    """The settings with the best recipe, and the primary figure of each. Its run becomes that of the first seed."""
    figures, recipes = {}, {}
    grid = list(itertools.product(SWEEP_BATCH_SIZES, SWEEP_LEARNING_RATES, SWEEP_EPOCHS))
    for number, (batch_size, rate, epochs) in enumerate(grid, 1):
        name = f"batch{batch_size}_lr{rate:g}_epochs{epochs}"
        print(f"{spec.name}, recipe {number} of {len(grid)}: {name}", flush=True)
        recipes[name] = dataclasses.replace(
            settings,
            epochs=epochs,
            train=dataclasses.replace(settings.train, batch_size=batch_size),
            optimizer=dataclasses.replace(settings.optimizer, learning_rate=rate),
        )
        result = start(home / SWEEP / name, settings=recipes[name])
        figures[name] = result.last[f"dev/{spec.primary}"]
    best = max(figures, key=lambda name: figures[name])
    print(f"{spec.name}: best recipe on the dev set is {best}: {spec.primary} {figures[best]:.2f}")
    first_does(lambda: _copy(home / SWEEP / best, home / f"{SEED}{settings.seed}"))
    return recipes[best], figures


def _copy(folder: Path, new: Path) -> None:
    """Copies a complete run to a folder that is not there yet, all of it or nothing."""
    if storage.is_remote(new):
        if not (new / RESULT).exists():  # written last: it makes a run complete
            for file in sorted(storage.files(folder), key=lambda file: file.name in (CONFIG, RESULT)):
                (new / str(file.relative_to(folder))).write_bytes(file.read_bytes())
    elif not new.exists():
        partial = folder.with_name("copy")
        with storage.writing(new):
            shutil.rmtree(partial, ignore_errors=True)  # of a copy that was interrupted
            shutil.copytree(folder, partial)
            partial.rename(new)


def summarize(spec: TaskSpec, results: Sequence[Result], sweep: Mapping[str, float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure after the last epoch and at the best evaluation.

    What is counted in examples or is a threshold is no such figure; ``runs`` has it. A figure that a seed lacks (F1 of
    a type of entity that it does not predict and the data does not have) is none of that seed's.
    """
    figures: dict[str, dict[str, Any]] = {}
    names = dict.fromkeys(name for result in results for name in (*result.last, *result.best))
    for name in (name for name in names if is_per_cent(name)):
        for moment in ("last", "best"):
            values = [told[name] for result in results if name in (told := getattr(result, moment))]
            figures.setdefault(name, {})[moment] = {
                "mean": statistics.fmean(values) if values else None,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
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


def finish_all(home: Path, names: Sequence[str]) -> None:
    """Writes the results of several tasks into one file, and prints a line for each: its primary figure."""
    summaries = {name: json.loads((home / name / RESULTS).read_text(encoding="utf-8")) for name in names}
    _write(home / RESULTS, summaries)
    print(f"{'task':<8} {'metric':<14} {'last epoch':>15}  {'best epoch':>15}  {'seconds':>7}")
    for name, summary in summaries.items():
        moments = summary["figures"][summary["primary"]]
        cells = "  ".join(f"{_cell(**moments[moment]):>15}" for moment in ("last", "best"))
        seconds = statistics.fmean(summary["seconds"])
        print(f"{name:<8} {summary['primary'].removeprefix('dev/'):<14} {cells}  {seconds:>7.0f}")
    print(f"written to {home / RESULTS}")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    def write() -> None:
        with storage.replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    first_does(write)


def _cell(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"
