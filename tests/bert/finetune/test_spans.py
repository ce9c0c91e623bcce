import itertools
import json
import math

import numpy as np
import pytest

from bert_flax.finetune import spans
from bert_flax.finetune.examples import QuestionExample
from bert_flax.finetune.predict import _show
from bert_flax.finetune.predictions import Predictions
from bert_flax.finetune.spans import Candidate, Context, RankedAnswers, Window, WindowLogits
from bert_flax.finetune.tasks import TASKS
from core_flax.metrics import squad
from core_flax.text.wordpiece import WordPiece

PIECES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the man went to store and bought a gallon of milk , . in paris ##ian cafe i ##s ##t"
)


def encode(text, lowercase=True):
    _, starts, ends = WordPiece(PIECES.split(), lowercase).encode_with_offsets(text)
    return Context(text, starts, ends)


def words(num):
    """A context of words of one letter, all different texts: token t is characters 2 t to 2 t + 1."""
    text = " ".join(chr(0x100 + number) for number in range(num))
    return Context(text, np.arange(num) * 2, np.arange(num) * 2 + 1)


@pytest.mark.parametrize(
    ("num_tokens", "room", "stride", "expected"),
    [
        (10, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 10)]),
        (9, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 9)]),
        (4, 4, 2, [(0, 4)]),
        (5, 4, 2, [(0, 4), (2, 5)]),
        (7, 3, 100, [(0, 3), (3, 6), (6, 7)]),
        (1, 300, 128, [(0, 1)]),
        (0, 300, 128, [(0, 0)]),
        (600, 366, 128, [(0, 366), (128, 494), (256, 600)]),
    ],
)
def test_windows(num_tokens, room, stride, expected):
    assert spans.windows(num_tokens, room, stride) == expected


def test_the_stride_is_128():
    assert spans.windows(1000, 300) == spans.windows(1000, 300, 128)


def test_most_context_as_in_the_example_of_run_squad():
    """Its comment: "the man went to the store and bought a gallon of milk", spans A, B and C; "bought" belongs to C."""
    parts = [Window(0, 5), Window(3, 8), Window(6, 11)]
    owner_T = spans.window_of_most_context(parts)
    assert owner_T[7] == 2
    # One in from its window's edge beats an edge; equals go to the first window.
    assert owner_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("num_tokens", "room", "stride"), [(50, 20, 7), (23, 9, 9), (5, 9, 3), (500, 366, 128)])
def test_most_context_is_that_of_the_definition(num_tokens, room, stride):
    parts = spans.windows(num_tokens, room, stride)
    for token, owner in enumerate(spans.window_of_most_context(parts)):
        holding = [number for number, (start, stop) in enumerate(parts) if start <= token < stop]

        def context(number, token=token):
            start, stop = parts[number]
            return min(token - start, stop - 1 - token) + 0.01 * (stop - start)

        assert owner == max(holding, key=context)


TEXT = "The man  went to\tthe Café, in Paris\u200b."


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ("man", (1, 1)),
        ("man  went to", (1, 3)),
        ("Café", (5, 5)),
        ("Caf", (5, 5)),
        (" went ", (2, 2)),
        ("he Ca", (4, 5)),
        ("in Paris\u200b.", (7, 9)),
        ("\u200b", None),
        ("  ", None),
    ],
)
def test_the_tokens_of_an_answer(answer, tokens):
    context, start = encode(TEXT), TEXT.rindex(answer)
    whole = Window(0, len(context.starts))
    assert spans.locate(context, start, start + len(answer), whole) == tokens


def test_an_answer_counts_where_all_of_it_is_in_the_window():
    context = words(20)
    start, stop = 2 * 5, 2 * 8 - 1  # tokens 5, 6 and 7
    assert spans.locate(context, start, stop, Window(0, 20)) == (5, 7)
    assert spans.locate(context, start, stop, Window(5, 8)) == (0, 2)
    assert spans.locate(context, start, stop, Window(3, 12)) == (2, 4)
    for outside in (Window(6, 12), Window(0, 7), Window(10, 20), Window(0, 5)):
        assert spans.locate(context, start, stop, outside) is None


