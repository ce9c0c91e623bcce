"""Predictions against labels by the official metrics: in memory after an epoch, and from files, without a model.

Figures are per cent, as the papers print them; correlations, too, are times 100. ``total`` and ``missing`` are counts,
and the names ending in ``_thresh`` null odds.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_flax.finetune.conll import DOCUMENT_START
from bert_flax.finetune.examples import Dataset, QuestionExample, TaggedExample, summarize
from bert_flax.finetune.files import read_json, read_text
from bert_flax.finetune.readers import read_file
from bert_flax.finetune.tables import open_table, parse_label
from bert_flax.finetune.tasks import SUBMISSION_HEADER, TASKS, TaskSpec
from core_flax.cli import suggest
from core_flax.metrics import classification, squad, tagging
from core_flax.types import UserError

Scores = dict[str, float]

_CLASSIFICATION = {
    "accuracy": classification.accuracy,
    "f1": classification.f1,
    "matthews": classification.matthews,
    "pearson": classification.pearson,
    "spearman": classification.spearman,
}


def is_per_cent(name: str) -> bool:
    """Whether the figure of this name is one of quality, not a count or a threshold; ``dev/`` may stand before it."""
    return not re.search(r"(total|missing|thresh|threshold)$", name)


def label_scores(spec: TaskSpec, predictions: Sequence[float], labels: Sequence[float]) -> Scores:
    """The task's metrics over classes (places in ``spec.labels``), choices or regression's scores."""
    figures: Scores = {name: 100 * _CLASSIFICATION[name](predictions, labels) for name in spec.metrics}
    return figures | {"total": len(labels)}


def tag_scores(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> Scores:
    """Entity ``f1``, ``precision``, ``recall``, then ``f1_TYPE`` of each type; ``total`` entities in ``gold``."""
    by_type = tagging.entity_scores(gold, predicted)
    every = by_type.pop("all")
    figures = {"f1": 100 * every.f1, "precision": 100 * every.precision, "recall": 100 * every.recall}
    figures |= {f"f1_{kind}": 100 * scores.f1 for kind, scores in by_type.items()}
    return figures | {"total": every.num_gold}


def answer_scores(
    spec: TaskSpec,
    examples: Iterable[QuestionExample],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> Scores:
    """SQuAD's figures, of version 1.1 or 2.0 as the task is; see ``core_flax.metrics.squad`` for their names."""
    answers = {example.id: [answer.text for answer in example.answers] for example in examples}
    if spec.unanswerable:
        return squad.evaluate_v2(answers, predictions, null_odds, threshold)
    return squad.evaluate_v1(answers, predictions)


def score(task: str, predictions: Path, data: Path, null_odds: Path | None = None) -> Scores:
    """Scores a file of predictions for one of the known tasks. See ``score_file``."""
    return score_file(_find_task(task), predictions, data, null_odds)[0]


def print_scores(
    task: str, predictions: Path, data: Path, null_odds: Path | None = None, threshold: float | None = None
) -> None:
    """Prints what ``score_file`` finds, as a table, after what is to be said about the files."""
    figures, notes = score_file(_find_task(task), predictions, data, null_odds, threshold)
    print("".join(f"{note}\n" for note in notes), end="")
    print(table(task, figures))


def table(task: str, figures: Mapping[str, float]) -> str:
    """One line for each figure."""
    width = max(len(task), *map(len, figures))
    lines = [f"{task:<{width}}  {'per cent':>10}"]
    for name, value in figures.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if name.endswith("thresh") else f"{value:.2f}"
        lines.append(f"{name:<{width}}  {text:>10}")
    return "\n".join(lines)


def score_file(
    spec: TaskSpec,
    predictions: Path,
    data: Path,
    null_odds: Path | None = None,
    threshold: float | None = None,
) -> tuple[Scores, Sequence[str]]:
    """Scores a file of predictions, whoever made it.

    Args:
        spec: the task.
        predictions: for a classification, regression or choice a table with the columns ``index`` and ``prediction``
            (GLUE's submission: a label as the task's files write it, or a number), tabs between them or, in a file
            called ``.csv``, commas; for ``ner`` words in the first of several columns and the predicted tag in the
            last; for SQuAD a JSON object of texts by question.
        data: the task's file with the labels.
        null_odds: for SQuAD 2.0, a JSON object of numbers by question, to find the best thresholds.
        threshold: questions with larger null odds count as said to have no answer; None: predictions as they are.

    Returns:
        The figures, and a line for everything that was left out or is odd.

    Raises:
        UserError: something in a file is wrong, or the two do not belong together (the file and the row are named).
    """
    if null_odds is not None and not spec.unanswerable:
        raise UserError(f"--null-odds {null_odds}: task {spec.name} has no unanswerable questions; only squad2 has")
    if threshold is not None and null_odds is None:
        raise UserError(f"--null-threshold {threshold:g} goes with --null-odds FILE")
    dataset = read_file(spec, data, labelled=True)
    notes = [f"{data}: left out {len(dataset.dropped):,}: {summarize(dataset.dropped)}"] if dataset.dropped else []
    notes += [f"{data}: {len(dataset.warnings):,} odd: {summarize(dataset.warnings)}"] if dataset.warnings else []
    match spec.kind:
        case "span":
            figures, missing = _score_answers(spec, predictions, dataset, data, null_odds, threshold)
            return figures, notes + missing
        case "tagging":
            found = read_file(spec, predictions, labelled=True)
            _check_words(dataset.examples, data, found.examples, predictions)
            figures = tag_scores(*([example.tags for example in part.examples] for part in (dataset, found)))
        case _:
            labels = [example.label for example in dataset.examples]
            figures = label_scores(spec, _read_labels(spec, predictions, dataset, data), labels)
    return figures, notes


