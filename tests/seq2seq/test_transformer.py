"""The Transformer: packed as alone, step by step as all at once, and of the published sizes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_text import caption_lengths, write_store

from core_flax import sharding
from core_flax.cache import take_rows
from seq2seq_flax.batches import PairBatches
from seq2seq_flax.config import InputsConfig, TransformerConfig
from seq2seq_flax.model import Transformer, positions_of
from seq2seq_flax.presets import PRESETS
from seq2seq_flax.sharding import PARAM_RULES
from seq2seq_flax.task import init_params, translation_sums

CONFIG = TransformerConfig(vocab_size=50, num_layers=2, width=32, num_heads=4, mlp_width=48)
MODEL = Transformer(CONFIG)


@pytest.fixture(scope="module")
def params():
    """Every bias and norm away from its start, and attention away from uniform."""
    drawn = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))
    flat, tree = jax.tree.flatten(drawn)
    draw = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + 0.1 * draw.normal(size=x.shape).astype(np.float32) for x in flat])


@pytest.fixture(scope="module")
def packed_and_alone(tmp_path_factory):
    """The same eleven pairs, several to a row and one to a row."""
    store = write_store(tmp_path_factory.mktemp("store") / "data", caption_lengths(11, seed=1))
    packed, alone = (PairBatches(store, InputsConfig(row_length=64, packing=each), 16, 1) for each in (True, False))
    return next(packed.in_order(8)), next(alone.in_order(16))


def logits_of(model, params, batch):
    return jax.jit(model.apply)(
        {"params": params},
        batch["source_tokens"],
        batch["target_inputs"],
        source_sequences_BM=batch["source_sequences"],
        target_sequences_BL=batch["target_sequences"],
        source_positions_BM=batch["source_positions"],
        target_positions_BL=batch["target_positions"],
    )


def by_pair(batch, logits):
    """Logits of each pair, by its source's and target's tokens."""
    found = {}
    for row, numbers in enumerate(batch["target_sequences"]):
        for number in range(1, numbers.max() + 1):
            source, target = (batch[f"{side}_sequences"][row] == number for side in ("source", "target"))
            key = tuple(batch["source_tokens"][row][source]), tuple(batch["target_labels"][row][target])
            found[key] = np.asarray(logits[row][target])
    return found


def test_packed_equals_alone(params, packed_and_alone):
    together, apart = (by_pair(batch, logits_of(MODEL, params, batch)) for batch in packed_and_alone)
    assert together.keys() == apart.keys() and len(together) == 11
    assert packed_and_alone[0]["target_sequences"].max() > 1
    for key in together:
        np.testing.assert_allclose(together[key], apart[key], atol=1e-5)
        assert apart[key].std() > 0.1


def test_packed_gradients_equal_those_alone(params, packed_and_alone):
    def gradient(batch):
        return jax.jit(jax.grad(lambda p: translation_sums(MODEL, p, batch, None, 0.1)[0]["loss"]))(params)

    together, apart = map(gradient, packed_and_alone)
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1.0, float(jnp.abs(y).max())))


@pytest.fixture(scope="module")
def decoding(params):
    """(start, extend): jitted, the latter with the logits."""

    @partial(jax.jit, static_argnums=2)
    def start(source_BM, valid_BM, length):
        return MODEL.apply({"params": params}, source_BM, valid_BM, length, method="start")

    @jax.jit
    def extend(cache, tokens_BL, num_tokens_B=None):
        x_BLD, cache = MODEL.apply({"params": params}, tokens_BL, cache, num_tokens_B, method="extend")
        return MODEL.apply({"params": params}, x_BLD, method="logits"), cache

    return start, extend


def test_step_by_step_equals_all_at_once(params, packed_and_alone, decoding):
    """A beginning of a length of its own for each row, then single tokens; every second row waits now and then."""
    (start, extend), (_, batch), rows = decoding, packed_and_alone, np.arange(16)
    expected, inputs = logits_of(MODEL, params, batch), batch["target_inputs"]
    cache = start(batch["source_tokens"], batch["source_sequences"] > 0, inputs.shape[1])
    first_B = 1 + rows % 4
    logits_BLV, cache = extend(cache, inputs[:, :4], first_B)
    for row in rows[batch["target_sequences"][:, 3] > 0]:
        np.testing.assert_allclose(logits_BLV[row, : first_B[row]], expected[row, : first_B[row]], atol=1e-5)
    for turn in range(20):
        position_B = np.asarray(cache.own.num_tokens_B)
        goes_on_B = (rows % 2 == 0) | (turn % 3 > 0)
        logits_BLV, cache = extend(cache, inputs[rows, position_B][:, None], goes_on_B.astype(np.int32))
        for row in rows[(batch["target_sequences"] > 0)[rows, position_B]]:
            np.testing.assert_allclose(logits_BLV[row, 0], expected[row, position_B[row]], atol=1e-5)
    assert set(np.asarray(cache.own.num_tokens_B)) == {21, 23, 15, 17}


def test_rows_of_the_cache_can_be_taken(packed_and_alone, decoding):
    """As beam search does: a row goes on from another row's past."""
    (start, extend), (_, batch) = decoding, packed_and_alone
    cache = take_rows(start(batch["source_tokens"], batch["source_sequences"] > 0, 8), jnp.array([0, 0]))
    _, cache = extend(cache, jnp.array([[1, 7], [1, 9]]))
    logits, _ = extend(cache, jnp.array([[5], [5]]))
    other, _ = extend(take_rows(cache, jnp.array([1, 0])), jnp.array([[5], [5]]))
    np.testing.assert_allclose(logits, other[::-1], atol=1e-6)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_a_token_sees_no_later_one(params, packed_and_alone):
    _, batch = packed_and_alone
    changed = batch | {"target_inputs": batch["target_inputs"].copy()}
    changed["target_inputs"][:, 6:] = 3
    before, after = (np.asarray(logits_of(MODEL, params, each)) for each in (batch, changed))
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert np.abs(before[:, 6:8] - after[:, 6:8]).max() > 0.01