def random_logits(seed, num_tokens, room, stride):
    rng = np.random.default_rng(seed)
    parts = spans.windows(num_tokens, room, stride)
    return [
        WindowLogits(part, *rng.normal(size=(2, part.stop - part.start)).astype(np.float32), rng.normal())
        for part in parts
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_tokens", "room", "stride"), [(40, 16, 5), (12, 30, 128), (33, 8, 8)])
@pytest.mark.parametrize(("n_best", "longest"), [(20, 30), (5, 3), (3, 1), (1000, 4)])
def test_the_best_spans_are_the_best_of_all(seed, num_tokens, room, stride, n_best, longest):
    """All pairs of tokens are tried by hand, with the rules of validity written out."""
    context, logits = words(num_tokens), random_logits(seed, num_tokens, room, stride)
    owner_T = spans.window_of_most_context([part.window for part in logits])
    valid = []
    for number, part in enumerate(logits):
        inside = range(part.window.start, part.window.stop)
        for first, last in itertools.product(inside, inside):
            if first <= last < first + longest and owner_T[first] == number:
                start_logit = float(part.start_M[first - part.window.start])
                end_logit = float(part.end_M[last - part.window.start])
                valid.append((start_logit + end_logit, 2 * first, 2 * last + 1))
    valid = sorted(valid, reverse=True)[:n_best]
    found = spans.best_answers(context, logits, n_best, longest)
    assert [(candidate.start, candidate.stop) for candidate in found.candidates] == [span[1:] for span in valid]
    assert [candidate.score for candidate in found.candidates] == pytest.approx([span[0] for span in valid])
    assert all(candidate.text == context.text[candidate.start : candidate.stop] for candidate in found.candidates)
    assert found.null == min(part.null for part in logits)
    assert found.null_odds == pytest.approx(found.null - valid[0][0])


def test_what_is_not_valid_is_not_chosen():
    """The best start comes after the best end; the best pair is too long; the window is not the owner of the start."""
    logits = [WindowLogits(Window(0, 5), np.array([0, 0, 0, 9, 0.0]), np.array([0, 9, 0, 0, 1.0]), 0.0)]
    assert spans.best_answers(words(5), logits).candidates[0][1:3] == (6, 9)
    logits = [WindowLogits(Window(0, 5), np.array([9, 0, 0, 0, 0.0]), np.array([0, 1, 0, 0, 9.0]), 0.0)]
    assert spans.best_answers(words(5), logits, max_answer_tokens=5).candidates[0][1:3] == (0, 9)
    assert spans.best_answers(words(5), logits, max_answer_tokens=4).candidates[0][1:3] == (0, 3)
    first = WindowLogits(Window(0, 4), np.array([0, 0, 0, 9.0]), np.zeros(4), 0.0)
    second = WindowLogits(Window(2, 6), np.array([0, 0, 2.0, 0]), np.array([0, 0, 2.0, 0]), 0.0)
    assert spans.best_answers(words(6), [first, second]).candidates[0][1:3] == (8, 9)


def test_an_answer_has_at_most_30_tokens_and_20_rivals_are_kept():
    start_M, end_M = np.zeros((2, 40))
    start_M[0], end_M[29], end_M[30] = 9, 1, 2
    found = spans.best_answers(words(40), [WindowLogits(Window(0, 40), start_M, end_M, 0.0)])
    assert found.candidates[0][1:3] == (0, 2 * 30 - 1)
    assert len(found.candidates) == 20


def test_a_text_that_comes_twice_is_one_candidate():
    context = encode("the man, the man")
    logits = [WindowLogits(Window(0, 5), np.array([1, 0, 0, 3, 0.0]), np.array([0, 2, 0, 0, 2.0]), 0.0)]
    found = spans.best_answers(context, logits)
    assert found.candidates[0] == Candidate("the man", 9, 16, 3.0, 2.0)
    assert [candidate.text for candidate in found.candidates].count("the man") == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (TEXT, "Café"),
        (TEXT, "man  went to\tthe"),
        ("in the cafe\u0301, Paris", "cafe\u0301"),
        ("in İst, the Paris", "İst"),
        ("the\u00a0man \u2003 bought\n\nmilk", "man \u2003 bought\n\nmilk"),
        ("the 今日 of \u2764\ufe0f, \U0001f468\u200d\U0001f469.", "今"),
        ("the 今日 of \u2764\ufe0f, \U0001f468\u200d\U0001f469.", "\u2764\ufe0f, \U0001f468\u200d\U0001f469"),
        ("the Pari\u0000sian; caf\u200be", "Pari\u0000sian; caf\u200be"),
    ],
)
def test_an_answer_is_a_slice_of_the_text(text, answer):
    """Characters to tokens, which a perfect model finds again, to the very same characters, in a context of windows."""
    text = f"{'of the, ' * 9}{text}{' a gallon' * 7}"
    start = text.index(answer)
    context = encode(text)
    parts = spans.windows(len(context.starts), room=24, stride=3)
    places = [spans.locate(context, start, start + len(answer), part) for part in parts]
    assert len(parts) > 3 and any(places) and not all(places)
    logits = []
    for part, place in zip(parts, places, strict=True):
        start_M, end_M = np.zeros((2, part.stop - part.start), np.float32)
        null = 8.0
        if place is not None:
            start_M[place[0]] = end_M[place[1]] = 6
            null = -8.0
        logits.append(WindowLogits(part, start_M, end_M, null))
    found = spans.best_answers(context, logits)
    assert found.choose() == found.choose(0.0) == answer
    assert found.candidates[0].start == start
    assert found.null == -8.0


