"""The tasks in TensorFlow Datasets (TFDS), read without TensorFlow: GLUE, SQuAD, CoNLL-2003 and the like."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from bert_flax.finetune.conll import to_iob2
from bert_flax.finetune.examples import Answer, Dataset, QuestionExample, TaggedExample, TextExample
from bert_flax.finetune.squad import RawQuestion, sift
from bert_flax.finetune.tables import parse_label
from bert_flax.finetune.tasks import TASKS, TaskSpec
from core_flax.data import tfds_text
from core_flax.types import UserError

_SPLITS = {
    "dev": ("validation", "dev", "validation_matched"),
    "dev_mismatched": ("validation_mismatched",),
    "test": ("test", "test_matched"),
}
"""What TFDS calls our splits, where it does not call them the same."""


def read(spec: TaskSpec, name: str, split: str, labelled: bool, training: bool) -> Dataset[Any]:
    """The examples of a split, in the order of the original file if the dataset has it (``idx``), else in its own.

    Args:
        spec: the task, not of kind choice: TFDS has no SWAG.
        name: ``NAME[/CONFIG]``; ``glue`` alone stands for the configuration of the task.
        split: one of ``spec.files``.
        labelled: whether to read labels.
        training: as for ``squad.sift``.

    Raises:
        UserError: there is no such dataset or split, it has not the task's fields, or a label is not the task's.
    """
    if spec.kind == "choice":
        raise UserError(f"tfds:{name}: TFDS has no dataset for task {spec.name}; give a folder of its official files")
    stored = _Stored.find(f"glue/{spec.name}" if name == "glue" else name)
    config = stored.builder.builder_config.name if stored.builder.builder_config else ""
    if config in TASKS and config != spec.name:
        raise UserError(f"tfds:{name} holds task {config}, not {spec.name}")
    if spec.kind == "span":
        return _questions(spec, stored, split, labelled, training)
    if spec.kind == "tagging":
        return _sentences(spec, stored, split, labelled)
    return _texts(spec, stored, split, labelled)


@dataclass(frozen=True)
class _Stored:
    """A dataset that TFDS knows. What can be told without its rows is, before they are downloaded."""

    name: str
    builder: Any

    @classmethod
    def find(cls, name: str) -> "_Stored":
        """The dataset of a name that TFDS understands."""
        return cls(name, tfds_text.find_builder(name))

    def features(self, *fields: str) -> Any:
        """The features of the dataset, which has these fields."""
        features = self.builder.info.features
        for field in fields:
            if field not in features:
                raise UserError(f"tfds:{self.name} has no field {field!r} (it has {', '.join(features)})")
        return features

    def rows(self, split: str) -> Iterator[Any]:
        """The rows of a split of ours, in the order of TFDS, downloaded if need be."""
        import tensorflow_datasets

        builder = self.builder
        if not builder.is_prepared():
            with _had(self.name):
                builder = cast(Any, tensorflow_datasets.builder(self.name, file_format="array_record"))
                builder.download_and_prepare()
        names = _SPLITS.get(split, (split,))
        name = next((name for name in names if name in builder.info.splits), None)
        if name is None:
            raise UserError(
                f"tfds:{self.name} has no split {' or '.join(names)}; it has {', '.join(builder.info.splits)}"
            )
        try:
            source = builder.as_data_source(split=name)
        except NotImplementedError as error:
            raise UserError(
                f"tfds:{self.name} is stored in {builder.data_path} as {builder.info.file_format.value}, which only "
                "TensorFlow reads; store it as array_record (tfds build --file_format=array_record)"
            ) from error
        return (source[number] for number in range(len(source)))


@contextmanager
def _had(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TFDS raises whatever went wrong in the builder's own code
        raise tfds_text.cannot_be_had(name, error) from error


def _texts(spec: TaskSpec, stored: _Stored, split: str, labelled: bool) -> Dataset[TextExample]:
    assert spec.columns is not None
    columns = (spec.columns.text, *((spec.columns.text_pair,) if spec.columns.text_pair else ()))
    fields = spec.tfds_texts or columns
    features = stored.features(*fields, *(("label",) if labelled else ()))
    classes = _classes(spec, features["label"], stored.name) if labelled and spec.kind == "classification" else None
    found = []
    for number, row in enumerate(stored.rows(split)):
        place, texts = int(row.get("idx", number)), [row[field].decode() for field in fields]
        label = None
        if classes is not None:
            label = classes[row["label"]] if 0 <= row["label"] < len(classes) else None
        if labelled and label is None:  # a number of 32 bits: its shortest form is what the file had
            label = parse_label(spec, str(np.float32(row["label"])), f"tfds:{stored.name} example {place}")
        found.append((place, TextExample(str(place), texts[0], texts[1] if len(texts) > 1 else None, label)))
    return Dataset(tuple(example for _, example in sorted(found, key=lambda pair: pair[0])))


def _questions(spec: TaskSpec, stored: _Stored, split: str, labelled: bool, training: bool) -> Dataset[QuestionExample]:
    known = ("is_impossible",) if labelled and spec.unanswerable else ()
    features = stored.features("id", "question", "context", *(("answers",) if labelled else ()), *known)

    def raw(row: Any) -> RawQuestion:
        own_id = row["id"].decode()
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        return RawQuestion(
            f"tfds:{stored.name} question {own_id}",
            own_id,
            row["question"].decode(),
            row["context"].decode(),
            tuple(Answer(text.decode(), int(start)) for text, start in zip(texts, starts, strict=True)),
            bool(row["is_impossible"]) if "is_impossible" in features else None,
        )

    return sift(spec, (raw(row) for row in stored.rows(split)), labelled, training)


def _sentences(spec: TaskSpec, stored: _Stored, split: str, labelled: bool) -> Dataset[TaggedExample]:
    """Each sentence is a document of its own: TFDS does not say which belong together."""
    features = stored.features("tokens", "ner")
    names = features["ner"].feature.names
    if unknown := [name for name in names if name not in spec.labels]:
        raise UserError(f"tfds:{stored.name} has tags that task {spec.name} has not: {', '.join(unknown)}")
    return Dataset(
        tuple(
            TaggedExample(
                str(number),
                tuple(word.decode() for word in row["tokens"]),
                to_iob2([names[tag] for tag in row["ner"]]) if labelled else None,
                number,
            )
            for number, row in enumerate(stored.rows(split))
        )
    )


def _classes(spec: TaskSpec, feature: Any, name: str) -> list[int]:
    """Our class for each stored number: by name, else by number where the official file has numbers, too."""
    names = list(feature.names or ())
    if sorted(names) == sorted(spec.labels):
        return [spec.labels.index(name) for name in names]
    if len(names) == len(spec.labels) and spec.labels == tuple(map(str, range(len(names)))):
        return list(range(len(names)))
    raise UserError(f"tfds:{name} has the labels {', '.join(names)}; task {spec.name} has {', '.join(spec.labels)}")
