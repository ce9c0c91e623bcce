"""The commands about fine-tuning: ``finetune``, ``predict``, ``score``, and weights from and to Hugging Face."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from core_flax import cli
from core_flax.memory import keep_freed_memory
from core_flax.types import UserError

if TYPE_CHECKING:  # commands that need no jax start without it
    from bert_flax.finetune.command import FinetuneCommand
    from bert_flax.finetune.tasks import TaskSpec

PROG = "bert-flax"


def finetune(argv: Sequence[str]) -> None:
    """``bert-flax finetune TASK``."""
    keep_freed_memory()  # before jax is imported
    from bert_flax.finetune.command import FinetuneCommand
    from bert_flax.finetune.command import finetune as start
    from bert_flax.finetune.config import FinetuneSettings, settings_of
    from bert_flax.finetune.tasks import TASKS, TaskSpec, custom_task

    names = (*TASKS, "glue", "custom")
    words, rest = cli.take_words(FinetuneCommand, argv)
    if not words and not {"-h", "--help"} & set(rest):
        raise UserError(f"name the task: {PROG} finetune TASK ..., one of {', '.join(names)}")
    if len(words) > 1:
        raise UserError(f"{' '.join(words)}: one task at a time; settings are options (--name value)")
    name = words[0] if words else "glue"
    if name not in names:
        raise UserError(f"unknown task {name!r}{cli.suggest(name, names)}; there are {', '.join(names)}")

    def parse(spec: TaskSpec) -> FinetuneCommand:
        given = settings_of(spec)
        fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(FinetuneSettings)}
        default = FinetuneCommand(**fields, workdir=tyro.MISSING, data=tyro.MISSING)
        doc = (
            f"{PROG} finetune TASK --data DIR --init MODEL --workdir DIR [options] trains on a task, or resumes.\n\n"
            f"Tasks: {', '.join(names)}; glue is all tasks of GLUE that --data holds, custom a table of your own.\n\n"
            f"Defaults below are those of {spec.name}."
        )
        command = cli.parse(FinetuneCommand, rest, f"{PROG} finetune {name}", default, doc)
        _check_given(rest, command, spec)
        return command

    if name == "glue":
        _finetune_glue(parse)
    else:
        start(name, parse(TASKS[name] if name in TASKS else custom_task("text=text,label=label")))


def _check_given(argv: Sequence[str], command: "FinetuneCommand", spec: "TaskSpec") -> None:
    """Raises UserError if a setting was given that another one decides, or that the task has no use for."""
    from bert_flax.finetune.command import SWEPT
    from bert_flax.finetune.config import DECIDED_BY, ONLY_FOR

    given = cli.options_given(type(command), argv)
    for path, name in DECIDED_BY.items():
        option, other = (f"--{each.replace('_', '-')}" for each in (path, name))
        if option in given and (value := getattr(command, name)) is not None:
            raise UserError(f"{option} follows from {other} {value:g}: leave one of them out, {other} with None")
    if command.sweep and (swept := sorted(given & set(SWEPT))):
        raise UserError(f"{swept[0]} is what --sweep tries values of: leave one of them out")
    for option, kind in ONLY_FOR.items():
        if option in given and spec.kind != kind:
            raise UserError(f"{option} is for tasks of kind {kind}; {spec.name} is of kind {spec.kind}: leave it out")


def _finetune_glue(parse: "Callable[[TaskSpec], FinetuneCommand]") -> None:
    """Every task of GLUE whose training and dev files are there, one after another, and one table of all."""
    from bert_flax.finetune.command import finetune, finish_all
    from bert_flax.finetune.data import check_files
    from bert_flax.finetune.files import glue_tasks
    from bert_flax.finetune.readers import TFDS
    from bert_flax.finetune.runs import SEED
    from bert_flax.finetune.tasks import GLUE, TASKS
    from core_flax import storage

    command = parse(TASKS["mrpc"])
    if command.keep_head:
        raise UserError("--keep-head goes with one task: those of GLUE have different heads")
    home = storage.folder("--workdir", command.workdir)
    if any(home.glob(f"{SEED}*")):
        raise UserError(f"--workdir {home} holds the runs of one task; give another for all of GLUE")
    wanted = {"train", "dev"}
    there = dict.fromkeys(GLUE, tuple(wanted)) if command.data.startswith(TFDS) else glue_tasks(Path(command.data))
    missing = {name: sorted(wanted - set(there.get(name, ()))) for name in GLUE}
    complete = [name for name in GLUE if not missing[name]]
    if not complete:
        raise UserError(f"--data {command.data} holds no task of GLUE with its train and dev files")
    for name, splits in missing.items():
        if splits:
            print(f"{name}: left out, {command.data} lacks its {' and '.join(splits)} split")
    commands = {name: dataclasses.replace(parse(TASKS[name]), workdir=str(home / name)) for name in complete}
    if not command.data.startswith(TFDS):
        for name in complete:  # a torn file of the last task is told before the first one is trained
            check_files(TASKS[name], command.data)
    for name, one in commands.items():
        finetune(name, one)
    finish_all(home, complete)


def predict(argv: Sequence[str]) -> None:
    """``bert-flax predict``."""
    keep_freed_memory()  # before jax is imported
    from bert_flax.finetune.predict import PredictCommand, run

    run(cli.parse(PredictCommand, argv, f"{PROG} predict", description=PredictCommand.__doc__ or ""))


@dataclass(frozen=True)
class ScoreCommand:
    """Scores a file of predictions with the task's official metric, whoever made it."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """A task of bert-flax finetune: cola, mrpc, squad2, ner and so on, but not glue and custom."""
    predictions: str
    """File of predictions: index and prediction (GLUE, SWAG), JSON (SQuAD), or CoNLL columns."""
    data: str
    """The task's file with the labels."""
    null_odds: str | None = None
    """SQuAD 2.0: JSON file with null odds by question, to find the best threshold."""
    null_threshold: float | None = None
    """SQuAD 2.0: questions with larger null odds count as said to have no answer; None: predictions count as they are.
    (The official script takes 1 where odds are given, for they may be probabilities.)"""


