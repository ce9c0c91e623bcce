"""Answers as spans of a context: windows over long contexts, labels within a window, the best spans of all windows.

As in BERT (arXiv 1810.04805, section 4.2, and its code release's run_squad.py), but answers are slices of the original
text, found through the character offsets of its pieces. A token here is a piece of the context alone, counted from 0;
where in the model's input a window lies ([CLS], question and [SEP] come first) is the caller's affair.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

_NO_SPAN_ODDS = 1e9
"""Null score minus the score of the best span where there is no span: more than any logits, and valid JSON."""


class Window(NamedTuple):
    """Context tokens ``start`` to ``stop``, the latter not included."""

    start: int
    stop: int


@dataclass(frozen=True)
class Context:
    """A context and the characters that each of its tokens comes from, as ``WordPiece.encode_with_offsets`` has them.

    Attributes:
        text: as the file has it.
        starts, ends: int [T], neither of them decreasing.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class WindowLogits:
    """What the model says of one window.

    Attributes:
        window: its tokens, M of them.
        start_M, end_M: logits of each token as an answer's first and last.
        null: start logit plus end logit of [CLS]: the score of there being no answer.
    """

    window: Window
    start_M: np.ndarray
    end_M: np.ndarray
    null: float


class Candidate(NamedTuple):
    """A possible answer: ``text`` is characters ``start`` to ``stop`` of the context."""

    text: str
    start: int
    stop: int
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """Sum of both logits."""
        return self.start_logit + self.end_logit


@dataclass(frozen=True)
class RankedAnswers:
    """The answers to one question, best first, and the score of there being none.

    Attributes:
        candidates: with different texts; none if the context has no tokens.
        null: least over the windows: a window that sees an answer speaks for all.
    """

    candidates: tuple[Candidate, ...]
    null: float

    @property
    def null_odds(self) -> float:
        """How much better no answer is than the best one, in logits. Grows with the belief that there is none."""
        return self.null - self.candidates[0].score if self.candidates else _NO_SPAN_ODDS

    def choose(self, threshold: float | None = None) -> str:
        """The best answer, or "" if the null odds are above ``threshold``; None: always an answer (SQuAD v1.1)."""
        if not self.candidates or (threshold is not None and self.null_odds > threshold):
            return ""
        return self.candidates[0].text

    def probabilities(self, with_null: bool) -> list[float]:
        """Softmax over the candidates' scores, and over the null score, in the last place, if ``with_null``."""
        scores = [candidate.score for candidate in self.candidates] + [self.null] * with_null
        weights = np.exp(np.array(scores) - max(scores, default=0.0))
        return (weights / weights.sum()).tolist()


def windows(num_tokens: int, room: int, stride: int = 128) -> list[Window]:
    """Windows that together cover a context, at least one.

    Args:
        num_tokens: of the context.
        room: tokens that a window can hold.
        stride: tokens between the starts of two windows; at most ``room``, else ``room`` is taken, to leave no gap.
    """
    assert room > 0 and stride > 0, (room, stride)
    found = [Window(0, min(room, num_tokens))]
    while found[-1].stop < num_tokens:
        start = found[-1].start + min(room, stride)
        found.append(Window(start, min(start + room, num_tokens)))
    return found


def window_of_most_context(windows: Sequence[Window]) -> np.ndarray:
    """For each token the window in which it has most context, int [T].

    That is the lesser of the tokens to its left and right; a hundredth of the window's length decides between equals,
    and then the earlier window. Only this window may let an answer start at the token.
    """
    num_tokens = max(window.stop for window in windows)
    best_T, owner_T = np.full(num_tokens, -1.0), np.zeros(num_tokens, np.int64)
    for number, (start, stop) in enumerate(windows):
        token_M = np.arange(start, stop)
        context_M = np.minimum(token_M - start, stop - 1 - token_M) + 0.01 * (stop - start)
        better_M = token_M[context_M > best_T[start:stop]]
        best_T[better_M] = context_M[better_M - start]
        owner_T[better_M] = number
    return owner_T


def locate(context: Context, start: int, stop: int, window: Window) -> tuple[int, int] | None:
    """First and last token, counted from the window's first, of the answer ``context.text[start:stop]``.

    A token that the answer shares a character with is part of it.

    Returns:
        None if not all of them are in the window, or there is none: the window's label is then no answer.
    """
    first = int(np.searchsorted(context.ends, start, side="right"))
    last = int(np.searchsorted(context.starts, stop, side="left")) - 1
    if not window.start <= first <= last < window.stop:
        return None
    return first - window.start, last - window.start


