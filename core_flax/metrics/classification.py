"""Accuracy, F1, Matthews, Pearson and Spearman correlation, as GLUE defines them (arXiv 1804.07461, section 3).

Each takes predictions and labels of equal length [B], at least one, and returns a fraction (not per cent).
"""

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions that equal their label."""
    predictions_B, labels_B = _pair(predictions, labels)
    return float(np.mean(predictions_B == labels_B))


def f1(predictions: ArrayLike, labels: ArrayLike, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of the class ``positive``; 0 if no prediction of it is right."""
    predictions_B, labels_B = _pair(predictions, labels)
    predicted_B, actual_B = predictions_B == positive, labels_B == positive
    hits = np.sum(predicted_B & actual_B)
    return float(2 * hits / (predicted_B.sum() + actual_B.sum())) if hits else 0.0


def macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of every class's F1, over the classes that occur among predictions or labels."""
    predictions_B, labels_B = _pair(predictions, labels)
    return float(np.mean([f1(predictions_B, labels_B, number) for number in np.union1d(predictions_B, labels_B)]))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews correlation over any number of classes (Gorodkin 2004); 0 if either side has one class only."""
    predictions_B, labels_B = _pair(predictions, labels)
    _, numbers = np.unique(np.concatenate([predictions_B, labels_B]), return_inverse=True)
    table_CC = np.zeros((numbers.max() + 1,) * 2)
    np.add.at(table_CC, (numbers[: len(predictions_B)], numbers[len(predictions_B) :]), 1)
    predicted_C, actual_C, total = table_CC.sum(1), table_CC.sum(0), len(predictions_B)
    spread = (total**2 - predicted_C @ predicted_C) * (total**2 - actual_C @ actual_C)
    return float((table_CC.trace() * total - predicted_C @ actual_C) / np.sqrt(spread)) if spread else 0.0


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Linear correlation of two series; 0 if either is constant, where it is not defined.

    0 rather than nan: a model that always says the same has learned nothing, and its runs must still be comparable.
    """
    predictions_B, labels_B = (series_B.astype(np.float64) for series_B in _pair(predictions, labels))
    # The mean of equal values may be rounded and so leave a trace of spread: what is looked for is that all are equal.
    if np.ptp(predictions_B) == 0 or np.ptp(labels_B) == 0:
        return 0.0
    return float(np.clip(_unit(predictions_B) @ _unit(labels_B), -1, 1))


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks. 0 if either series is constant."""
    predictions_B, labels_B = _pair(predictions, labels)
    return pearson(_ranks(predictions_B), _ranks(labels_B))


def _unit(series_B: np.ndarray) -> np.ndarray:
    """The series about its mean, at length 1. Scaled first, so that squares neither overflow nor vanish."""
    deviation_B = series_B - series_B.mean()
    deviation_B /= np.abs(deviation_B).max()
    return deviation_B / np.sqrt(deviation_B @ deviation_B)


def _ranks(values_B: np.ndarray) -> np.ndarray:
    _, numbers_B, counts = np.unique(values_B, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[numbers_B]


def _pair(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predictions_B, labels_B = np.asarray(predictions), np.asarray(labels)
    assert predictions_B.ndim == 1 and predictions_B.shape == labels_B.shape, (predictions_B.shape, labels_B.shape)
    assert predictions_B.size, "a metric of no examples"
    assert np.isfinite(predictions_B).all() and np.isfinite(labels_B).all(), "a prediction or label is not finite"
    return predictions_B, labels_B
