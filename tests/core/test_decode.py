"""Decoding, beside enumeration, plain Python searches without any cache, and the model read anew for every token."""

import itertools
import math
from functools import cache

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.beam import BeamSearch, beam_search, refill, run_beams, start_beams
from core_flax.decode import begin, generate, proceed, row_keys
from core_flax.sampling import Sampling
from core_flax.types import UserError
from lm_flax.model import GPT2, GPT2Config

V, LENGTH, STOP = 5, 5, 2
PROMPTS = np.array([[1, 3, 0], [4, 2, 1], [0, 1, 3]])  # with padding of all kinds
NUM_PROMPT = np.array([3, 1, 2])
LIMITS = np.array([5, 5, 4])
ROOM = 8

SIZES = {"vocab_size": V, "num_layers": 2, "width": 16, "num_heads": 2, "mlp_width": 16, "max_length": ROOM}
MODEL = GPT2(GPT2Config(**SIZES, dropout=0.0, attention_dropout=0.0))


@flax.struct.dataclass
class _Tokens:
    before_B: jax.Array
    last_B: jax.Array


class Trigrams(nn.Module):
    """Scores by the last two tokens; a cache of plain arrays, as that of a recurrent model is."""

    @nn.nowrap
    def init_cache(self, batch_size, length):
        return _Tokens(*jnp.zeros((2, batch_size), jnp.int32))

    @nn.compact
    def __call__(self, tokens_BL):
        return self.extend(tokens_BL, self.init_cache(len(tokens_BL), 0))[0]

    @nn.compact
    def extend(self, tokens_BL, state, num_tokens_B=None):
        table = self.param("table", nn.initializers.normal(), (V, V, V))
        outputs = []
        for place in range(tokens_BL.shape[1]):
            read = True if num_tokens_B is None else place < num_tokens_B
            before, last = state.last_B, tokens_BL[:, place]
            state = _Tokens(jnp.where(read, before, state.before_B), jnp.where(read, last, state.last_B))
            outputs.append(jnp.asarray(table)[before, last])
        return jnp.stack(outputs, axis=1), state

    def logits(self, x):
        return x


MODELS = {"attention": MODEL, "state": Trigrams()}


def random_params(model, seed=0):
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda x: 0.7 * draw.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@pytest.fixture(scope="module")
def next_log_probs(model, params):
    """(prompt and what follows, as a tuple) -> log-probabilities of the next token, by reading all of it anew."""
    read = jax.jit(
        lambda tokens: model.apply({"params": params}, model.apply({"params": params}, tokens), method="logits")
    )

    @cache
    def of_length(length):
        tokens = np.array(list(itertools.product(range(V), repeat=length)))
        log_probs = np.asarray(jax.nn.log_softmax(read(np.pad(tokens, ((0, 0), (0, ROOM - length))))[:, length - 1]))
        return {tuple(row): values for row, values in zip(tokens.tolist(), log_probs.astype(np.float64), strict=True)}

    return lambda tokens: of_length(len(tokens))[tuple(tokens)]


def divisor(search, length):
    return ((search.length_offset + length) / (search.length_offset + 1)) ** search.length_penalty


def enumerated(next_log_probs, prompt, limit, search):
    """(score, tokens) of every complete sequence, the best first."""
    complete, growing = [], [((), 0.0)]
    while growing:
        tokens, log_prob = growing.pop()
        if tokens and (tokens[-1] == STOP or len(tokens) == limit):
            complete.append((log_prob / divisor(search, len(tokens)), tokens))
            continue
        log_probs = next_log_probs([*prompt, *tokens])
        growing += [((*tokens, token), log_prob + log_probs[token]) for token in range(V)]
    return sorted(complete, reverse=True)


def searched(next_log_probs, prompt, limit, search, allowed=range(V)):
    """As ``enumerated``, by beam search with nothing clever: every step until the limit, every sequence in a list."""
    complete, live = [], [(0.0, ())]
    for length in range(1, limit + 1):
        longer = []
        for log_prob, tokens in live:
            log_probs = next_log_probs([*prompt, *tokens])
            longer += [(log_prob + log_probs[token], (*tokens, token)) for token in allowed]
        longer.sort(reverse=True)
        for log_prob, tokens in longer[: search.beam_size]:
            if tokens[-1] == STOP or length == limit:
                complete.append((log_prob / divisor(search, length), tokens))
        live = [each for each in longer if each[1][-1] != STOP][: search.beam_size]
    return sorted(complete, reverse=True)


