"""From what the model says of packed units to predictions for examples, in the order of the file."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bert_flax.finetune.config import FinetuneInputs
from bert_flax.finetune.inputs import Units
from bert_flax.finetune.score import Scores, answer_scores, label_scores, tag_scores
from bert_flax.finetune.spans import RankedAnswers, WindowLogits, best_answers, null_odds, predictions
from bert_flax.finetune.tasks import TaskSpec
from core_flax.task import Outputs
from core_flax.types import Batch

Told = Sequence[tuple[Batch, Outputs]]
"""Batches of ``PackedUnits.in_order`` with the model's ``scores``."""


@dataclass(frozen=True)
class Predictions:
    """What is predicted of each example.

    Attributes:
      values: of each example its class, its score, its tags, or its answer (a question's).
      probabilities: of each example over the classes or choices; empty for other kinds.
      answers: by question, for spans.
      null_threshold: null odds above which a question is said to have no answer; None: every question has one.
    """

    values: list[Any]
    probabilities: list[np.ndarray] = field(default_factory=list)
    answers: dict[str, RankedAnswers] = field(default_factory=dict)
    null_threshold: float | None = None


def predict(
    spec: TaskSpec,
    examples: Sequence[Any],
    units: Units,
    told: Told,
    inputs: FinetuneInputs,
    null_threshold: float | None = None,
) -> Predictions:
    """Predictions for the examples that ``units`` were made of.

    Args:
      spec: the task.
      examples: in order.
      units: of these examples, every one of which is in ``told`` once.
      told: what the model says.
      inputs: length of the longest answer, number of candidates.
      null_threshold: see Predictions.
    """
    match spec.kind:
        case "span":
            answers = _answers(examples, units, told, inputs)
            chosen = predictions(answers, null_threshold)
            return Predictions([chosen[example.id] for example in examples], [], answers, null_threshold)
        case "tagging":
            return Predictions(_tags(spec, examples, units, told))
        case "regression":
            return Predictions([float(scores[0, 0]) for scores in _unit_scores(units, told)])
        case _:
            scores_UO = _unit_scores(units, told).reshape(units.num_units, -1).astype(np.float64)
            weights_UO = np.exp(scores_UO - scores_UO.max(axis=1, keepdims=True))
            shares = weights_UO / weights_UO.sum(axis=1, keepdims=True)
            return Predictions(scores_UO.argmax(axis=1).tolist(), list(shares))


def score(spec: TaskSpec, examples: Sequence[Any], found: Predictions) -> Scores:
    """The official metrics; for SQuAD 2.0 at the threshold of null odds that is best on these examples."""
    match spec.kind:
        case "span":
            if not spec.unanswerable:
                return answer_scores(spec, examples, _by_question(examples, found))
            odds = null_odds(found.answers)
            best = answer_scores(spec, examples, predictions(found.answers), odds)
            threshold = _between(best["best_f1_thresh"], odds.values())
            chosen = predictions(found.answers, threshold)
            return {**answer_scores(spec, examples, chosen), "null_threshold": threshold}
        case "tagging":
            return tag_scores([example.tags for example in examples], found.values)
        case _:
            return label_scores(spec, found.values, [example.label for example in examples])


def _between(threshold: float, odds: Iterable[float]) -> float:
    """A threshold that parts the same questions, but lies between two.

    The best one is the odds of a question itself, on whose answer the rounding of another program would decide.
    """
    above = [each for each in odds if each > threshold]
    return (threshold + min(above)) / 2 if above else threshold + 1


def _by_question(examples: Sequence[Any], found: Predictions) -> dict[str, str]:
    return {example.id: value for example, value in zip(examples, found.values, strict=True)}


def _unit_scores(units: Units, told: Told) -> np.ndarray:
    """float32 [U, C, O]: each unit's scores."""
    scores_UCO = None
    seen_U = np.zeros(units.num_units, np.int64)
    for batch, outputs in told:
        rows, slots = np.nonzero(np.asarray(batch["units"]) >= 0)
        numbers = batch["units"][rows, slots]
        found = outputs["scores"][rows, slots]
        if scores_UCO is None:
            scores_UCO = np.zeros((units.num_units, *found.shape[1:]), np.float32)
        scores_UCO[numbers] = found
        np.add.at(seen_U, numbers, 1)
    assert scores_UCO is not None and (seen_U == 1).all(), "a unit was evaluated not once"
    return scores_UCO


def _token_scores(units: Units, told: Told) -> Iterator[tuple[int, np.ndarray]]:
    """Each unit's number with float32 [length, O], the scores of its tokens, in the order of the batches."""
    for batch, outputs in told:
        for row, slot in zip(*np.nonzero(np.asarray(batch["units"]) >= 0), strict=True):
            number, start = int(batch["units"][row, slot]), int(batch["first_tokens"][row, slot, 0])
            yield number, outputs["scores"][row, start : start + len(units.tokens[number])]


def _tags(spec: TaskSpec, examples: Sequence[Any], units: Units, told: Told) -> list[list[str]]:
    tags: list[list[str]] = [[""] * len(example.words) for example in examples]
    for number, scores_LO in _token_scores(units, told):
        classes_L = scores_LO.argmax(axis=1)
        for word, token in units.words[number]:
            tags[units.example[number]][word] = spec.labels[int(classes_L[token])]
    assert all(all(sentence) for sentence in tags), "a word was not tagged"
    return tags


def _answers(examples: Sequence[Any], units: Units, told: Told, inputs: FinetuneInputs) -> dict[str, RankedAnswers]:
    windows: list[list[WindowLogits]] = [[] for _ in examples]
    for number, scores_L2 in sorted(_token_scores(units, told), key=lambda pair: pair[0]):
        begin, window = units.num_first[number], units.windows[number]
        context_M2 = scores_L2[begin : begin + window.stop - window.start]
        null = float(scores_L2[0].sum())
        windows[units.example[number]].append(WindowLogits(window, context_M2[:, 0], context_M2[:, 1], null))
    return {
        example.id: best_answers(context, logits, inputs.n_best, inputs.max_answer_tokens)
        for example, context, logits in zip(examples, units.contexts, windows, strict=True)
    }
