"""SQuAD's exact match and F1, as the official scripts compute them (arXiv 1606.05250 and 1806.03822).

Differences are spelled out where they are; on complete predictions every figure is the official one.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

Answers = Mapping[str, Sequence[str]]
"""Question id -> the texts of its gold answers; none where the question has no answer (SQuAD 2.0)."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, one space between words."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if both are the same after normalisation, else 0."""
    return float(normalize(prediction) == normalize(gold))


def word_f1(prediction: str, gold: str) -> float:
    """F1 over the words of both, counted as often as they occur; 0 if no word is shared, also when both are empty."""
    predicted, actual = normalize(prediction).split(), normalize(gold).split()
    shared = (Counter(predicted) & Counter(actual)).total()
    return 2 * shared / (len(predicted) + len(actual)) if shared else 0.0


def evaluate_v1(answers: Answers, predictions: Mapping[str, str]) -> dict[str, float]:
    """SQuAD v1.1: the best exact match and F1 over each question's gold answers, averaged.

    Returns:
        ``exact`` and ``f1`` in per cent, ``total`` questions, ``missing`` ones: those without a prediction, which
        count as wrong.
    """
    assert answers, "no questions"
    exact = {key: _best(exact_match, predictions.get(key), golds) for key, golds in answers.items()}
    f1 = {key: _best(word_f1, predictions.get(key), golds) for key, golds in answers.items()}
    return _means(exact, f1, answers) | {"missing": _num_missing(answers, predictions)}


def evaluate_v2(
    answers: Answers,
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> dict[str, float]:
    """SQuAD 2.0: as v1.1, with "" the right prediction for a question that has no answer.

    Args:
        answers: gold answers by question; of an answer's texts those of nothing but articles and punctuation are left
            out, and if there is no other, "" is right.
        predictions: text by question.
        null_odds: by question, how sure the model is that there is no answer: a probability or any other number
            that grows with it. With it the best thresholds are looked for.
        threshold: a question with larger null odds counts as predicted to have no answer, whatever its prediction;
            None: predictions count as they are. (The official script takes 1 unless told otherwise, which is right
            for probabilities alone.)

    Returns:
        ``exact`` and ``f1`` in per cent, ``total`` and ``missing`` as for v1.1 (the official script leaves missing ones
        out of the mean instead); the first three also over the questions with an answer (``HasAns_exact`` ...) and
        without (``NoAns_exact`` ...) where there are such; with ``null_odds`` also ``best_exact``,
        ``best_exact_thresh``, ``best_f1``, ``best_f1_thresh``.
    """
    assert answers, "no questions"
    exact: dict[str, float] = {}
    f1: dict[str, float] = {}
    for key, texts in answers.items():
        golds, prediction = [text for text in texts if normalize(text)], predictions.get(key)
        exact[key] = _best(exact_match, prediction, golds or [""])
        f1[key] = _best(word_f1, prediction, golds) if golds else exact[key]
    best = {}
    if null_odds is not None:
        best = _best_thresholds(answers, predictions, null_odds, {"exact": exact, "f1": f1})
    if null_odds is not None and threshold is not None:
        unanswered = {key: float(not texts) for key, texts in answers.items() if null_odds[key] > threshold}
        exact, f1 = exact | unanswered, f1 | unanswered
    scores = _means(exact, f1, answers) | {"missing": _num_missing(answers, predictions)}
    groups = {
        "HasAns": [key for key, texts in answers.items() if texts],
        "NoAns": [key for key, texts in answers.items() if not texts],
    }
    for prefix, keys in groups.items():
        if keys:
            scores |= {f"{prefix}_{name}": value for name, value in _means(exact, f1, keys).items()}
    return scores | best


def _best(metric: Callable[[str, str], float], prediction: str | None, golds: Sequence[str]) -> float:
    return 0.0 if prediction is None else max((metric(prediction, gold) for gold in golds), default=0.0)


def _num_missing(answers: Answers, predictions: Mapping[str, str]) -> int:
    return sum(key not in predictions for key in answers)


def _means(exact: Mapping[str, float], f1: Mapping[str, float], keys: Collection[str]) -> dict[str, float]:
    exact_sum, f1_sum = sum(exact[key] for key in keys), sum(f1[key] for key in keys)
    return {"exact": 100 * exact_sum / len(keys), "f1": 100 * f1_sum / len(keys), "total": len(keys)}


def _best_thresholds(
    answers: Answers,
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    scores: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """Best mean score over all thresholds, and the threshold, for each of ``scores``.

    Questions are answered one after another, the surest first, beginning with none answered. As in the official script
    each step is a candidate, though no threshold parts two questions with the same odds.
    """
    order = sorted((key for key in null_odds if key in answers), key=null_odds.__getitem__)
    # At this one nothing is answered. The official script takes 0 for it always, which is wrong for log odds.
    lowest = null_odds[order[0]]
    below_all = 0.0 if lowest > 0 else lowest - 1.0
    best = {}
    for name, values in scores.items():
        total = sum(not texts for texts in answers.values())
        best_total, best_threshold = float(total), below_all
        for key in order:
            if answers[key]:
                total += values[key]
            elif predictions.get(key):
                total -= 1
            if total > best_total:
                best_total, best_threshold = total, null_odds[key]
        best |= {f"best_{name}": 100 * best_total / len(answers), f"best_{name}_thresh": best_threshold}
    return best