def beams(model, params, search, rows=slice(None), limits=LIMITS, **options):
    prompts = PROMPTS[rows]
    return beam_search(
        model,
        params,
        model.init_cache(len(prompts), ROOM),
        prompts,
        NUM_PROMPT[rows],
        limits[rows],
        length=LENGTH,
        search=search,
        stop=(STOP,),
        **options,
    )


def found_in(hypotheses, row):
    """[(score, tokens)] of a row."""
    rows = zip(hypotheses.tokens_BCL[row], hypotheses.num_tokens_BC[row], hypotheses.scores_BC[row], strict=True)
    return [(float(score), tuple(tokens[:num].tolist())) for tokens, num, score in rows]


def assert_same(found, expected):
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=2e-5)


PENALTIES = [(0.6, 5.0), (0.0, 5.0), (-0.8, 5.0), (2.5, 0.0)]


@pytest.mark.parametrize(("penalty", "offset"), PENALTIES)
def test_wide_beams_find_what_enumeration_finds(model, params, next_log_probs, penalty, offset):
    """320: as many continuations as the live sequences ever have before the last step."""
    search = BeamSearch(320, penalty, offset, n_best=7)
    hypotheses, lengths = beams(model, params, search), set()
    for row, prompt in enumerate(PROMPTS):
        expected = enumerated(next_log_probs, prompt[: NUM_PROMPT[row]], LIMITS[row], search)
        assert_same(found_in(hypotheses, row), expected[:7])
        lengths |= {len(tokens) for _, tokens in expected[:7]}
    assert len(lengths) > 1 or penalty


@pytest.mark.parametrize(
    ("beam_size", "n_best", "penalty", "offset"),
    [(2, 1, 0.6, 5.0), (3, 3, 2.5, 0.0), (5, 2, -0.8, 5.0), (3, 2, 0.0, 5.0)],
)
def test_narrow_beams_equal_a_plain_search(model, params, next_log_probs, beam_size, n_best, penalty, offset):
    search = BeamSearch(beam_size, penalty, offset, n_best)
    hypotheses = beams(model, params, search)
    for row, prompt in enumerate(PROMPTS):
        expected = searched(next_log_probs, prompt[: NUM_PROMPT[row]], LIMITS[row], search)
        assert_same(found_in(hypotheses, row), expected[:n_best])
    log_probs = hypotheses.scores_BC * divisor(search, np.asarray(hypotheses.num_tokens_BC))
    np.testing.assert_allclose(hypotheses.log_probs_BC, log_probs, rtol=1e-5)


def test_tokens_that_are_not_allowed_never_come(model, params, next_log_probs):
    search = BeamSearch(3, 0.6, n_best=3)
    hypotheses = beams(model, params, search, allowed_V=jnp.arange(V) != 1)
    for row, prompt in enumerate(PROMPTS):
        expected = searched(next_log_probs, prompt[: NUM_PROMPT[row]], LIMITS[row], search, allowed=(0, 2, 3, 4))
        assert_same(found_in(hypotheses, row), expected[:3])


def greedy(next_log_probs, prompt, limit):
    tokens, total = [], 0.0
    while len(tokens) < limit and STOP not in tokens:
        log_probs = next_log_probs([*prompt, *tokens])
        tokens.append(int(log_probs.argmax()))
        total += log_probs[tokens[-1]]
    return total, tuple(tokens)


def generated(model, params, rows=slice(None), limits=LIMITS, seed=None, **options):
    prompts, keys = PROMPTS[rows], None
    if seed is not None:
        keys = row_keys(seed, np.arange(len(PROMPTS))[rows])
    empty = model.init_cache(len(prompts), ROOM)
    return generate(model, params, empty, prompts, NUM_PROMPT[rows], limits[rows], keys, length=LENGTH, **options)


def rows_of(generation):
    return [
        (float(log_prob), tuple(tokens[:num].tolist()))
        for tokens, num, log_prob in zip(
            generation.tokens_BL, generation.num_tokens_B, generation.log_probs_B, strict=True
        )
    ]


def test_greedy_takes_the_most_probable_token_and_is_a_search_with_one_beam(model, params, next_log_probs):
    limits = np.array([5, 0, 3])
    found = rows_of(generated(model, params, limits=limits, stop=(STOP,)))
    one_beam = beams(model, params, BeamSearch(1, 0.0), limits=limits)
    for row, prompt in enumerate(PROMPTS):
        expected = [greedy(next_log_probs, prompt[: NUM_PROMPT[row]], limits[row])]
        assert_same([found[row]], expected)
        assert_same(found_in(one_beam, row), expected)


