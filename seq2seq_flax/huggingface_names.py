"""Our parameters and the tensors of transformers' MarianMTModel: which of theirs holds which of ours."""

import functools
from collections.abc import Mapping

import jax
import numpy as np

from core_flax import weight_names
from core_flax.types import Params
from core_flax.weight_names import Tensor
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.model import Transformer
from seq2seq_flax.sharding import PARAM_RULES
from seq2seq_flax.task import init_params

ENCODER, DECODER = "model.encoder.", "model.decoder."
BIAS = "final_logits_bias"
"""Their bias of the scores, [1, V]; every file has it, of zeros where the model has none."""

MODULES = {
    "embeddings_token": "model.shared",
    "embeddings_source": ENCODER + "embed_tokens",
    "embeddings_target": DECODER + "embed_tokens",
    "embeddings_output": "lm_head",
    "encoder/layers/attention/query": ENCODER + "layers.*.self_attn.q_proj",
    "encoder/layers/attention/key": ENCODER + "layers.*.self_attn.k_proj",
    "encoder/layers/attention/value": ENCODER + "layers.*.self_attn.v_proj",
    "encoder/layers/attention/out": ENCODER + "layers.*.self_attn.out_proj",
    "encoder/layers/attention_norm": ENCODER + "layers.*.self_attn_layer_norm",
    "encoder/layers/mlp/up": ENCODER + "layers.*.fc1",
    "encoder/layers/mlp/down": ENCODER + "layers.*.fc2",
    "encoder/layers/mlp_norm": ENCODER + "layers.*.final_layer_norm",
    "decoder/layers/self_attention/query": DECODER + "layers.*.self_attn.q_proj",
    "decoder/layers/self_attention/key": DECODER + "layers.*.self_attn.k_proj",
    "decoder/layers/self_attention/value": DECODER + "layers.*.self_attn.v_proj",
    "decoder/layers/self_attention/out": DECODER + "layers.*.self_attn.out_proj",
    "decoder/layers/self_attention_norm": DECODER + "layers.*.self_attn_layer_norm",
    "decoder/layers/cross_attention/query": DECODER + "layers.*.encoder_attn.q_proj",
    "decoder/layers/cross_attention/key": DECODER + "layers.*.encoder_attn.k_proj",
    "decoder/layers/cross_attention/value": DECODER + "layers.*.encoder_attn.v_proj",
    "decoder/layers/cross_attention/out": DECODER + "layers.*.encoder_attn.out_proj",
    "decoder/layers/cross_attention_norm": DECODER + "layers.*.encoder_attn_layer_norm",
    "decoder/layers/mlp/up": DECODER + "layers.*.fc1",
    "decoder/layers/mlp/down": DECODER + "layers.*.fc2",
    "decoder/layers/mlp_norm": DECODER + "layers.*.final_layer_norm",
}
"""Our modules and theirs; * is the number of the layer."""

TIED = {
    "all": ("model.shared", ENCODER + "embed_tokens", DECODER + "embed_tokens", "lm_head"),
    "target": (DECODER + "embed_tokens", "lm_head"),
    "none": (),
}
"""Names of theirs for one and the same table, by how embeddings are tied; the first is that of newer files."""


@functools.cache
def tensors(config: TransformerConfig) -> dict[str, Tensor]:
    """All that a model has but for the bias of the scores, by the path of our parameter, in the order of our tree."""
    tree = dict(jax.eval_shape(lambda key: init_params(Transformer(config), key), jax.random.key(0)))
    tree.pop("output_bias", None)
    return weight_names.tensors_of(tree, MODULES, PARAM_RULES)


def params_from(arrays: Mapping[str, np.ndarray], config: TransformerConfig) -> Params:
    """Our tree of theirs by name, be they weights or gradients; a parameter of which there is nothing is absent."""
    params = dict(weight_names.params_from(arrays, tensors(config)))
    if config.output_bias and BIAS in arrays:
        params["output_bias"] = arrays[BIAS][0]
    return params


def arrays_from(params: Params, config: TransformerConfig) -> dict[str, np.ndarray]:
    """The inverse of params_from; with a bias of zeros where the model has none."""
    params = dict(params)
    bias = np.asarray(params.pop("output_bias", np.zeros(config.vocab_size, np.float32)))
    return {**weight_names.arrays_from(params, tensors(config)), BIAS: bias[None]}