def _find_task(name: str) -> TaskSpec:
    if name == "custom":
        raise UserError(
            "task custom has no columns and labels by which to score; bert-flax finetune custom measures it on its dev "
            "file (results.json), and a task with a name can be scored (docs/finetune.md)"
        )
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{suggest(name, TASKS)}; tasks are {', '.join(TASKS)}")
    return TASKS[name]


def _read_labels(spec: TaskSpec, path: Path, dataset: Dataset[Any], data: Path) -> list[float]:
    """The prediction for each example, in the data's order."""
    header = open_table(path, SUBMISSION_HEADER[1])
    own_id, prediction = map(header.place, SUBMISSION_HEADER)
    wanted = _by_id(dataset, data)
    any_number = replace(spec, score_range=None)  # a model may well say 5.02 where labels end at 5
    found: dict[str, float] = {}
    strangers = []
    for line, fields in header.rows:
        where = f"{path}:{line}"
        if torn := header.torn(line, fields):
            raise UserError(f"{torn}; mend the row")
        if fields[own_id] in found:
            raise UserError(f"{where}: index {fields[own_id]!r} comes twice")
        if fields[own_id] not in wanted:
            strangers.append(f"{where} index {fields[own_id]!r}")
        found[fields[own_id]] = parse_label(any_number, fields[prediction], where)
    _refuse(strangers, dataset, data)
    if missing := [repr(key) for key in wanted if key not in found]:
        raise UserError(f"{path} has no prediction for {len(missing):,} of {len(wanted):,} rows: index {_few(missing)}")
    return [found[key] for key in wanted]


def _score_answers(
    spec: TaskSpec,
    path: Path,
    dataset: Dataset[QuestionExample],
    data: Path,
    null_odds: Path | None,
    threshold: float | None,
) -> tuple[Scores, list[str]]:
    """The figures, and a line if predictions are missing: these count as wrong, as in the official script."""
    wanted = _by_id(dataset, data)
    predictions = _read_json(path, str, "a text")
    odds = None if null_odds is None else _read_json(null_odds, float, "a number")
    for file, stored in ((path, predictions), (null_odds, odds or {})):
        _refuse([f"{file} question {key}" for key in stored if key not in wanted], dataset, data)
    if odds is not None and (missing := [key for key in wanted if key not in odds]):
        raise UserError(f"{null_odds} has no number for {len(missing):,} of {len(wanted):,} questions: {_few(missing)}")
    missing = [key for key in wanted if key not in predictions]
    if len(missing) == len(wanted):
        raise UserError(f"{path} predicts none of the {len(wanted):,} questions in {data}")
    notes = [f"{path} has no prediction for {len(missing):,} questions, which count as wrong: {_few(missing)}"]
    return answer_scores(spec, dataset.examples, predictions, odds, threshold), notes if missing else []


def _read_json(path: Path, kind: type, what: str) -> dict[str, Any]:
    """An object whose keys are questions and whose values are texts or finite numbers."""
    stored = read_json(path, lambda pairs: _once(pairs, path))
    if not isinstance(stored, dict):
        raise UserError(f"{path} is not a JSON object of {what} by question")
    for key, value in stored.items():
        # Compared, because math.isfinite fails on whole numbers that no float holds.
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not (number if kind is float else isinstance(value, kind)):
            raise UserError(f"{path} question {key}: {json.dumps(value)[:40]} is not {what}")
    return stored


def _once(pairs: Sequence[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"{path} question {next(key for key in found if keys.count(key) > 1)} comes twice")
    return found


def _refuse(strangers: Sequence[str], dataset: Dataset[Any], data: Path) -> None:
    """No prediction may be left over. Yet what the reader leaves out for its label or answers, a model predicts."""
    if len(strangers) > len(dataset.dropped):
        others = f" (nor are {len(strangers) - 1:,} more)" if len(strangers) > 1 else ""
        raise UserError(f"{strangers[0]} is not in {data}{others}; give the file that was predicted")


def _by_id(dataset: Dataset[Any], data: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for example in dataset.examples:
        if example.id in found:
            raise UserError(f"{data}: {example.id!r} comes twice; predictions are told apart by it")
        found[example.id] = example
    return found


def _check_words(gold: Sequence[TaggedExample], data: Path, found: Sequence[TaggedExample], path: Path) -> None:
    """That both files hold the same sentences."""
    rows = [[(word, place == 0) for each in side for place, word in enumerate(each.words)] for side in (gold, found)]
    for number, (right, other) in enumerate(itertools.zip_longest(*rows)):
        if right == other:
            continue
        if right is None or other is None:
            raise UserError(f"{path} has {len(rows[1]):,} words, {data} {len(rows[0]):,}")
        lines = f"{path}:{_word_line(path, number)}", f"{data}:{_word_line(data, number)}"
        if right[0] != other[0]:
            raise UserError(f"{lines[0]}: the word is {other[0]!r}, at {lines[1]} it is {right[0]!r}")
        first, second = lines if other[1] else lines[::-1]
        raise UserError(f"{first}: a sentence begins here, but not at {second}")


def _word_line(path: Path, number: int) -> int:
    """The line of a file in columns that holds its n-th word."""
    rows = ((line, row.strip(" \t\r")) for line, row in enumerate(read_text(path).split("\n"), 1))
    lines = (line for line, row in rows if row and not row.startswith(DOCUMENT_START))
    return next(itertools.islice(lines, number, None))


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3:,} more" if len(keys) > 3 else "")
