"""The tasks, as data: where their files are, what their columns and labels mean, how they are scored.

Sources: GLUE, Wang et al. 2018 (arXiv 1804.07461), and the files as gluebenchmark.com has them; SQuAD, Rajpurkar et
al. 2016 and 2018; SWAG, Zellers et al. 2018; CoNLL-2003, Tjong Kim Sang & De Meulder 2003. Recipes: BERT, Devlin et al.
2018 (arXiv 1810.04805), sections 4.1 to 4.4 and appendix A.3. For GLUE it trains 3 epochs in batches of 32 and picks
the learning rate out of 5e-5, 4e-5, 3e-5 and 2e-5 on the dev set: here the first of them is the default for the small
sets and the last for the large ones (SST-2, QQP, MNLI, QNLI). It does not say what it took for CoNLL-2003. The primary
figures are those of its tables: F1 for MRPC and QQP, Spearman for STS-B, Matthews for CoLA.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from core_flax.types import UserError

Kind = Literal["classification", "regression", "choice", "span", "tagging"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "squad", "ner"]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what, by the names in its header.

    Attributes:
        id: used where the file has it; rows are numbered from 0 otherwise.
        needs_id: whether a file that lacks it is refused instead.
        headerless: the columns' names in files that have no header: those whose first row does not hold ``text``.
    """

    text: str
    text_pair: str | None = None
    label: str = "label"
    id: str | None = "index"
    needs_id: bool = False
    headerless: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSpec:
    """All that is particular to a task.

    Attributes:
        folder: its folder inside a GLUE folder; "": none.
        files: for each split, the file names that it goes by.
        columns: of a table of texts; SWAG, CoNLL and SQuAD have layouts of their own.
        labels: as the files write them; the place is the class. Empty for regression and spans.
        score_range: least and greatest score of a regression.
        metrics: what is reported; "squad" and "ner" stand for the figures of the official scorer.
        primary: the figure that checkpoints, seeds and recipes are compared by.
        labelled_splits: the splits whose files carry labels.
        torn_rows: what a row with too few or too many fields is: an error, or reported and left out, because the
            official file is known to have some.
        no_label: a label that says that annotators did not agree: the row is reported and left out.
        unanswerable: whether a question may have no answer.
        tfds_texts: names of the text fields in TensorFlow Datasets, where they are not those of the columns.
        epochs, learning_rate, batch_size, max_length: defaults of the recipe; max_length in tokens.
    """

    name: str
    kind: Kind
    folder: str
    files: Mapping[str, tuple[str, ...]]
    metrics: tuple[Metric, ...]
    primary: str
    columns: Columns | None = None
    labels: tuple[str, ...] = ()
    score_range: tuple[float, float] | None = None
    labelled_splits: tuple[str, ...] = ("train", "dev")
    torn_rows: Literal["error", "leave out"] = "error"
    no_label: str | None = None
    unanswerable: bool = False
    tfds_texts: tuple[str, ...] = ()
    epochs: int = 3
    learning_rate: float = 5e-5
    batch_size: int = 32
    max_length: int = 128


SUBMISSION_HEADER = ("index", "prediction")
"""First row of a GLUE submission; a prediction is a label as ``TaskSpec.labels`` writes it, or a score."""

_TSV = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
_SENTENCES = Columns("sentence1", "sentence2")
_YES_NO = ("entailment", "not_entailment")

COLA = TaskSpec(
    name="cola",
    kind="classification",
    folder="CoLA",
    files=_TSV,
    columns=Columns("sentence", headerless=("source", "label", "authors_mark", "sentence")),
    labels=("0", "1"),
    metrics=("matthews", "accuracy"),
    primary="matthews",
)

SST2 = TaskSpec(
    name="sst2",
    kind="classification",
    folder="SST-2",
    files=_TSV,
    columns=Columns("sentence"),
    labels=("0", "1"),
    metrics=("accuracy",),
    primary="accuracy",
    learning_rate=2e-5,
)

MRPC = TaskSpec(
    name="mrpc",
    kind="classification",
    folder="MRPC",
    files=_TSV,
    columns=Columns("#1 String", "#2 String", label="Quality"),
    labels=("0", "1"),
    metrics=("accuracy", "f1"),
    primary="f1",
    tfds_texts=("sentence1", "sentence2"),
)

STSB = TaskSpec(
    name="stsb",
    kind="regression",
    folder="STS-B",
    files=_TSV,
    columns=Columns("sentence1", "sentence2", label="score"),
    score_range=(0.0, 5.0),
    metrics=("pearson", "spearman"),
    primary="spearman",
)

QQP = TaskSpec(
    name="qqp",
    kind="classification",
    folder="QQP",
    files=_TSV,
    columns=Columns("question1", "question2", label="is_duplicate", id="id"),
    labels=("0", "1"),
    metrics=("accuracy", "f1"),
    primary="f1",
    torn_rows="leave out",
    learning_rate=2e-5,
)