def test_the_threshold_decides_about_no_answer():
    ranked = RankedAnswers((Candidate("milk", 0, 4, 2.0, 1.0),), null=4.5)
    assert ranked.null_odds == 1.5
    assert [ranked.choose(threshold) for threshold in (None, 1.6, 1.5, 1.4, -3.0)] == ["milk", "milk", "milk", "", ""]


def test_the_threshold_chosen_on_dev_gives_the_score_that_was_promised():
    """Through the official search: the files of one dev set, and then its predictions at the best threshold."""
    rng = np.random.default_rng(0)
    context = words(30)
    ranked = {f"q{i}": spans.best_answers(context, random_logits(i, 30, 12, 4)) for i in range(40)}
    gold = {key: [answers.choose()] if rng.random() < 0.6 else [] for key, answers in ranked.items()}
    best = squad.evaluate_v2(gold, spans.predictions(ranked), spans.null_odds(ranked))
    threshold = best["best_f1_thresh"]
    chosen = squad.evaluate_v2(gold, spans.predictions(ranked, threshold))
    assert chosen["f1"] == pytest.approx(best["best_f1"])
    assert 0 < sum(text == "" for text in spans.predictions(ranked, threshold).values()) < 40


def test_a_context_without_tokens_has_no_answer(capsys):
    found = spans.best_answers(encode("\u200b \n"), [WindowLogits(Window(0, 0), np.zeros(0), np.zeros(0), -3.0)])
    assert found == RankedAnswers((), -3.0)
    assert found.choose() == found.choose(1e6) == ""
    assert spans.n_best_lists({"q": found}, with_null=True) == {"q": [{"text": "", "null_score": -3, "probability": 1}]}
    assert spans.n_best_lists({"q": found}, with_null=False) == {"q": []}
    json.dumps(spans.null_odds({"q": found}), allow_nan=False)
    _show(TASKS["squad"], QuestionExample("q", "Who?", "\u200b \n", (), False), Predictions([""], [], {"q": found}))
    assert capsys.readouterr().out == "(no answer)\n"


def test_files(tmp_path):
    """Probabilities by hand: softmax over 3, 1 and, with no answer as a candidate, 2."""
    ranked = {"q1": RankedAnswers((Candidate("Café", 4, 8, 2.0, 1.0), Candidate("the", 0, 3, 0.5, 0.5)), null=2.0)}
    three = [math.exp(score) / (math.exp(3) + math.exp(2) + math.exp(1)) for score in (3, 2, 1)]
    rows = spans.n_best_lists(ranked, with_null=True)["q1"]
    assert [row["text"] for row in rows] == ["Café", "", "the"]
    assert [row["probability"] for row in rows] == pytest.approx(three)
    rows = spans.n_best_lists(ranked, with_null=False)["q1"]
    assert [row["probability"] for row in rows] == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    assert {name: rows[0][name] for name in ("text", "start", "start_logit", "end_logit")} == {
        "text": "Café",
        "start": 4,
        "start_logit": 2.0,
        "end_logit": 1.0,
    }
    for name, content in (("p", spans.predictions(ranked, -2.0)), ("o", spans.null_odds(ranked)), ("n", {"q1": rows})):
        spans.write_json(tmp_path / name, content)
        assert json.loads((tmp_path / name).read_text()) == content
    assert spans.predictions(ranked, -2.0) == {"q1": ""} and spans.null_odds(ranked) == {"q1": -1.0}


def test_logits_that_are_not_finite_or_do_not_fit_are_our_mistake():
    good = np.zeros(4)
    for start_M, end_M in ((np.full(4, np.nan), good), (good, np.full(4, np.inf)), (np.zeros(3), good)):
        with pytest.raises(AssertionError):
            spans.best_answers(words(4), [WindowLogits(Window(0, 4), start_M, end_M, 0.0)])
    with pytest.raises(AssertionError, match="windows over 4 tokens of 5"):
        spans.best_answers(words(5), [WindowLogits(Window(0, 4), good, good, 0.0)])
