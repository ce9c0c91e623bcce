"""Beam search with GNMT's length penalty, for any model that has the methods which ``core_flax/cache.py`` describes.

What is searched for: the sequences that end with a stop token, or have as many tokens as they may have, with the best
*scores*: log-probability over ``((c + length) / (c + 1)) ** alpha``. The length counts generated tokens, a stop token
included; c = 5 is Wu et al. 2016 (arXiv 1609.08144, section 7), and with c = 0 the divisor is the plain length to the
power of alpha, as other programs have it.

A step looks at all continuations of the K live sequences of a sentence by one token. Those among the best K, by
log-probability, that are complete enter the list of the ``n_best`` best scores found; the best K that are not complete
live on.

When a sentence is done: a live sequence of t tokens and log-probability s can only lose probability, and will have
between t + 1 and ``limit`` tokens in the end. Since s <= 0, its score can at best be s over the largest divisor there:
that of ``limit`` tokens if alpha > 0, that of t + 1 if alpha < 0. Once no live sequence's bound exceeds the worst score
of a full list, nothing that is yet to come could enter the list, and stopping changes nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from core_flax import cache as caches
from core_flax.config import check_range
from core_flax.decode import Generation, begin, in_parts, is_stop, next_logits, proceed
from core_flax.sampling import top_k_of_rows
from core_flax.types import Array, Params, UserError


@dataclass(frozen=True)
class BeamSearch:
    """How wide to search, and for what."""

    beam_size: int = 4
    """K: sequences that live on at each step; 1: greedy, always the most probable token."""
    length_penalty: float = 0.6
    """alpha: what length is worth. 0: the most probable sequence, which tends to be short; higher: longer ones."""
    length_offset: float = 5.0
    """c: 5 as in GNMT; 0: log-probabilities are divided by the plain length to the power of alpha."""
    n_best: int = 1
    """How many sequences to return, the best first; at most beam_size."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "beam_size", "n_best", least=1, most=2**16)
        check_range("", self, "length_penalty", least=-10, most=10)  # beyond, a power of the length leaves float32
        check_range("", self, "length_offset", least=0)
        if self.n_best > self.beam_size:
            raise UserError(f"--n-best {self.n_best} is more than --beam-size {self.beam_size} can find")

    def divisor(self, length: Array) -> Array:
        """What the log-probability of a sequence of so many tokens is divided by."""
        return ((self.length_offset + length) / (self.length_offset + 1.0)) ** self.length_penalty


@flax.struct.dataclass
class Hypotheses:
    """What was found: C sequences for each of B rows, the best first.

    Attributes:
      tokens_BCL: a stop token included; 0 beyond.
      num_tokens_BC: how many tokens are real.
      scores_BC: log-probability over the length's divisor; -inf where there are not so many sequences.
      log_probs_BC: sum of the natural logarithms of the tokens' probabilities.
    """

    tokens_BCL: Array
    num_tokens_BC: Array
    scores_BC: Array
    log_probs_BC: Array


@flax.struct.dataclass
class Beams:
    """The search, in the middle of it: B sentences, K live sequences each, the best first."""

    num_tokens_B: Array  # of every live sequence
    tokens_BKL: Array
    log_probs_BK: Array  # -inf: none lives here
    last_BK: Array
    limit_B: Array
    found: Hypotheses
    done_B: Array
    cache: Any


def beam_search(
    model: nn.Module,
    params: Params,
    cache: Any,
    prompts_BL: Array,
    num_prompt_B: Array | None = None,
    limit_B: Array | None = None,
    *,
    length: int,
    search: BeamSearch,
    stop: tuple[int, ...],
    allowed_V: Array | None = None,
) -> Hypotheses:
    """The best sequences for each row: ``begin``, ``start_beams`` and ``run_beams`` to the end.

    Args:
      model: a module with ``extend`` and ``logits``.
      params: its parameters.
      cache: as for ``core_flax.decode.begin``, not forked.
      prompts_BL: likewise.
      num_prompt_B: likewise.
      limit_B: likewise.
      length: size of the result; no limit may exceed it.
      search: how wide, and for what.
      stop: tokens that end a sequence.
      allowed_V: bool; False for tokens that must not come. Their probability is not given to the others. None: all may.
    """
    start = begin(model, params, cache, prompts_BL, num_prompt_B, limit_B, length=length)
    if search.beam_size == 1:
        return _greedy(proceed(model, params, start, length, stop=stop, allowed_V=allowed_V), search)
    return run_beams(model, params, start_beams(start, search), search=search, stop=stop, allowed_V=allowed_V).found


