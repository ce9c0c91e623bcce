"""From a task and a place to its examples: official files, any one file, TensorFlow Datasets."""

from pathlib import Path
from typing import Any

from bert_flax.finetune import conll, squad, tables, tfds
from bert_flax.finetune.examples import Dataset, summarize
from bert_flax.finetune.files import find_file
from bert_flax.finetune.tasks import TaskSpec, custom_task
from core_flax.types import UserError

TFDS = "tfds:"


def read(spec: TaskSpec, data: str | Path, split: str) -> Dataset[Any]:
    """The examples of a split, in the file's order; their type follows ``spec.kind``.

    Args:
        spec: the task.
        data: the task's own folder, or the folder that holds those of GLUE, or ``tfds:NAME[/CONFIG]``.
        split: one of ``spec.files``. Labels are read if the split is one of ``spec.labelled_splits``.

    Raises:
        UserError: there is no such file, or something in it is wrong (the file and the row are named).
    """
    labelled, training = split in spec.labelled_splits, split == "train"
    if str(data).startswith(TFDS):
        dataset = tfds.read(spec, str(data).removeprefix(TFDS), split, labelled, training)
        return _with_examples(dataset, f"{data}, {split}")
    return _read_path(spec, find_file(spec, Path(data), split), labelled, training)


def read_file(spec: TaskSpec, path: str | Path, labelled: bool) -> Dataset[Any]:
    """The examples of one file, whatever its name, to predict them or to score predictions (``labelled``)."""
    return _read_path(spec, Path(path), labelled, training=False)


def find_labels(columns: str, data: str | Path) -> tuple[str, ...]:
    """The labels of a task of the user's own, as its train file has them, sorted. See ``custom_task``."""
    spec = custom_task(columns)
    return tables.read_labels(spec, find_file(spec, Path(data), "train"))


def _read_path(spec: TaskSpec, path: Path, labelled: bool, training: bool) -> Dataset[Any]:
    match spec.kind:
        case "classification" | "regression":
            dataset = tables.read_texts(spec, path, labelled)
        case "choice":
            dataset = tables.read_choices(spec, path, labelled)
        case "tagging":
            dataset = conll.read_sentences(spec, path, labelled)
        case "span":
            dataset = squad.read_questions(spec, path, labelled, training)
    return _with_examples(dataset, str(path))


def _with_examples(dataset: Dataset[Any], where: str) -> Dataset[Any]:
    if not dataset.examples:
        why = f": {summarize(dataset.dropped)}" if dataset.dropped else ""
        raise UserError(f"{where} holds no example{why}")
    return dataset