MNLI = TaskSpec(
    name="mnli",
    kind="classification",
    folder="MNLI",
    files={
        "train": ("train.tsv",),
        "dev": ("dev_matched.tsv",),
        "dev_mismatched": ("dev_mismatched.tsv",),
        "test": ("test_matched.tsv",),
        "test_mismatched": ("test_mismatched.tsv",),
    },
    columns=Columns("sentence1", "sentence2", label="gold_label"),
    # The order of TensorFlow Datasets, of Hugging Face's GLUE and so of models from transformers' run_glue. BERT's own
    # code (and models like roberta-large-mnli) put contradiction first. Files have words: only weights depend on it.
    labels=("entailment", "neutral", "contradiction"),
    metrics=("accuracy",),
    primary="accuracy",
    labelled_splits=("train", "dev", "dev_mismatched"),
    no_label="-",
    tfds_texts=("premise", "hypothesis"),
    learning_rate=2e-5,
)

QNLI = TaskSpec(
    name="qnli",
    kind="classification",
    folder="QNLI",
    files=_TSV,
    columns=Columns("question", "sentence"),
    labels=_YES_NO,
    metrics=("accuracy",),
    primary="accuracy",
    learning_rate=2e-5,
)

RTE = TaskSpec(
    name="rte",
    kind="classification",
    folder="RTE",
    files=_TSV,
    columns=_SENTENCES,
    labels=_YES_NO,
    metrics=("accuracy",),
    primary="accuracy",
)

WNLI = TaskSpec(
    name="wnli",
    kind="classification",
    folder="WNLI",
    files=_TSV,
    columns=_SENTENCES,
    labels=("0", "1"),
    metrics=("accuracy",),
    primary="accuracy",
)

SQUAD = TaskSpec(
    name="squad",
    kind="span",
    folder="",
    files={"train": ("train-v1.1.json", "train.json"), "dev": ("dev-v1.1.json", "dev.json")},
    metrics=("squad",),
    primary="f1",
    max_length=384,
)

SQUAD2 = TaskSpec(
    name="squad2",
    kind="span",
    folder="",
    files={"train": ("train-v2.0.json", "train.json"), "dev": ("dev-v2.0.json", "dev.json")},
    metrics=("squad",),
    primary="f1",
    unanswerable=True,
    epochs=2,
    batch_size=48,
    max_length=384,
)

SWAG = TaskSpec(
    name="swag",
    kind="choice",
    folder="",
    files={"train": ("train.csv",), "dev": ("val.csv",), "test": ("test.csv",)},
    labels=("0", "1", "2", "3"),
    metrics=("accuracy",),
    primary="accuracy",
    learning_rate=2e-5,
    batch_size=16,
)

NER = TaskSpec(
    name="ner",
    kind="tagging",
    folder="",
    files={
        "train": ("eng.train", "train.txt"),
        "dev": ("eng.testa", "valid.txt"),
        "test": ("eng.testb", "test.txt"),
    },
    labels=("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"),
    metrics=("ner",),
    primary="f1",
    labelled_splits=("train", "dev", "test"),
)

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
"""The tasks of GLUE, in the order of its paper."""

TASKS: dict[str, TaskSpec] = {
    spec.name: spec for spec in (COLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE, WNLI, SQUAD, SQUAD2, SWAG, NER)
}


def custom_task(columns: str, labels: tuple[str, ...] = (), regression: bool = False) -> TaskSpec:
    """A task on tables with a header: ``train``, ``dev`` and ``test``, each ``.tsv`` (unquoted) or ``.csv`` (quoted).

    Args:
        columns: which column holds what, as in ``text=sentence,label=class``; also ``text_pair=`` and ``id=``.
        labels: of a classification; ``readers.find_labels`` finds them in the train file.
        regression: whether the label is a number to predict.

    Raises:
        UserError: ``columns`` is of another form, or lacks text or label.
    """
    dev = ("dev", "valid", "validation", "val")
    return TaskSpec(
        name="custom",
        kind="regression" if regression else "classification",
        folder="",
        files={split: _tables(*names) for split, names in (("train", ("train",)), ("dev", dev), ("test", ("test",)))},
        columns=_parse_columns(columns),
        labels=labels,
        metrics=("pearson", "spearman") if regression else ("accuracy",),
        primary="spearman" if regression else "accuracy",
    )


def _tables(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{ending}" for name in names for ending in ("tsv", "csv"))


def _parse_columns(columns: str) -> Columns:
    known = ("text", "text_pair", "label", "id")
    given: dict[str, str] = {}
    one_line = columns.replace("\n", " ").replace("\r", " ")
    # As a row of CSV: a name with a comma in it stands, with its role, in double quotes.
    for part in next(csv.reader([one_line], skipinitialspace=True)) or [""]:
        role, equals, name = (word.strip() for word in part.partition("="))
        role = role.replace("-", "_")
        if role not in known or not equals or not name or role in given:
            raise UserError(
                f"--columns {columns}: {part.strip()!r} is not one ROLE=COLUMN with a role out of {', '.join(known)}"
            )
        given[role] = name
    for role in ("text", "label"):
        if role not in given:
            raise UserError(f"--columns {columns} names no {role}; write it as in text=sentence,label=class")
    if given["label"] in (given["text"], given.get("text_pair")):
        raise UserError(f"--columns {columns}: column {given['label']!r} is both a text and the label to tell from it")
    return Columns(given["text"], given.get("text_pair"), given["label"], given.get("id"), needs_id="id" in given)