def score(argv: Sequence[str]) -> None:
    """``bert-flax score TASK``."""
    from bert_flax.finetune.score import print_scores

    command = cli.parse(ScoreCommand, argv, f"{PROG} score", description=ScoreCommand.__doc__ or "")
    odds = None if command.null_odds is None else Path(command.null_odds)
    print_scores(command.task, Path(command.predictions), Path(command.data), odds, command.null_threshold)


@dataclass(frozen=True)
class ImportCommand:
    """Turns a model of Hugging Face's, of BERT's architecture, into one of ours."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder with config.json, vocab.txt or tokenizer.json, and model.safetensors (whole or in parts) or
    pytorch_model.bin."""
    output: str
    """New folder to write."""


def import_hf(argv: Sequence[str]) -> None:
    """``bert-flax import-hf FOLDER``."""
    from bert_flax.pretrained import import_hf as start

    command = cli.parse(ImportCommand, argv, f"{PROG} import-hf", description=ImportCommand.__doc__ or "")
    start(command.folder, command.output)


@dataclass(frozen=True)
class ExportCommand:
    """Writes a model as a folder that transformers loads."""

    workdir: str
    """Folder of a pretraining run, of fine-tuning runs, or an imported model."""
    output: str
    """New folder to write."""
    step: int | None = None
    """Step of the checkpoint; None: the newest, or of a fine-tuned model the best."""


def export_hf(argv: Sequence[str]) -> None:
    """``bert-flax export-hf``."""
    from bert_flax.pretrained import export_hf as start

    command = cli.parse(ExportCommand, argv, f"{PROG} export-hf", description=ExportCommand.__doc__ or "")
    start(command.workdir, command.output, command.step)
