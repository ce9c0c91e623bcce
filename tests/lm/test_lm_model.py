"""Language models: what a token may see, packing, the cache, remat, sizes. Parity with others is in tests/parity."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, V, model_of, random_params, tokens

from core_flax.cache import take_rows
from core_flax.losses import vocabulary_sums
from core_flax.params import count
from core_flax.types import UserError
from lm_flax.llama import LlamaConfig
from lm_flax.model import GPT2Config
from lm_flax.presets import SIZES

B, L = 3, 10


def whole(config, params, tokens_BL, **options):
    return jax.jit(lambda params, tokens: model_of(config).apply({"params": params}, tokens, **options))(
        params, tokens_BL
    )


def extend_of(config, params):
    model = model_of(config)
    return jax.jit(lambda tokens, cache, num: model.apply({"params": params}, tokens, cache, num, method="extend"))


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


def test_a_token_sees_itself_and_those_before(config, params):
    tokens_BL = tokens(1, L)
    changed = tokens_BL.copy()
    changed[0, 6] = (changed[0, 6] + 1) % V
    before, after = whole(config, params, tokens_BL), whole(config, params, changed)
    differs = np.abs(before - after).max(-1)[0]
    assert (differs[:6] == 0).all() and (differs[6:] > 1e-3).all()


def test_packed_rows_equal_documents_by_themselves(config, params):
    documents = [tokens(1, length, seed=length) for length in (4, 5, 3, 6)]
    positions = [np.arange(each.shape[1])[None] for each in documents]
    numbers = [np.full(each.shape, number) for number, each in enumerate(documents)]

    def rows(parts):  # padded with what must not matter
        return np.stack([np.pad(np.concatenate(row, 1)[0], (0, L - sum(x.shape[1] for x in row))) for row in parts])

    packed = whole(
        config,
        params,
        rows([documents[:2], documents[2:]]),
        positions_BL=rows([positions[:2], positions[2:]]),
        sequences_BL=rows([numbers[:2], numbers[2:]]) - (np.arange(L) >= 9),
    )
    found = [packed[0, :4], packed[0, 4:9], packed[1, :3], packed[1, 3:9]]
    for x, document in zip(found, documents, strict=True):
        np.testing.assert_allclose(x, whole(config, params, document)[0], atol=1e-5)


@pytest.mark.parametrize("portions", [[1] * L, [4, 3, 2, 1]], ids=["one by one", "in portions"])
def test_reading_with_a_cache_equals_reading_at_once(config, params, portions):
    tokens_BL = tokens(B, L)
    expected = whole(config, params, tokens_BL)
    extend, cache = extend_of(config, params), model_of(config).init_cache(B, L + 2)
    start = 0
    for length in portions:
        x_BLD, cache = extend(tokens_BL[:, start : start + length], cache, None)
        np.testing.assert_allclose(x_BLD, expected[:, start : start + length], atol=1e-5)
        start += length
    np.testing.assert_array_equal(cache.num_tokens_B, [L] * B)


def test_prompts_of_different_length_go_on_as_if_alone(config, params):
    """Padded with tokens of all kinds; then two rows go on and one has ended; halfway rows change places."""
    tokens_BL, read_B = tokens(B, L), np.array([6, 2, 4])
    extend, cache = extend_of(config, params), model_of(config).init_cache(B, L)
    x_BLD, cache = extend(tokens_BL[:, :6], cache, read_B)
    expected = [whole(config, params, tokens_BL[row : row + 1])[0] for row in range(B)]
    for row, length in enumerate(read_B):
        np.testing.assert_allclose(x_BLD[row, :length], expected[row][:length], atol=1e-5)
    rows = np.arange(B)
    for step in range(4):
        if step == 2:
            order = np.array([2, 0, 1])
            rows, cache = rows[order], take_rows(cache, order)
        goes_on_B = rows < 2
        x_BLD, cache = extend(tokens_BL[rows, read_B[rows]][:, None], cache, goes_on_B.astype(np.int32))
        for place in np.flatnonzero(goes_on_B):
            row = rows[place]
            np.testing.assert_allclose(x_BLD[place, 0], expected[row][read_B[row]], atol=1e-5)
        read_B[rows] += goes_on_B
    np.testing.assert_array_equal(cache.num_tokens_B, [4, 10, 6])


@pytest.mark.parametrize("changes", [{"remat": "none"}, {"remat": "block"}, {"unroll": 1}, {"unroll": 3}])
def test_remat_and_unrolling_change_nothing(config, params, changes):
    tokens_BL, labels_BL = tokens(B, L), tokens(B, L, seed=2)

    def evaluate(config):
        model = model_of(config)

        def loss(params):
            x_BLD = model.apply({"params": params}, tokens_BL)
            return vocabulary_sums(x_BLD, model.output_table(params), labels_BL, jnp.ones((B, L))).loss

        return jax.jit(jax.value_and_grad(loss))(params)

    expected, found = evaluate(config), evaluate(dataclasses.replace(config, **changes))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), found, expected)


def test_the_output_table_is_what_logits_go_by(config, params):
    x_BLD, model = whole(config, params, tokens(B, L)), model_of(config)
    logits_BLV = model.apply({"params": params}, x_BLD, method="logits")
    np.testing.assert_allclose(logits_BLV, x_BLD @ model.output_table(params).T, atol=1e-5)


def test_dropout_depends_on_the_rows_number():
    config = dataclasses.replace(CONFIGS["gpt2"], dropout=0.3, attention_dropout=0.2)
    params, model, tokens_BL = random_params(config), model_of(config), tokens(4, L)

    def run(rows, row_B=None):
        rngs = {"dropout": jax.random.key(3)}
        return model.apply({"params": params}, tokens_BL[rows], row_B=row_B, deterministic=False, rngs=rngs)

    everything, part = run(np.arange(4)), run(np.array([2, 1]), jnp.array([2, 1]))
    np.testing.assert_allclose(part, everything[np.array([2, 1])], atol=1e-5)
    assert np.abs(everything - whole(config, params, tokens_BL)).max() > 0.1


def test_projections_into_the_residual_start_smaller(config):
    params = jax.jit(model_of(config).init)(jax.random.key(0), tokens(1, 2))["params"]
    layers, expected = params["layers"], 0.02 / math.sqrt(2 * config.num_layers)
    for kernel in (layers["attention"]["out"]["kernel"], layers["mlp"]["down"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), expected, rtol=0.05)
    for kernel in (layers["attention"]["query"]["kernel"], layers["mlp"]["up"]["kernel"], params["token"]["embedding"]):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)


PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama_1b": 1_100_048_384,  # TinyLlama
    "llama_7b": 6_738_415_616,  # Llama 2
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_of_the_published_sizes(name):
    config = SIZES[name]()
    shapes = jax.eval_shape(model_of(config).init, jax.random.key(0), tokens(1, 2))["params"]
    number = count(shapes)
    assert number == PUBLISHED.get(name, number)
    assert f"{number:,} parameters" in SIZES[name].__doc__


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (GPT2Config, {"num_heads": 7}, "--model.num-heads 7 does not divide --model.width 768"),
        (GPT2Config, {"dropout": 1.0}, "--model.dropout 1.0"),
        (LlamaConfig, {"num_heads": 24}, "--model.num-heads 24 does not divide --model.width 4096"),
        (LlamaConfig, {"num_kv_heads": 3}, "--model.num-kv-heads 3 does not divide --model.num-heads 32"),
        (LlamaConfig, {"width": 96}, "makes heads of 3"),
        (LlamaConfig, {"rope_theta": 1.0}, "--model.rope-theta 1.0"),
    ],
)
def test_sizes_that_make_no_model(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)