@partial(jax.jit, static_argnames="search")
def _greedy(end: Generation, search: BeamSearch) -> Hypotheses:
    """The search with one beam, which goes on from the most probable token."""
    scores_B = end.log_probs_B / search.divisor(end.num_tokens_B)
    return Hypotheses(end.tokens_BL[:, None], end.num_tokens_B[:, None], scores_B[:, None], end.log_probs_B[:, None])


@partial(jax.jit, static_argnames="search")
def start_beams(start: Generation, search: BeamSearch) -> Beams:
    """The prompts that ``core_flax.decode.begin`` has read, each the one live sequence of its sentence."""
    length = start.tokens_BL.shape[1]
    batch_size, beams = len(start.ended_B), search.beam_size
    none_BC = jnp.full((batch_size, search.n_best), -jnp.inf, jnp.float32)
    found = Hypotheses(
        jnp.zeros((*none_BC.shape, length), jnp.int32), jnp.zeros(none_BC.shape, jnp.int32), none_BC, none_BC
    )
    return Beams(
        num_tokens_B=jnp.zeros(batch_size, jnp.int32),
        tokens_BKL=jnp.zeros((batch_size, beams, length), jnp.int32),
        log_probs_BK=jnp.full((batch_size, beams), -jnp.inf, jnp.float32).at[:, 0].set(0.0),
        last_BK=jnp.repeat(start.last_B[:, None], beams, axis=1),
        limit_B=start.limit_B,
        found=found,
        done_B=start.ended_B,
        cache=caches.fork(start.cache, beams),
    )


@partial(jax.jit, static_argnames=("model", "search", "stop"), donate_argnames="beams")
def run_beams(
    model: nn.Module,
    params: Params,
    beams: Beams,
    most_live: Array | int = 0,
    *,
    search: BeamSearch,
    stop: tuple[int, ...],
    allowed_V: Array | None = None,
) -> Beams:
    """Searches on until no more than ``most_live`` sentences are not done; what is given is used up.

    Others can then take the places of those that are (``refill``), so that none of the steps is for a few sentences.
    """
    parts = in_parts(model, params)
    return jax.lax.while_loop(
        lambda beams: jnp.sum(~beams.done_B) > most_live,
        lambda beams: _step(model, parts, beams, search, stop, allowed_V),
        beams,
    )


@partial(jax.jit, donate_argnames="beams")
def refill(beams: Beams, others: Beams, into_B: Array, from_B: Array) -> Beams:
    """With sentences of other searches of the same sizes in the place of some; what is given first is used up.

    Args:
      beams: a search.
      others: another, of a batch of the same shape.
      into_B: rows of the one that are written; a number beyond its rows is none.
      from_B: what rows of the other take their places.
    """
    num_sentences = len(beams.done_B)

    def put(x: Array, other: Array) -> Array:
        """Rows of a sentence stand together, one or as many as beams."""
        rows, new = (each.reshape(num_sentences, -1, *x.shape[1:]) for each in (x, other))
        return rows.at[into_B].set(new[from_B], mode="drop").reshape(x.shape)

    return jax.tree.map(put, beams, others)


