"""Presets of models before the Transformer: their numbers of parameters, and what their recipes come to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.params import count
from lm_flax import presets
from lm_flax.convolution import ConvLanguageModel
from lm_flax.recurrent import LSTMLanguageModel
from lm_flax.word2vec import Word2Vec

TOKENS = jnp.zeros((1, 2), jnp.int32)


def check(preset, model, *inputs, expected):
    number = count(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    assert number == expected and f"{number:,} parameters" in preset.__doc__


@pytest.mark.parametrize(("preset", "width"), [(presets.lstm_small, 200), (presets.lstm_medium, 650)])
def test_lstms(preset, width):
    """The embedding and the output layer, a bias for each word, and two layers of four gates."""
    expected = 2 * 10_000 * width + 10_000 + 2 * 4 * width * (2 * width + 1)
    check(preset, LSTMLanguageModel(preset().model), TOKENS, expected=expected)


def test_the_lstms_recipe_is_the_papers():
    """Its loss is a sum over 35 steps and ours the mean: a rate of 1 and a norm of 5, by that sum."""
    optimizer, inputs = presets.lstm_small().optimizer, presets.lstm_small().inputs
    assert optimizer.name == "sgd" and inputs.length == 35 and presets.lstm_small().train.batch_size == 20
    np.testing.assert_allclose([optimizer.learning_rate / 35, optimizer.clip_norm * 35], [1, 5])


def test_bengios_network():
    """C, H and d, U, W and b of the paper's section 2.1, with h = 50, m = 60, n = 5."""
    expected = 10_000 * 60 + 4 * 60 * 50 + 50 + 10_000 * 50 + 10_000 * 4 * 60 + 10_000
    check(presets.nplm, ConvLanguageModel(presets.nplm().model), TOKENS, expected=expected)


def test_convolutions_are_of_the_lstms_size():
    expected = 2 * 10_000 * 180 + 10_000 + 4 * (4 * 180 * 360 + 360)
    check(presets.conv_lm, ConvLanguageModel(presets.conv_lm().model), TOKENS, expected=expected)


def test_word_vectors():
    inputs = TOKENS, TOKENS[..., None], jnp.ones((1, 2, 2), bool)
    check(presets.word2vec, Word2Vec(presets.word2vec().model), *inputs, expected=2 * 30_000 * 100)
