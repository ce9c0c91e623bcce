"""One fine-tuning run and its folder: what it was started with, its checkpoints, what came of it."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from bert_flax.finetune.batches import PackedUnits
from bert_flax.finetune.config import FinetuneConfig, FinetuneSettings, resolve
from bert_flax.finetune.data import TaskData
from bert_flax.finetune.task import make_task
from bert_flax.finetune.tasks import TASKS, TaskSpec, custom_task
from bert_flax.huggingface import Pretrained
from core_flax import config as configs
from core_flax import storage
from core_flax.checkpoint import best_step, list_steps, load_params
from core_flax.distributed import agree, all_have, first_does, first_tells, is_seen, only_run
from core_flax.loop import train
from core_flax.params import leaves
from core_flax.program import make_program
from core_flax.run import holds_run, not_shared
from core_flax.sharding import make_mesh, ways_of_batch
from core_flax.snapshot import fingerprints
from core_flax.text.wordpiece import WordPiece
from core_flax.types import Params, UserError

KIND = "bert_flax.finetune"
CONFIG, VOCAB, RESULT, METRICS = "config.json", "vocab.txt", "result.json", "metrics.jsonl"
SEED = "seed-"
"""What the folder of a run begins with, of those that differ in their seed alone."""


@dataclass(frozen=True)
class TaskChoice:
    """Which task: one of the known ones, or columns of the user's own tables."""

    name: str
    columns: str = ""
    labels: tuple[str, ...] = ()
    regression: bool = False

    @property
    def spec(self) -> TaskSpec:
        """The task itself."""
        return TASKS[self.name] if self.name in TASKS else custom_task(self.columns, self.labels, self.regression)

    def __str__(self) -> str:
        if self.name in TASKS:
            return self.name
        return f"{self.name} ({self.columns}; {'a number' if self.regression else ', '.join(self.labels)})"


@dataclass(frozen=True)
class Origin:
    """Where a run's data and model are from, as the user wrote it, and fingerprints of what was found there.

    ``held_out_content`` is "" in runs of before it was noted.
    """

    data: str
    data_content: str
    init: str
    init_content: str
    held_out_content: str = ""

    @classmethod
    def of(cls, data: str, found: TaskData, init: str, pretrained: Pretrained) -> "Origin":
        """With the fingerprints of these."""
        arrays = fingerprints(dict(leaves(pretrained.params)))
        init_content = hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()
        return cls(data, found.train.content, init, init_content, found.held_out_content)


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
      last: figures on the dev set after the last step.
      best: those of the evaluation with the best primary figure, whose checkpoint was kept.
      best_step, last_step: when.
      seconds: wall-clock time of training and evaluation in the process that ended the run.
      resumed: whether an earlier process did some of it.
    """

    task: str
    seed: int
    last: Mapping[str, float]
    best: Mapping[str, float]
    best_step: int
    last_step: int
    seconds: float
    resumed: bool

    @classmethod
    def load(cls, folder: Path) -> "Result | None":
        """The result in a run's folder; None if it has none yet."""
        path = folder / RESULT
        if not path.exists():
            return None
        try:
            return configs.from_dict(cls, json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, UserError) as error:
            raise UserError(f"{path} is damaged; delete it, and run the same bert-flax finetune again") from error

    def save(self, folder: Path) -> None:
        """Writes it, complete or not at all."""
        with storage.replacing(folder / RESULT) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class FinetuneRun:
    """What the folder of a run says of it."""

    workdir: Path
    config: FinetuneConfig
    task: TaskChoice
    vocabulary: WordPiece
    origin: Origin

    @classmethod
    def load(cls, folder: Path) -> "FinetuneRun":
        """Raises UserError if the folder holds no fine-tuning run."""
        path = folder / CONFIG
        stored = configs.load(path, KIND, task=dict, tokenizer=str, lowercase=bool, origin=dict, meaning=dict | None)
        vocabulary = WordPiece.load(folder / VOCAB, stored["lowercase"])
        if vocabulary.fingerprint != stored["tokenizer"]:
            raise UserError(f"{folder / VOCAB} is not the vocabulary that this run was started with; put it back")
        config = configs.load_config(path, FinetuneConfig, stored)
        task = configs.load_config(path, TaskChoice, stored, "task")
        if task.name not in TASKS and not task.columns:
            raise UserError(f"{path}: there is no task {task.name} here; add it to bert_flax/finetune/tasks.py again")
        for name, now in _meaning(task.spec).items():
            if (then := (stored["meaning"] or {}).get(name, now)) != now:
                raise UserError(
                    f"{path}: the run has the {name} {then}, and task {task.name} in bert_flax/finetune/tasks.py has "
                    f"{now}; put it back there, or give the new task another name"
                )
        return cls(folder, config, task, vocabulary, configs.load_config(path, Origin, stored, "origin"))

    def save(self) -> None:
        """Writes vocabulary and settings; config.json last, since it makes the folder a run."""
        storage.make_folder(self.workdir)
        with storage.replacing(self.workdir / VOCAB) as partial:
            self.vocabulary.save(partial)
        configs.save(
            self.workdir / CONFIG,
            KIND,
            self.config,
            task=dataclasses.asdict(self.task),
            meaning=_meaning(self.task.spec),
            origin=dataclasses.asdict(self.origin),
            tokenizer=self.vocabulary.fingerprint,
            lowercase=self.vocabulary.lowercase,
        )

    def params(self, step: int | None = None, sharding: jax.sharding.Sharding | None = None) -> tuple[Params, int]:
        """(parameters, step) of a checkpoint: of the best one on the dev set if step is None."""
        checkpoints = self.workdir / "checkpoints"
        return load_params(checkpoints, best_step(checkpoints) if step is None else step, sharding)