def _step(
    model: nn.Module,
    params: Params,
    state: Beams,
    search: BeamSearch,
    stop: tuple[int, ...],
    allowed_V: Array | None,
) -> Beams:
    """Every live sequence with one more token, where the sentence is not done."""
    beams, done_B, limit_B = search.beam_size, state.done_B, state.limit_B
    num_tokens_B = state.num_tokens_B + ~done_B
    goes_on_B = jnp.repeat(~done_B, beams, total_repeat_length=state.last_BK.size)
    logits_BV, cache = next_logits(model, params, state.last_BK.reshape(-1), state.cache, goes_on_B)
    # So many that, even if each sequence could stop in every way there is, K that do not are among them.
    num_best = (1 + max(1, len(stop))) * beams
    log_probs, parents, tokens = _continuations(logits_BV, state.log_probs_BK, num_best, allowed_V)

    complete = is_stop(tokens, stop) | (num_tokens_B >= limit_B)[:, None]
    sequences_BKL = jnp.take_along_axis(state.tokens_BKL, parents[..., None], axis=1)
    here_BL = jnp.arange(sequences_BKL.shape[2]) == (num_tokens_B - 1)[:, None]
    sequences_BKL = jnp.where(here_BL[:, None], tokens[..., None], sequences_BKL)
    ending = jnp.where(complete & ~done_B[:, None], log_probs, -jnp.inf)[:, :beams]
    found = _with_found(state.found, ending, sequences_BKL[:, :beams], num_tokens_B[:, None], search)

    live_BK, chosen_BK = jax.lax.top_k(jnp.where(complete, -jnp.inf, log_probs), beams)
    parents_BK, last_BK = (jnp.take_along_axis(x, chosen_BK, axis=1) for x in (parents, tokens))
    bound_B = live_BK[:, 0] / jnp.maximum(search.divisor(num_tokens_B + 1), search.divisor(limit_B))
    return Beams(
        num_tokens_B=num_tokens_B,
        tokens_BKL=jnp.take_along_axis(sequences_BKL, chosen_BK[..., None], axis=1),
        log_probs_BK=live_BK,
        last_BK=last_BK,
        limit_B=limit_B,
        found=found,
        done_B=done_B | (found.scores_BC[:, -1] >= bound_B) | (num_tokens_B >= limit_B),
        cache=caches.reorder(cache, parents_BK),
    )


def _continuations(
    logits_BV: Array, live_BK: Array, num_best: int, allowed_V: Array | None
) -> tuple[Array, Array, Array]:
    """(log-probability, live sequence, token) of the best continuations of each sentence, [B, num_best] at most each.

    A sequence's log-probabilities differ from its logits by one number, so its best are found without computing them.
    """
    totals_BK = jax.nn.logsumexp(logits_BV, axis=-1).reshape(live_BK.shape)
    vocab_size = logits_BV.shape[-1]
    banned_V = jnp.zeros(vocab_size) if allowed_V is None else jnp.where(allowed_V, 0.0, -jnp.inf)
    return top_k_of_rows(
        logits_BV.reshape(*live_BK.shape, vocab_size),
        live_BK - totals_BK,
        banned_V,
        min(num_best, live_BK.shape[1] * vocab_size),
    )


def _with_found(
    found: Hypotheses, log_probs: Array, tokens_BKL: Array, length_B1: Array, search: BeamSearch
) -> Hypotheses:
    """The best of what was found before and of these sequences, -inf standing for none; length: tokens of each."""
    num_before = found.scores_BC.shape[1]
    both = jnp.concatenate([found.scores_BC, log_probs / search.divisor(jnp.maximum(length_B1, 1))], axis=1)
    scores_BC, places = jax.lax.top_k(both, num_before)
    lengths = jnp.where(log_probs > -jnp.inf, length_B1, 0)

    def choose(old: Array, new: Array) -> Array:
        at = places if old.ndim == 2 else places[..., None]
        return jnp.take_along_axis(jnp.concatenate([old, new], axis=1), at, axis=1)

    return Hypotheses(
        tokens_BCL=choose(found.tokens_BCL, jnp.where(lengths[..., None] > 0, tokens_BKL, 0)),
        num_tokens_BC=choose(found.num_tokens_BC, lengths),
        scores_BC=scores_BC,
        log_probs_BC=choose(found.log_probs_BC, log_probs),
    )
