"""Convolutional language models: what a token sees, packing, the cache, Bengio's model by hand, sizes, learning."""

import dataclasses
from functools import partial

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
from lm_flax.convolution import ConvConfig, ConvLanguageModel
from lm_flax.sharding import CONV_AXIS_FIELDS, CONV_RULES

B, L, V = 3, 10, 61
CONFIGS = {
    "gated": ConvConfig(vocab_size=V, num_layers=3, embedding_width=12, width=16, kernel_width=3, dropout=0.0),
    "bengio": ConvConfig(
        vocab_size=V,
        num_layers=1,
        embedding_width=8,
        width=16,
        kernel_width=4,
        gated=False,
        direct=True,
        dropout=0.0,
    ),
}
ROWS = tokens(B, L)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def read(config, params):
    model = ConvLanguageModel(config)
    return jax.jit(lambda tokens, sequences=None: model.apply({"params": params}, tokens, sequences_BL=sequences))


@pytest.fixture(scope="module")
def extend(config, params):
    model = ConvLanguageModel(config)
    return jax.jit(lambda tokens, cache, num=None: model.apply({"params": params}, tokens, cache, num, method="extend"))


def test_a_token_sees_as_many_before_it_as_the_kernels_reach(config, read):
    changed = ROWS.copy()
    changed[0, 2] = (changed[0, 2] + 1) % V
    differs_L = np.abs(read(ROWS) - read(changed)).max(-1)[0]
    reach = config.num_layers * (config.kernel_width - 1)
    assert (
        (differs_L[:2] == 0).all() and (differs_L[2 : 3 + reach] > 1e-4).all() and (differs_L[3 + reach :] == 0).all()
    )


def test_packed_rows_equal_documents_by_themselves(read):
    row = np.concatenate([ROWS[:1, :4], ROWS[1:2, :6]], 1)
    whole = read(row, np.repeat([7, 3], [4, 6])[None])
    np.testing.assert_allclose(whole[0, :4], read(ROWS)[0, :4], atol=1e-5)
    np.testing.assert_allclose(whole[0, 4:], read(ROWS)[1, :6], atol=1e-5)
    assert np.abs(whole[0, 4:] - read(row)[0, 4:]).max() > 1e-3


@pytest.mark.parametrize("portions", [[1] * L, [4, 3, 2, 1]], ids=["one by one", "in portions"])
def test_reading_with_a_cache_equals_reading_at_once(config, read, extend, portions):
    cache, start = ConvLanguageModel(config).init_cache(B, L), 0
    for length in portions:
        x_BLD, cache = extend(ROWS[:, start : start + length], cache)
        np.testing.assert_allclose(x_BLD, read(ROWS)[:, start : start + length], atol=1e-5)
        start += length


def test_prompts_of_different_length_go_on_as_if_alone(config, read, extend):
    """Padded with tokens of all kinds; one row gets none at all; then rows change places."""
    x_BLD, cache = extend(ROWS[:, :6], ConvLanguageModel(config).init_cache(B, L), np.array([6, 2, 0]))
    np.testing.assert_allclose(x_BLD[1, :2], read(ROWS)[1, :2], atol=1e-5)
    order = np.array([2, 0, 1])
    following = ROWS[np.arange(B), [6, 2, 0]][order][:, None]
    x_BLD, _ = extend(following, take_rows(cache, order))
    np.testing.assert_allclose(x_BLD[:, 0], read(ROWS)[np.arange(B), [6, 2, 0]][order], atol=1e-5)


def test_logits_are_a_product_with_the_output_table(config, params, read):
    model, x_BLD = ConvLanguageModel(config), read(ROWS)
    logits_BLV = model.apply({"params": params}, x_BLD, method="logits")
    np.testing.assert_allclose(logits_BLV, x_BLD @ model.output_table(params).T, atol=1e-5)


def test_one_layer_of_tanh_is_bengios_model():
    """y = b + W x + U tanh(d + H x), x being the embeddings of the last tokens (equation 1 of the paper)."""
    config = CONFIGS["bengio"]
    params, model = random_params(config), ConvLanguageModel(config)
    x_BLD = model.apply({"params": params}, ROWS)
    found = model.apply({"params": params}, x_BLD, method="logits")[:, -1]
    x = params["token"]["embedding"][ROWS[:, -4:]].reshape(B, -1)
    hidden = np.tanh(params["layers_0"]["bias"][0] + x @ params["layers_0"]["kernel"].reshape(-1, config.width))
    u, w = np.split(params["head"]["embedding"], [config.width], axis=1)
    np.testing.assert_allclose(found, params["head"]["bias"] + x @ w.T + hidden @ u.T, atol=1e-5)


def test_dropout_is_that_of_the_rows_number():
    config = dataclasses.replace(CONFIGS["gated"], dropout=0.3)
    params, model = random_params(config), ConvLanguageModel(config)

    @partial(jax.jit, static_argnames="deterministic")
    def run(rows, row_B, deterministic=False):
        rngs = {"dropout": jax.random.key(3)}
        return model.apply({"params": params}, rows, row_B=row_B, deterministic=deterministic, rngs=rngs)

    everything, part = run(ROWS, None), run(ROWS[[2, 1]], jnp.array([2, 1]))
    np.testing.assert_allclose(part, everything[np.array([2, 1])], atol=1e-5)
    assert np.abs(everything - run(ROWS, None, deterministic=True)).max() > 0.1


def test_signals_keep_their_scale_through_the_layers():
    config = ConvConfig(vocab_size=V, num_layers=8, embedding_width=64, width=64, dropout=0.0)
    model = ConvLanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0), ROWS)["params"]
    x_BLD = jax.jit(model.apply)({"params": params}, tokens(4, 40))[..., :-1]
    assert 0.3 < x_BLD[:, 30:].std() / config.init_stddev < 1.5


def test_learns_a_text_by_heart(config):
    model, rows = ConvLanguageModel(config), np.tile([3, 1, 4, 1, 5, 9, 2, 6], 4)[None, :25]
    params, optimizer = jax.jit(model.init)(jax.random.key(0), rows)["params"], optax.adam(0.02)

    @jax.jit
    def step(params, state):
        def loss(params):
            x_BLD = model.apply({"params": params}, rows[:, :-1])
            return vocabulary_sums(x_BLD, model.output_table(params), rows[:, 1:], jnp.ones((1, 24))).loss / 24

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(80):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] > 3.5 and losses[-1] < 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mesh_changes_nothing(name):
    config = dataclasses.replace(CONFIGS[name], vocab_size=64)
    model, params, rows = ConvLanguageModel(config), random_params(config), tokens(4, L)

    def loss(params, tokens_BL):
        x_BLD = model.apply({"params": params}, tokens_BL[:, :-1])
        return vocabulary_sums(x_BLD, model.output_table(params), tokens_BL[:, 1:], jnp.ones((4, L - 1))).loss

    expected = jax.jit(jax.value_and_grad(loss))(params, rows)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    placed = jax.device_put(params, sharding.param_shardings(params, CONV_RULES, mesh, CONV_AXIS_FIELDS))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(rows, sharding.batch_sharding(mesh)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_width": 1}, "--model.kernel-width 1 sees one token only"),
        ({"num_layers": 0}, "--model.num-layers 0"),
        ({"dropout": 1.0}, "--model.dropout 1.0"),
    ],
)
def test_sizes_that_make_no_model(changes, message):
    with pytest.raises(UserError, match=message):
        ConvConfig(**changes)
