"""A task's data, read and cut into units, and what there is to say about it."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_flax.finetune.config import FinetuneInputs
from bert_flax.finetune.examples import Dataset, TaggedExample, summarize
from bert_flax.finetune.files import find_file
from bert_flax.finetune.inputs import (
    Units,
    encode_choices,
    encode_questions,
    encode_tagged,
    encode_texts,
    longest_question,
)
from bert_flax.finetune.readers import TFDS, read
from bert_flax.finetune.task import Labelled
from bert_flax.finetune.tasks import TaskSpec
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError


@dataclass(frozen=True)
class TaskData:
    """What a run learns from and is measured on.

    Attributes:
      train: units to train on.
      held_out: every labelled split but the training one and the test one, by name; ``dev`` first.
      remarks: a line for each thing that the user should know: rows left out, texts cut.
    """

    train: Units
    held_out: Mapping[str, Labelled]
    remarks: Sequence[str]

    @property
    def held_out_content(self) -> str:
        """SHA-256 of what runs are measured on: figures on other examples are not to be compared."""
        digest = hashlib.sha256()
        for name, labelled in self.held_out.items():
            digest.update(f"{name} {len(labelled.examples)}\n".encode())
            for example in labelled.examples:
                digest.update(repr(example).encode())
        return digest.hexdigest()


def load_data(spec: TaskSpec, data: str, vocabulary: WordPiece, inputs: FinetuneInputs) -> TaskData:
    """Reads the training split and those to evaluate on.

    MNLI's mismatched dev set is evaluated if it is there, and its absence is a remark.

    Raises:
      UserError: a file is missing, or something in it is wrong.
    """
    remarks: list[str] = []

    def units_of(split: str) -> Labelled:
        dataset = read(spec, data, split)
        units = encode(spec, dataset.examples, vocabulary, inputs, labelled=True)
        remarks.extend(remarks_on(f"{spec.name}, {split}", dataset, units, inputs))
        return Labelled(dataset.examples, units)

    train = units_of("train")
    held_out = {"dev": units_of("dev")}
    for split in spec.labelled_splits:
        if split in ("train", "dev", "test"):
            continue
        if missing := _missing(spec, data, split):
            remarks.append(f"{spec.name}: not measured on {split} ({missing})")
        else:
            held_out[split] = units_of(split)
    return TaskData(train.units, held_out, tuple(remarks))


def check_files(spec: TaskSpec, data: str) -> None:
    """Reads what load_data would read. Raises UserError as it does, but sooner, for nothing is cut into tokens."""
    for split in dict.fromkeys(("train", "dev", *spec.labelled_splits)):
        if split in ("train", "dev") or (split != "test" and not _missing(spec, data, split)):
            read(spec, data, split)


def _missing(spec: TaskSpec, data: str, split: str) -> str:
    """Why a split is not there; "" if it is."""
    try:
        if not data.startswith(TFDS):
            find_file(spec, Path(data), split)
    except UserError as error:
        return str(error)
    return ""


def encode(
    spec: TaskSpec, examples: Sequence[Any], vocabulary: WordPiece, inputs: FinetuneInputs, labelled: bool
) -> Units:
    """Units of examples of the task's kind."""
    match spec.kind:
        case "span":
            return encode_questions(examples, vocabulary, inputs.max_length, inputs.stride, labelled)
        case "tagging":
            return encode_tagged(examples, vocabulary, inputs.max_length, spec.labels, inputs.document_context)
        case "choice":
            return encode_choices(examples, vocabulary, inputs.max_length)
        case _:
            return encode_texts(examples, vocabulary, inputs.max_length)


def remarks_on(where: str, dataset: Dataset[Any], units: Units, inputs: FinetuneInputs) -> list[str]:
    """What was left out, what is odd, what was cut."""
    lines = [f"{where}: {units.num_units:,} sequences of {len(dataset.examples):,} examples"]
    if units.per_unit > 1 or units.num_units == len(dataset.examples):
        lines = [f"{where}: {len(dataset.examples):,} examples"]
    if dataset.dropped:
        lines.append(f"{where}: left out {len(dataset.dropped):,}: {summarize(dataset.dropped)}")
    if dataset.warnings:
        lines.append(f"{where}: {len(dataset.warnings):,} odd: {summarize(dataset.warnings)}")
    if units.num_cut:
        what = f"texts over --inputs.max-length {inputs.max_length}"
        if units.windows:
            what = f"questions over {longest_question(inputs.max_length)} tokens"
        lines.append(f"{where}: {units.num_cut:,} {what} were cut")
    if units.windows:
        pairs = itertools.pairwise(units.windows)
        closer = sum(0 < after.start < before.start + inputs.stride for before, after in pairs)
        if closer:
            lines.append(
                f"{where}: {closer:,} windows begin where the one before ends, and not --inputs.stride {inputs.stride} "
                f"tokens after its start: {inputs.max_length} tokens have no room for that"
            )
    documents = {example.document for example in dataset.examples if isinstance(example, TaggedExample)}
    if inputs.document_context and 1 < len(documents) == len(dataset.examples):
        lines.append(f"{where}: no document holds two sentences; --inputs.document-context finds nothing to add")
    return lines
