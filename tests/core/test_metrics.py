import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from core_flax.metrics import classification


def random_labels(seed, num_classes, size=200):
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=size)
    return np.where(rng.random(size) < 0.6, labels, rng.integers(num_classes, size=size)), labels


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_class_metrics_are_those_of_scikit_learn(seed, num_classes):
    predictions, labels = random_labels(seed, num_classes)
    assert classification.accuracy(predictions, labels) == sklearn.metrics.accuracy_score(labels, predictions)
    assert classification.matthews(predictions, labels) == pytest.approx(
        sklearn.metrics.matthews_corrcoef(labels, predictions), abs=1e-12
    )
    assert classification.macro_f1(predictions, labels) == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="macro"), abs=1e-12
    )
    for positive in range(num_classes):
        assert classification.f1(predictions, labels, positive) == pytest.approx(
            sklearn.metrics.f1_score(labels == positive, predictions == positive), abs=1e-12
        )


def test_f1_is_of_class_one():
    """Two right of three predicted, two right of four there are: by hand."""
    predictions, labels = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0, 0]
    assert classification.f1(predictions, labels) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert classification.f1(predictions, labels) != classification.f1(predictions, labels, positive=0)
    assert classification.accuracy(predictions, labels) == pytest.approx(5 / 8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_correlations_are_those_of_scipy(seed, decimals):
    """Few decimals make ties, which share the mean of their ranks."""
    rng = np.random.default_rng(seed)
    labels = np.round(rng.uniform(0, 5, 100), decimals)
    predictions = np.round(labels + rng.normal(0, 1, 100), decimals).astype(np.float32)
    exact = predictions.astype(np.float64)
    assert classification.pearson(predictions, labels) == pytest.approx(scipy.stats.pearsonr(exact, labels)[0], 1e-12)
    assert classification.spearman(predictions, labels) == pytest.approx(scipy.stats.spearmanr(exact, labels)[0], 1e-12)


def test_correlations_by_hand():
    assert classification.pearson([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert classification.pearson([3, 1], [0.5, 0.7]) == pytest.approx(-1)
    assert classification.spearman([1, 2, 300], [1, 4, 5]) == pytest.approx(1)
    # Ranks 1.5 1.5 3 4 and 1 2 3 4.
    assert classification.spearman([0, 0, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_a_correlation_does_not_depend_on_scale_and_offset():
    rng = np.random.default_rng(0)
    predictions, labels = rng.normal(size=(2, 50))
    expected = classification.pearson(predictions, labels)
    for scale, offset in ((1e200, 0), (1e-200, 0), (1, 1e6), (-3, 5)):
        found = classification.pearson(predictions * scale + offset, labels)
        assert found == pytest.approx(np.sign(scale) * expected, rel=1e-8)


def test_degenerate_predictions_have_defined_scores():
    """As scikit-learn has them, without its warnings; correlations, which are nan there, are 0."""
    for constant in (0, 1):
        predictions, labels = np.full(4, constant), np.array([0, 1, 1, 1])
        assert classification.matthews(predictions, labels) == sklearn.metrics.matthews_corrcoef(labels, predictions)
        assert classification.matthews(labels, predictions) == 0
    assert classification.matthews([1, 1], [1, 1]) == 0
    assert classification.f1([0, 0, 0], [0, 1, 1]) == 0
    assert classification.f1([0, 0], [0, 0]) == 0
    assert classification.macro_f1([2, 2], [2, 2]) == 1
    for metric in (classification.pearson, classification.spearman):
        assert metric([0.1] * 7, np.arange(7)) == 0
        assert metric(np.arange(7), np.full(7, 0.1, np.float32)) == 0
        assert metric([2.5], [1.0]) == 0
    assert classification.accuracy([3], [3]) == 1


@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"])
@pytest.mark.parametrize(
    ("predictions", "labels"), [([], []), ([1, 0], [1]), ([[1], [0]], [[1], [1]]), ([np.nan, 1], [0, 1])]
)
def test_what_cannot_be_scored_is_not(name, predictions, labels):
    with pytest.raises(AssertionError):
        getattr(classification, name)(predictions, labels)


def test_no_jax_is_imported():
    modules = "core_flax.metrics.classification, core_flax.metrics.squad, core_flax.metrics.tagging"
    script = f"import sys, {modules}; print({{'jax', 'flax'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