def _meaning(spec: TaskSpec) -> dict[str, str]:
    """What a model's outputs stand for, which is the task's to say. (Runs of before it was noted lack it.)"""
    return {"kind": spec.kind, "labels": ", ".join(spec.labels)}


def run(
    folder: Path,
    task: TaskChoice,
    settings: FinetuneSettings,
    pretrained: Pretrained,
    data: TaskData,
    origin: Origin,
) -> Result:
    """Trains in the folder, goes on with what is there, or just returns its result if it is complete.

    Args:
      folder: of this one run.
      task: what is learned.
      settings: of this run, its seed among them.
      pretrained: what it begins with.
      data: of the task.
      origin: where data and model came from, for the record.

    Raises:
      UserError: the settings do not fit each other, the devices, or the run that the folder holds.
    """
    config = resolve(settings, pretrained.config, data.train.num_units)
    new = FinetuneRun(folder, config, task, pretrained.vocabulary, origin)
    with only_run(folder / "run.lock", f"another run is writing to {folder}; stop it or give another --workdir"):
        if holds_run(folder):
            _check_resumable(FinetuneRun.load(folder), new)
            _check_not_behind(folder, config.train.num_steps)
        for other in _seeds(folder.parent) if folder.name.startswith(SEED) else ():
            if other != folder:  # seeds are compared with each other
                old = FinetuneRun.load(other)
                _check_resumable(
                    old, dataclasses.replace(new, config=dataclasses.replace(config, seed=old.config.seed))
                )
        origins = origin.data_content + origin.held_out_content
        settings_of_all = repr((config, task))
        all_have({"data": origins, "model to begin with": origin.init_content, "settings": settings_of_all})
        done = _told(lambda: Result.load(folder))
        if done and done.last_step == config.train.num_steps:
            print(f"complete already: {folder}", flush=True)
            return done
        row_multiple = ways_of_batch(make_mesh(config.mesh)) * config.train.num_microbatches
        learned = make_task(config, task.spec, data.train, data.held_out, pretrained.params, row_multiple)
        program = make_program(learned, config)
        agree("")  # nothing is written unless every process has come so far
        first_does(new.save)
        if not is_seen((folder / CONFIG).is_file):
            raise not_shared(folder)
        agree("")
        print(_shapes(PackedUnits(data.train, config.inputs.max_length, row_multiple), config), flush=True)
        resumed, began = (folder / "checkpoints").exists(), time.perf_counter()
        train(learned, config, program, folder)
        result = _told(lambda: _result(new, time.perf_counter() - began, resumed))
        assert result is not None
        first_does(lambda: result.save(folder))
        return result


def _told(find: Callable[[], Result | None]) -> Result | None:
    """What the first process finds, in all of them."""

    def found() -> str:
        result = find()
        return json.dumps(result and dataclasses.asdict(result))

    told = json.loads(first_tells(found))
    return told and configs.from_dict(Result, told)