def test_sinusoidal_positions():
    found = positions_of(jnp.array([[0, 1, 50]]), 8)[0]
    for place, row in zip((0, 1, 50), found, strict=True):
        angles = [place / 10000 ** (2 * i / 8) for i in range(4)]
        np.testing.assert_allclose(row, [*np.sin(angles), *np.cos(angles)], atol=1e-5)


def test_variances_at_the_start():
    """Embedded tokens have variance 1, beside positions of 1/2; logits of normalised states have variance 1."""
    config = dataclasses.replace(CONFIG, vocab_size=4000, width=128)
    init = jax.jit(lambda key: init_params(Transformer(config), key)["embeddings_token"]["embedding"])
    table = init(jax.random.key(1))
    assert 0.97 < float(jnp.var(table) * 128) < 1.03
    x_BD = jax.random.normal(jax.random.key(2), (64, 128))
    assert 0.9 < float(jnp.var(x_BD @ table.T)) < 1.1


def num_parameters(config):
    shapes = jax.eval_shape(lambda key: init_params(Transformer(config), key), jax.random.key(0))
    sharding.table(shapes, PARAM_RULES)  # each has its line
    return sum(x.size for x in jax.tree.leaves(shapes))


def test_parameter_counts():
    """The paper's table 3 has 65 and 213 million; by its own sizes and 37,000 pieces there are these."""
    sizes = {name: num_parameters(PRESETS[name]().model) for name in ("transformer_base", "transformer_big")}
    assert sizes["transformer_base"] == 63_082_496 and sizes["transformer_big"] == 214_245_376
    for name, published in {"transformer_base": 65e6, "transformer_big": 213e6}.items():
        model = PRESETS[name]().model
        D, F, V = model.width, model.mlp_width, model.vocab_size
        attention, mlp, norm = 4 * (D * D + D), 2 * D * F + F + D, 2 * D
        by_hand = V * D + 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm)
        assert sizes[name] == by_hand and abs(by_hand / published - 1) < 0.03
    base = PRESETS["transformer_base"]().model
    table = base.vocab_size * base.width
    for changes, more in (
        ({"tied_embeddings": "target"}, table),
        ({"tied_embeddings": "none"}, 2 * table),
        ({"output_bias": True}, base.vocab_size),
    ):
        assert num_parameters(dataclasses.replace(base, **changes)) - sizes["transformer_base"] == more


def test_every_dropout_drops(packed_and_alone):
    """Each of the three rates alone changes what the model says in training, and nothing at all does without."""
    batch, _ = packed_and_alone
    names = ("dropout", "attention_dropout", "activation_dropout")
    none = dataclasses.replace(CONFIG, **dict.fromkeys(names, 0.0))
    params, losses = jax.jit(lambda key: init_params(Transformer(none), key))(jax.random.key(0)), {}
    for name in (None, *names):
        model = Transformer(none if name is None else dataclasses.replace(none, **{name: 0.3}))
        keys = (None, jax.random.key(1), jax.random.key(2))
        loss = jax.jit(lambda key, model=model: translation_sums(model, params, batch, key, 0.0)[0]["loss"])
        losses[name] = [float(loss(key)) for key in keys]
    exact = losses.pop(None)
    assert len(set(exact)) == 1
    for first, *drawn in losses.values():
        assert first == exact[0] and len({first, *drawn}) == 3
