import random
import string

import pytest

from core_flax.metrics.squad import evaluate_v1, evaluate_v2, exact_match, normalize, word_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's\tpaw!", "cats paw"),
        ("a an the", ""),
        ("theme Anna, A.", "theme anna"),
        ("the-end", "theend"),
        ("U.S. $5.2 million", "us 52 million"),
        ("  10–12 «Été» ", "10–12 «été»"),  # noqa: RUF001
        ("thе the", "thе"),  # noqa: RUF001
        ("no\u00a0break\u2003space\n", "no break space"),
        ("", ""),
    ],
)
def test_normalisation(text, normal):
    """Case, ASCII punctuation, articles, white space, in this order; other punctuation stays. Worked out by hand."""
    assert normalize(text) == normal


def test_only_ascii_punctuation_goes():
    gone = {character for character in map(chr, range(33, 0x2070)) if not normalize(character).strip()}
    spaces = {character for character in map(chr, range(33, 0x2070)) if character.isspace()}
    assert gone == {*string.punctuation, "a", "A", *spaces}


def test_one_answer():
    assert exact_match("The cat.", "cat") == 1
    assert exact_match("cats", "cat") == 0
    # Shared: big, cat (once); 2 of 3 predicted words, 2 of 4 gold ones.
    assert word_f1("big cat, dog", "a big, big cat sat") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert word_f1("x x y", "x y y") == pytest.approx(2 / 3)
    assert word_f1("x x y", "x x z") == pytest.approx(2 / 3)
    assert word_f1("left", "right") == 0
    assert word_f1("the", "") == 0


ANSWERS = {
    "q1": ["Denver Broncos", "the Broncos", "Broncos"],
    "q2": ["in the year 1996"],
    "q3": ["gold"],
    "q4": ["a 1", "two"],
}


def test_version_1_takes_the_best_answer_and_the_mean():
    scores = evaluate_v1(ANSWERS, {"q1": "Broncos!", "q2": "1996", "q3": "silver", "q4": "the 1"})
    assert scores == pytest.approx({"exact": 50, "f1": 100 * (1 + 0.5 + 0 + 1) / 4, "total": 4, "missing": 0})


def test_a_missing_prediction_is_wrong_and_reported():
    scores = evaluate_v1(ANSWERS, {"q1": "Broncos!", "other": "Broncos"})
    assert scores == pytest.approx({"exact": 25, "f1": 25, "total": 4, "missing": 1 + 2})
    scores = evaluate_v2({"q1": [], "q2": ["gold"], "q3": []}, {"q1": ""})
    assert scores["exact"] == scores["f1"] == pytest.approx(100 / 3)
    assert (scores["total"], scores["missing"], scores["NoAns_exact"], scores["HasAns_f1"]) == (3, 2, 50, 0)


def test_version_2_wants_nothing_where_there_is_no_answer():
    answers = {"q1": ["Denver Broncos"], "q2": [], "q3": [], "q4": ["x"], "q5": ["the"]}
    predictions = {"q1": "Broncos", "q2": "", "q3": "Broncos", "q4": "", "q5": ""}
    assert evaluate_v2(answers, predictions) == pytest.approx(
        {
            "exact": 40,
            "f1": 100 * (2 / 3 + 1 + 0 + 0 + 1) / 5,
            "total": 5,
            "missing": 0,
            # An answer of nothing but an article: "" is right, yet the question is one with an answer.
            "HasAns_exact": 100 / 3,
            "HasAns_f1": 100 * (2 / 3 + 0 + 1) / 3,
            "HasAns_total": 3,
            "NoAns_exact": 50,
            "NoAns_f1": 50,
            "NoAns_total": 2,
        }
    )
    answered = {key: texts for key, texts in answers.items() if texts}
    assert {name[:5] for name in evaluate_v2(answered, predictions)} == {"exact", "f1", "total", "missi", "HasAn"}


def questions(seed, num=60):
    """Questions, predictions, a few of them empty, and odds of no answer that know a little."""
    draw = random.Random(seed)
    words = ["river", "farmer", "teacher", "garden"]
    answers = {f"q{i}": [" ".join(draw.choices(words, k=2))] if draw.random() < 0.5 else [] for i in range(num)}
    predictions = {
        key: texts[0] if texts and draw.random() < 0.5 else draw.choice(words) for key, texts in answers.items()
    }
    predictions |= {key: "" for key in predictions if draw.random() < 0.2}
    odds = {key: draw.gauss(-1.0 if texts else 0.5, 1) for key, texts in answers.items()}
    return answers, predictions, odds


@pytest.mark.parametrize("seed", range(8))
def test_the_best_threshold_is_the_best_of_all(seed):
    """Every threshold is tried by hand: below all odds, and at each of them."""
    answers, predictions, odds = questions(seed)
    found = evaluate_v2(answers, predictions, odds)
    for name in ("exact", "f1"):
        tried = {}
        for threshold in [min(odds.values()) - 1, *odds.values()]:
            chosen = {key: "" if odds[key] > threshold else text for key, text in predictions.items()}
            tried[threshold] = evaluate_v2(answers, chosen)[name]
        assert found[f"best_{name}"] == pytest.approx(max(tried.values()))
        assert tried[found[f"best_{name}_thresh"]] == pytest.approx(max(tried.values()))
        again = evaluate_v2(answers, predictions, odds, threshold=found[f"best_{name}_thresh"])
        assert again[name] == pytest.approx(found[f"best_{name}"])
        assert again[f"best_{name}"] == found[f"best_{name}"]


def test_of_equally_good_thresholds_the_lowest_is_taken():
    """q2 is right with and without its empty prediction; q3 loses what q4 wins."""
    answers = {"q1": ["x"], "q2": [], "q3": [], "q4": ["y"]}
    predictions = {"q1": "x", "q2": "", "q3": "z", "q4": "y"}
    scores = evaluate_v2(answers, predictions, {"q1": 0.1, "q2": 0.2, "q3": 0.3, "q4": 0.4})
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (75, 0.1)
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (75, 0.1)


def test_the_threshold_where_no_answer_is_best():
    answers, predictions = {"q1": [], "q2": [], "q3": ["x"]}, {"q1": "a b", "q2": "b", "q3": "y"}
    probabilities = {"q1": 0.5, "q2": 0.25, "q3": 0.25}
    scores = evaluate_v2(answers, predictions, probabilities)
    assert scores["exact"] == 0
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (pytest.approx(200 / 3), 0)
    odds = {"q1": -2.5, "q2": 3.0, "q3": -1.0}
    scores = evaluate_v2(answers, predictions, odds)
    assert scores["best_f1"] == pytest.approx(200 / 3) and scores["best_f1_thresh"] < -2.5
    assert scores["exact"] == 0, "predictions count as they are"
    scores = evaluate_v2(answers, predictions, odds, threshold=1.0)
    assert scores["exact"] == pytest.approx(100 / 3), "odds above 1 count as no answer, as in the official script"
