"""The LSTM language model: what is remembered and forgotten, streams, sizes, learning. Parity is in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import random_params, tokens

from core_flax import sharding
from core_flax.cache import take_rows
from core_flax.config import MeshConfig
from core_flax.losses import vocabulary_sums
from core_flax.types import UserError
from lm_flax.recurrent import LSTMConfig, LSTMLanguageModel
from lm_flax.sharding import LSTM_AXIS_FIELDS, LSTM_RULES
from lm_flax.streams import Streams

B, L, V = 3, 10, 61
CONFIG = LSTMConfig(vocab_size=V, width=16)
MODEL = LSTMLanguageModel(CONFIG)
PARAMS = random_params(CONFIG)
ROWS = tokens(B, L)

read = jax.jit(lambda tokens, sequences=None: MODEL.apply({"params": PARAMS}, tokens, sequences_BL=sequences))
extend = jax.jit(lambda tokens, cache, num=None: MODEL.apply({"params": PARAMS}, tokens, cache, num, method="extend"))


def test_packed_rows_equal_documents_by_themselves():
    whole = read(np.concatenate([ROWS[:1, :4], ROWS[1:2, :6]], 1), np.repeat([7, 3], [4, 6])[None])
    np.testing.assert_allclose(whole[0, :4], read(ROWS)[0, :4], atol=1e-5)
    np.testing.assert_allclose(whole[0, 4:], read(ROWS)[1, :6], atol=1e-5)
    assert np.abs(whole[0, 4:] - read(np.concatenate([ROWS[:1, :4], ROWS[1:2, :6]], 1))[0, 4:]).max() > 1e-3


@pytest.mark.parametrize("portions", [[1] * L, [4, 3, 2, 1]], ids=["one by one", "in portions"])
def test_reading_with_a_cache_equals_reading_at_once(portions):
    cache, start = MODEL.init_cache(B, L), 0
    for length in portions:
        x_BLD, cache = extend(ROWS[:, start : start + length], cache)
        np.testing.assert_allclose(x_BLD, read(ROWS)[:, start : start + length], atol=1e-5)
        start += length


def test_prompts_of_different_length_go_on_as_if_alone():
    """Padded with tokens of all kinds; one row gets none at all; then rows change places."""
    x_BLD, cache = extend(ROWS[:, :6], MODEL.init_cache(B, L), np.array([6, 2, 0]))
    np.testing.assert_allclose(x_BLD[1, :2], read(ROWS)[1, :2], atol=1e-5)
    order = np.array([2, 0, 1])
    following = ROWS[np.arange(B), [6, 2, 0]][order][:, None]
    x_BLD, _ = extend(following, take_rows(cache, order))
    expected = read(ROWS)[np.arange(B), [6, 2, 0]][order]
    np.testing.assert_allclose(x_BLD[:, 0], expected, atol=1e-5)


def test_logits_are_a_product_with_the_output_table_and_have_a_bias():
    x_BLD = read(ROWS)
    logits_BLV = MODEL.apply({"params": PARAMS}, x_BLD, method="logits")
    np.testing.assert_allclose(logits_BLV, x_BLD @ MODEL.output_table(PARAMS).T, atol=1e-5)
    by_hand = x_BLD[..., :-1] @ PARAMS["head"]["embedding"].T + PARAMS["head"]["bias"]
    np.testing.assert_allclose(logits_BLV, by_hand, atol=1e-5)


def test_dropout_is_that_of_the_rows_number():
    model = LSTMLanguageModel(dataclasses.replace(CONFIG, dropout=0.4))

    @jax.jit
    def run(rows, row_B):
        rngs = {"dropout": jax.random.key(3)}
        return model.apply({"params": PARAMS}, rows, row_B=row_B, deterministic=False, rngs=rngs)

    everything, part = run(ROWS, None), run(ROWS[[2, 1]], jnp.array([2, 1]))
    np.testing.assert_allclose(part, everything[np.array([2, 1])], atol=1e-5)
    # What a layer hands to itself is never dropped: zeros among the outputs, but not everywhere, and not in the states.
    zeros = np.mean(np.asarray(everything[..., :-1]) == 0)
    assert 0.3 < zeros < 0.5


# Streams


def stream_loss(model, params, batch, states):
    """(sum of the cross-entropy, the states to go on from)."""
    x_BLD, states = model.apply({"params": params}, batch["tokens"], states, batch["starts"], method="go_on")
    return vocabulary_sums(x_BLD, model.output_table(params), batch["labels"], batch["weights"]).loss, states


@pytest.mark.parametrize(("num_tokens", "before"), [(47, 5), (48, None), (46, 5)])
def test_every_token_is_predicted_once_from_the_one_before(num_tokens, before):
    text = np.random.default_rng(0).permutation(100)[:num_tokens] + 10
    streams = Streams(text, before, None, num_rows=4, length=5)
    pairs = []
    for batch in streams.in_order():
        real = batch["weights"] == 1
        pairs += list(zip(batch["tokens"][real].tolist(), batch["labels"][real].tolist(), strict=True))
    expected = list(zip([before, *text[:-1]], text, strict=True))[before is None :]
    assert sorted(pairs) == sorted((int(read), int(label)) for read, label in expected)


def test_a_row_reads_on_where_it_was_and_begins_anew_each_epoch():
    text = np.arange(60)
    streams = Streams(text, None, None, num_rows=3, length=4)
    batches = [streams.make_batch(step, range(3)) for step in range(2 * streams.num_steps)]
    row = np.concatenate([batch["tokens"][1][batch["weights"][1] == 1] for batch in batches[: streams.num_steps]])
    np.testing.assert_array_equal(row, np.arange(20, 40))
    assert [bool(batch["starts"].any()) for batch in batches] == [True, *[False] * 4] * 2
    for name, rows in batches[2].items():
        np.testing.assert_array_equal(streams.make_batch(2, range(1, 3))[name], rows[1:])
        np.testing.assert_array_equal(batches[2 + streams.num_steps][name], rows)


def test_streams_equal_the_whole_text_read_at_once():
    """One stream, with what was read carried from stretch to stretch, and forgotten where a document begins."""
    text = tokens(23, seed=5)
    starts = np.isin(np.arange(23), [9, 17])
    streams = Streams(text, None, starts, num_rows=1, length=4)
    sums = jax.jit(lambda batch, states: stream_loss(MODEL, PARAMS, batch, states))
    states, total = MODEL.init_cache(1, 0), 0.0
    for batch in streams.in_order():
        loss, states = sums(batch, states)
        total += float(loss)
    x_BLD = read(text[None, :-1], np.cumsum(starts)[None, :-1])
    whole = vocabulary_sums(x_BLD, MODEL.output_table(PARAMS), text[None, 1:], jnp.ones((1, 22)))
    np.testing.assert_allclose(total, whole.loss, rtol=1e-5)


def test_a_text_shorter_than_its_streams_is_refused():
    with pytest.raises(UserError, match=r"a text of 3 tokens, .* is too short for 4 streams"):
        Streams(np.arange(3), 0, None, num_rows=4, length=5)


# Learning, placement, sizes


def test_learns_a_text_by_heart():
    """Each token follows from the one three before, which is in another stretch half of the time."""
    text = np.tile([3, 1, 4, 1, 5, 9, 2, 6], 9)
    streams = Streams(text, 0, None, num_rows=2, length=6)
    model, optimizer = LSTMLanguageModel(dataclasses.replace(CONFIG, num_layers=1, init_limit=0.5)), optax.adam(0.03)
    params = jax.jit(model.init)(jax.random.key(0), ROWS)["params"]

    @jax.jit
    def step(params, state, batch, states):
        def loss(params):
            total, following = stream_loss(model, params, batch, states)
            return total / jnp.sum(batch["weights"]), following

        (value, states), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, states, value

    state, states, losses = optimizer.init(params), model.init_cache(2, 0), []
    for number in range(120):
        batch = streams.make_batch(number, range(2))
        params, state, states, value = step(params, state, batch, states)
        losses.append(float(value))
    assert losses[0] > 4 and np.mean(losses[-6:]) < 0.15


def test_a_mesh_changes_nothing():
    config = dataclasses.replace(CONFIG, vocab_size=64)
    model, params, rows = LSTMLanguageModel(config), random_params(config), tokens(4, L)

    def loss(params, tokens_BL):
        x_BLD = model.apply({"params": params}, tokens_BL[:, :-1])
        return vocabulary_sums(x_BLD, model.output_table(params), tokens_BL[:, 1:], jnp.ones((4, L - 1))).loss

    expected = jax.jit(jax.value_and_grad(loss))(params, rows)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    placed = jax.device_put(params, sharding.param_shardings(params, LSTM_RULES, mesh, LSTM_AXIS_FIELDS))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(rows, sharding.batch_sharding(mesh)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), found, expected)


def test_parameters_begin_uniformly_within_the_limit():
    params = jax.jit(LSTMLanguageModel(dataclasses.replace(CONFIG, init_limit=0.05)).init)(jax.random.key(0), ROWS)
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    assert np.abs(values).max() <= 0.05
    np.testing.assert_allclose(values.std(), 0.05 / 3**0.5, rtol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 0}, "--model.width 0"), ({"dropout": 1.0}, "--model.dropout 1.0"), ({"init_limit": 0.0}, "init-limit")],
)
def test_sizes_that_make_no_model(changes, message):
    with pytest.raises(UserError, match=message):
        LSTMConfig(**changes)
