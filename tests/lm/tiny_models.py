"""Tiny language models with weights away from their start, for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from lm_flax.convolution import ConvConfig, ConvLanguageModel
from lm_flax.llama import Llama, LlamaConfig
from lm_flax.model import GPT2, GPT2Config
from lm_flax.recurrent import LSTMConfig, LSTMLanguageModel

V = 61
SIZES = {"vocab_size": V, "num_layers": 3, "width": 32, "num_heads": 4, "mlp_width": 48, "max_length": 16}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES, dropout=0.0, attention_dropout=0.0),
    "llama": LlamaConfig(**SIZES, num_kv_heads=4),
    "llama_grouped_tied": LlamaConfig(**SIZES, num_kv_heads=2, tied=True, rope_theta=500.0),
}


def model_of(config):
    models = {GPT2Config: GPT2, LlamaConfig: Llama, LSTMConfig: LSTMLanguageModel, ConvConfig: ConvLanguageModel}
    return models[type(config)](config)


def random_params(config, seed=0):
    """Norms near 1, everything else far enough from 0 that attention is not uniform."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(model_of(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    def values(path, leaf):
        x = 0.3 * draw.normal(size=leaf.shape).astype(np.float32)
        return x + 1 if path[-1].key == "scale" else x

    return jax.tree_util.tree_map_with_path(values, shapes)


def tokens(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)