def best_answers(
    context: Context, logits: Sequence[WindowLogits], n_best: int = 20, max_answer_tokens: int = 30
) -> RankedAnswers:
    """The best answers to a question over all windows of its context.

    A span is valid if it ends where it starts or later, has at most ``max_answer_tokens`` tokens, lies in one window,
    and starts where this window has the most context. All valid spans are compared (run_squad.py looks at pairs of
    the best starts and the best ends only); of spans with one text the best counts.

    Args:
        context: the tokens' characters.
        logits: of every window of the context.
        n_best: most candidates to keep.
        max_answer_tokens: tokens of the longest answer.
    """
    owner_T = window_of_most_context([part.window for part in logits])
    assert len(owner_T) == len(context.starts), f"windows over {len(owner_T)} tokens of {len(context.starts)}"
    spans = []
    for number, part in enumerate(logits):
        owned_M = owner_T[part.window.start : part.window.stop] == number
        spans += _top_spans(part, owned_M, n_best, max_answer_tokens)
    best: dict[str, Candidate] = {}
    for first, last, start_logit, end_logit in sorted(spans, key=lambda span: (-span[2] - span[3], span[0], span[1])):
        start, stop = int(context.starts[first]), int(context.ends[last])
        text = context.text[start:stop]
        best.setdefault(text, Candidate(text, start, stop, start_logit, end_logit))
    return RankedAnswers(tuple(best.values())[:n_best], min(part.null for part in logits))


def _top_spans(
    part: WindowLogits, owned_M: np.ndarray, n_best: int, max_answer_tokens: int
) -> list[tuple[int, int, float, float]]:
    """First token, last token and their logits of the best ``n_best`` valid spans of a window."""
    start_M, end_M = part.start_M.astype(np.float64), part.end_M.astype(np.float64)
    assert start_M.shape == end_M.shape == owned_M.shape, (start_M.shape, end_M.shape, owned_M.shape)
    assert np.isfinite(start_M).all() and np.isfinite(end_M).all(), "a logit is not finite"
    width = min(max_answer_tokens, len(start_M))
    if not owned_M.any():
        return []
    end_MW = np.lib.stride_tricks.sliding_window_view(np.append(end_M, np.full(width - 1, -np.inf)), width)
    scores = np.where(owned_M[:, None], start_M[:, None] + end_MW, -np.inf).ravel()
    best = np.argpartition(-scores, n_best)[:n_best] if len(scores) > n_best else np.arange(len(scores))
    found = []
    for place in best[scores[best] > -np.inf]:
        first, more = divmod(int(place), width)
        start_logit, end_logit = float(start_M[first]), float(end_M[first + more])
        found.append((part.window.start + first, part.window.start + first + more, start_logit, end_logit))
    return found


def predictions(answers: Mapping[str, RankedAnswers], threshold: float | None = None) -> dict[str, str]:
    """The predictions file: text by question. See ``RankedAnswers.choose``."""
    return {key: ranked.choose(threshold) for key, ranked in answers.items()}


def null_odds(answers: Mapping[str, RankedAnswers]) -> dict[str, float]:
    """The null odds file, with which the official script finds the best threshold."""
    return {key: ranked.null_odds for key, ranked in answers.items()}


def n_best_lists(answers: Mapping[str, RankedAnswers], with_null: bool) -> dict[str, list[dict[str, str | float]]]:
    """The n-best file: by question the candidates with their probabilities and characters, the likeliest first.

    Args:
        answers: by question.
        with_null: whether no answer, the text "", is one of them (SQuAD 2.0).
    """
    listed = {}
    for key, ranked in answers.items():
        rows: list[dict[str, str | float]] = [
            {"text": text, "start": start, "start_logit": start_logit, "end_logit": end_logit}
            for text, start, _, start_logit, end_logit in ranked.candidates
        ]
        rows += [{"text": "", "null_score": ranked.null}] * with_null
        shares = ranked.probabilities(with_null)
        order = sorted(range(len(rows)), key=lambda place: -shares[place])
        listed[key] = [rows[place] | {"probability": shares[place]} for place in order]
    return listed


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes one of these files, as the official scripts read them."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