def _shapes(packed: PackedUnits, config: FinetuneConfig) -> str:
    """A line on how training units lie in rows."""
    batch_size, num_batches = config.train.batch_size, min(config.train.num_steps, 50)
    rows = " or ".join(map(str, packed.row_counts(batch_size, config.seed)))
    padding = packed.share_of_padding(batch_size, config.seed, num_batches)
    return f"batches of {batch_size} in {rows} rows of {packed.row_length} tokens, {padding:.1%} of them padding"


def _check_resumable(old: FinetuneRun, new: FinetuneRun) -> None:
    changed = configs.differences(old.config, new.config)
    if old.task != new.task:
        changed.append(f"task: {old.task} -> {new.task}")
    if old.origin.held_out_content not in ("", new.origin.held_out_content):
        changed.append(f"dev data: {Path(new.origin.data).absolute()} has changed")
    for name in ("data", "init"):
        if getattr(old.origin, f"{name}_content") != getattr(new.origin, f"{name}_content"):
            paths = [str(storage.absolute(storage.path(getattr(run.origin, name)))) for run in (old, new)]
            changed.append(
                f"{name}: {' -> '.join(paths)}" if paths[0] != paths[1] else f"{name}: {paths[0]} has changed"
            )
    if old.vocabulary.fingerprint != new.vocabulary.fingerprint:
        changed.append("vocabulary")
    if changed:
        raise UserError(
            f"{old.workdir} holds a run with other settings, which these cannot continue: {'; '.join(changed)}; "
            "give the same settings or another --workdir"
        )


def _seeds(home: Path) -> list[Path]:
    """Folders of the runs that a task has in its workdir."""
    return [folder for folder in sorted(home.glob(f"{SEED}*")) if (folder / CONFIG).exists()]


def _check_not_behind(folder: Path, num_steps: int) -> None:
    if (step := max(list_steps(folder / "checkpoints"), default=0)) > num_steps:
        raise UserError(
            f"{folder} has a checkpoint of step {step} already; {num_steps} steps are fewer: give another --workdir"
        )


def _result(run: FinetuneRun, seconds: float, resumed: bool) -> Result:
    """From the figures that the loop wrote down; the best are those of the checkpoint that was kept as the best."""
    by_step, last = figures_by_step(run.workdir), run.config.train.num_steps
    best = best_step(run.workdir / "checkpoints")
    assert best is not None, "the last step is always evaluated and saved"
    if lacking := sorted({best, last} - set(by_step)):
        raise UserError(
            f"{run.workdir / METRICS} lacks the figures of step {lacking[0]}; put it back, or delete {run.workdir} "
            "and run the same bert-flax finetune again"
        )
    return Result(run.task.name, run.config.seed, by_step[last], by_step[best], best, last, round(seconds, 1), resumed)


def figures_by_step(folder: Path) -> dict[int, dict[str, float]]:
    """What each evaluation of a run found, as ``dev/f1``, by its step."""
    path = folder / METRICS
    by_step: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        record = json.loads(line) if line.endswith("\n") else {}  # a kill cut the last line short
        if figures := {key: value for key, value in record.items() if "/" in key}:
            by_step.setdefault(record["step"], {}).update(figures)
    return by_step


def best_run(workdir: str) -> FinetuneRun:
    """The run in a folder: itself, or of several seeds the one that is best on the dev set.

    Raises:
      UserError: there is none that is complete.
    """
    home = storage.path(workdir)
    if (home / "config.json").is_file():
        return FinetuneRun.load(home)
    found = [(folder, Result.load(folder)) for folder in _seeds(home)]
    complete = [(folder, result) for folder, result in found if result is not None]
    if not complete:
        tasks = sorted({path.parts[-3] for path in home.glob(f"*/{SEED}*/{RESULT}")})
        which = f"one of its folders {', '.join(tasks)}" if tasks else "the --workdir of bert-flax finetune"
        raise UserError(f"{home} holds no complete run of kind {KIND}; give {which}")

    def figure(pair: tuple[Path, Result]) -> float:
        spec = FinetuneRun.load(pair[0]).task.spec
        return pair[1].best.get(f"dev/{spec.primary}", -math.inf)

    return FinetuneRun.load(max(complete, key=figure)[0])