def test_without_stop_tokens_every_row_has_its_limit(model, params):
    found = generated(model, params, limits=np.array([5, 1, 3]))
    np.testing.assert_array_equal(found.num_tokens_B, [5, 1, 3])
    np.testing.assert_array_equal(found.tokens_BL > 0, found.tokens_BL * (np.arange(5) < [[5], [1], [3]]) > 0)


def test_a_row_alone_gives_what_it_gives_in_a_batch(model, params):
    search, sampling = BeamSearch(3, 0.6, n_best=3), Sampling(top_p=0.95)
    together, drawn = beams(model, params, search), generated(model, params, seed=5, sampling=sampling)
    for row in range(len(PROMPTS)):
        alone = slice(row, row + 1)
        assert_same(found_in(beams(model, params, search, alone), 0), found_in(together, row))
        other = generated(model, params, alone, seed=5, sampling=sampling)
        assert_same(rows_of(other), rows_of(drawn)[alone])
    assert rows_of(generated(model, params, seed=6, sampling=sampling)) != rows_of(drawn)


def test_sentences_that_join_another_search_end_as_they_would(model, params):
    search, limits = BeamSearch(3, 0.6, n_best=3), np.array([5, 2, 4])
    expected = beams(model, params, search, limits=limits)

    def run(beams, most_live):
        return run_beams(model, params, beams, most_live, search=search, stop=(STOP,))

    def start(rows):
        given = PROMPTS[rows], NUM_PROMPT[rows], limits[rows]
        return start_beams(begin(model, params, model.init_cache(3, ROOM), *given, length=LENGTH), search)

    first = start([0, 1, 2])
    kinds = [x.aval for x in jax.tree.leaves(first)]
    first, second = run(first, 2), run(start([2, 0, 1]), 1)
    assert [x.aval for x in jax.tree.leaves(first)] == kinds  # else it would be compiled twice
    assert first.done_B.tolist() == [False, True, False] and second.done_B.tolist() == [True, False, True]
    assert first.num_tokens_B.tolist() == [2, 2, 2] and second.num_tokens_B.tolist() == [4, 4, 2]
    assert_same(found_in(first.found, 1), found_in(expected, 1))
    assert_same(found_in(second.found, 0), found_in(expected, 2))
    joined = run(refill(first, second, np.array([1, 3, 3]), np.array([1, 0, 0])), 0)
    for row, sentence in enumerate([0, 0, 2]):
        assert_same(found_in(joined.found, row), found_in(expected, sentence))


def test_token_by_token_is_all_at_once(model, params):
    expected = generated(model, params, seed=2, sampling=Sampling(), stop=(STOP,))
    keys, shown = row_keys(2, np.arange(3)), []
    now = begin(model, params, model.init_cache(3, ROOM), PROMPTS, NUM_PROMPT, LIMITS, keys, length=LENGTH)
    while not now.ended_B.all():
        now = proceed(model, params, now, 1, sampling=Sampling(), stop=(STOP,))
        shown.append(np.asarray(now.last_B))
    np.testing.assert_array_equal(now.tokens_BL, expected.tokens_BL)
    np.testing.assert_array_equal(np.where(now.tokens_BL.T[: len(shown)] > 0, shown, 0), now.tokens_BL.T[: len(shown)])
    np.testing.assert_allclose(now.log_probs_B, expected.log_probs_B, atol=1e-5)


def test_the_sum_of_log_probabilities_is_that_of_reading_it_all(model, params, next_log_probs):
    """With a cache, step by step, the model says what it says without."""
    for row, (total, tokens) in enumerate(rows_of(generated(model, params, seed=3, sampling=Sampling(2.0, 3)))):
        prompt = PROMPTS[row][: NUM_PROMPT[row]].tolist()
        expected = [next_log_probs([*prompt, *tokens[:place]])[token] for place, token in enumerate(tokens)]
        np.testing.assert_allclose(total, math.fsum(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam_size": 0}, "--beam-size 0"),
        ({"beam_size": 3, "n_best": 4}, "--n-best 4 is more than --beam-size 3"),
        ({"length_penalty": math.nan}, "--length-penalty nan"),
        ({"length_penalty": -60.0}, "--length-penalty -60.0: must be -10 or more"),
    ],
)
def test_searches_that_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        BeamSearch(**wrong)
