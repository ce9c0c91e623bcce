"""What finetune_quality.py compares: the tasks of each report, their data, the recipe both sides train by, and recipes
of ours that are tried besides.

Data is taken from a folder with glue, glue_subset, conll2003, squad and tydiqa_en, in their official layouts. Where a
task's is a part of it, or is put together, the part is fixed here, and both sides read the files that are made of it.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SST2_ROWS, SST2_EVERY = 8000, 8
"""Of SST-2's 67,349 training rows the 1st, the 9th, the 17th and so on are taken, until there are 8,000."""
SCORED_ARTICLES = (3, 8, 13, 18, 23, 28, 33, 38, 43, 47)
"""Of the 48 articles in SQuAD's dev-v1.1.json those (from 0) that are scored; the others are trained on."""

Words = dict[str, str | None]
"""Options of ``bert-flax finetune`` and their values; None: a flag."""


@dataclass(frozen=True)
class Task:
    """One task, by our name for it.

    Attributes:
      name: for bert-flax finetune.
      torch: for finetune_torch.py.
      metrics: our names of its figures and theirs; recipes are ranked by the last.
      data: (folder of all data, folder for what is made of it) -> the folder to give to --data.
    """

    name: str
    torch: str
    metrics: Mapping[str, str]
    data: Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Recipe:
    """Options that replace, or come on top of, those that both sides share.

    Attributes:
      options: of bert-flax finetune.
      after_mnli: whether the encoder is first trained on 8,999 rows of MNLI (see MNLI_OPTIONS).
      tasks: names of those that it is tried on; empty: all of the report.
    """

    options: Words
    after_mnli: bool = False
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """One report.

    Attributes:
      title: its heading.
      tasks: what is compared.
      options: the recipe that both sides share. Learning rate, epochs and the length are told to finetune_torch.py, or
        are its own; the rest is its constants.
      better: recipes of ours alone.
      about: sentences on the data.
      grouped: whether finetune_torch.py makes its batches of rows of like length, as ours are.
    """

    title: str
    tasks: tuple[Task, ...]
    options: Words
    better: tuple[Recipe, ...] = ()
    about: str = ""
    grouped: bool = False


def shared(learning_rate: str = "5e-5", epochs: int = 3, length: int = 128) -> Words:
    """The recipe of finetune_torch.py in our options."""
    return {
        "--train.batch-size": "32",
        "--optimizer.learning-rate": learning_rate,
        "--optimizer.weight-decay": "0.01",
        "--epochs": str(epochs),
        "--warmup-share": "0.1",
        "--inputs.max-length": str(length),
        "--dropout": "0.1",
        "--attention-dropout": "0.1",
    }


def steps(learning_rate: str, epochs: int, batch_size: int = 32) -> Words:
    """What recipes mostly differ in."""
    return {
        "--train.batch-size": str(batch_size),
        "--optimizer.learning-rate": learning_rate,
        "--epochs": str(epochs),
    }


def glue(data: Path, home: Path) -> Path:
    """All of GLUE, as it is."""
    return data / "glue"


def conll(data: Path, home: Path) -> Path:
    """CoNLL-2003, as it is."""
    return data / "conll2003"


def sst2(data: Path, home: Path) -> Path:
    """SST-2 with fewer training rows."""
    folder = home / "SST-2"
    folder.mkdir(parents=True, exist_ok=True)
    header, *rows = (data / "glue" / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.tsv").write_text("".join([header, *rows[::SST2_EVERY][:SST2_ROWS]]), encoding="utf-8")
    shutil.copy(data / "glue" / "SST-2" / "dev.tsv", folder)
    return home


def mnli(data: Path, home: Path) -> Path:
    """MNLI's sample of 8,999 training rows, and its matched dev set."""
    folder = home / "MNLI"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(data / "glue_subset" / "MNLI" / "train.tsv", folder)
    shutil.copy(data / "glue" / "MNLI" / "dev_matched.tsv", folder)
    return home


def squad(data: Path, home: Path) -> Path:
    """TyDi QA's English training set with most of SQuAD's dev set to train on, the rest of the latter to score."""
    folder = home / "squad"
    folder.mkdir(parents=True, exist_ok=True)
    tydi = _articles(data / "tydiqa_en" / "tydiqa.goldp.en.train.json")
    articles = _articles(data / "squad" / "dev-v1.1.json")
    rest = [article for place, article in enumerate(articles) if place not in SCORED_ARTICLES]
    scored = [articles[place] for place in SCORED_ARTICLES]
    for name, held in (("train-v1.1.json", [*tydi, *rest]), ("dev-v1.1.json", scored)):
        (folder / name).write_text(json.dumps({"version": "1.1", "data": held}), encoding="utf-8")
    return folder


def _articles(path: Path) -> list[Any]:
    return json.loads(path.read_text(encoding="utf-8"))["data"]


MNLI = Task("mnli", "", {"accuracy": ""}, mnli)
MNLI_OPTIONS = shared("1e-4")
"""How an encoder is trained on MNLI first, once, with seed 0."""

STUDIES = {
    "glue": Study(
        "GLUE",
        (
            Task("mrpc", "mrpc", {"accuracy": "accuracy", "f1": "f1"}, glue),
            Task("rte", "rte", {"accuracy": "accuracy"}, glue),
            Task("cola", "cola", {"matthews": "mcc"}, glue),
            Task("stsb", "stsb", {"pearson": "pearson", "spearman": "spearman"}, glue),
        ),
        shared(),
        (
            Recipe(steps("1e-4", 5), tasks=("cola",)),
            Recipe(steps("1e-4", 4), tasks=("stsb",)),
            Recipe(steps("1e-4", 5), after_mnli=True, tasks=("mrpc", "rte")),
        ),
    ),
    "sst2": Study(
        f"SST-2 on {SST2_ROWS:,} training rows",
        (Task("sst2", "sst2", {"accuracy": "accuracy"}, sst2),),
        shared(),
        (Recipe(steps("1e-4", 3)),),
        f"Trained on every {SST2_EVERY}th row from the first on, {SST2_ROWS:,} in all.",
    ),
    "ner": Study(
        "CoNLL-2003",
        (Task("ner", "ner", {"f1": "f1"}, conll),),
        shared("2e-4", 3),
        (
            Recipe(steps("4e-4", 8)),
            Recipe(steps("3e-4", 5) | {"--inputs.max-length": "64", "--inputs.document-context": None}),
        ),
        "Entity F1 on eng.testa. The vocabulary of the weights is lower-cased, which costs names their capitals.",
    ),
    "squad": Study(
        "Answers to questions",
        (Task("squad", "qa", {"exact": "exact_match", "f1": "f1"}, squad),),
        shared("1e-4", 2, 384),
        (Recipe(steps("2e-4", 3)),),
        "Trained on TyDi QA's English training questions and 38 of the 48 articles of SQuAD's dev-v1.1.json, scored on "
        f"the other 10 (places {', '.join(map(str, SCORED_ARTICLES))}, from 0). Windows over long contexts start 128 "
        "tokens apart on both sides, and batches are made of rows of like length on both (theirs: --group-by-length).",
        grouped=True,
    ),
}
