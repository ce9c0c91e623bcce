"""Our parameters and the tensors of transformers' BertForPreTraining: which of theirs holds which of ours."""

import functools
from collections.abc import Mapping

import jax
import numpy as np

from bert_flax.config import BertConfig
from bert_flax.model import BertForPreTraining
from bert_flax.sharding import PARAM_RULES
from core_flax import weight_names
from core_flax.types import Params
from core_flax.weight_names import Tensor

EMBEDDINGS, LAYER, PREDICTIONS = "bert.embeddings.", "bert.encoder.layer.*.", "cls.predictions."
MODULES = {
    "encoder/embeddings/token": EMBEDDINGS + "word_embeddings",
    "encoder/embeddings/position": EMBEDDINGS + "position_embeddings",
    "encoder/embeddings/segment": EMBEDDINGS + "token_type_embeddings",
    "encoder/embeddings/norm": EMBEDDINGS + "LayerNorm",
    "encoder/layers/attention/query": LAYER + "attention.self.query",
    "encoder/layers/attention/key": LAYER + "attention.self.key",
    "encoder/layers/attention/value": LAYER + "attention.self.value",
    "encoder/layers/attention/out": LAYER + "attention.output.dense",
    "encoder/layers/attention_norm": LAYER + "attention.output.LayerNorm",
    "encoder/layers/mlp/up": LAYER + "intermediate.dense",
    "encoder/layers/mlp/down": LAYER + "output.dense",
    "encoder/layers/mlp_norm": LAYER + "output.LayerNorm",
    "encoder/pooler": "bert.pooler.dense",
    "masked_language/transform": PREDICTIONS + "transform.dense",
    "masked_language/norm": PREDICTIONS + "transform.LayerNorm",
    "masked_language": PREDICTIONS.removesuffix("."),  # its bias
    "next_sentence": "cls.seq_relationship",
}
"""Our modules and theirs; * is the number of the layer."""

HEADS = {"encoder/pooler": "pooler", "masked_language": "masked-language head", "next_sentence": "next-sentence head"}
"""Modules that a model may lack, whole."""


@functools.cache
def tensors(config: BertConfig) -> dict[str, Tensor]:
    """All that BertForPreTraining has, by the path of our parameter, in the order of our tree."""
    ids, valid = jax.ShapeDtypeStruct((1, 1), "int32"), jax.ShapeDtypeStruct((1, 1), bool)
    tree = jax.eval_shape(BertForPreTraining(config).init, jax.random.key(0), ids, ids, valid, ids)["params"]
    return weight_names.tensors_of(tree, MODULES, PARAM_RULES)


def params_from(arrays: Mapping[str, np.ndarray], config: BertConfig) -> Params:
    """Our tree of theirs by name, be they weights or gradients; a parameter of which there is nothing is absent."""
    return weight_names.params_from(arrays, tensors(config))


def arrays_from(params: Params, config: BertConfig) -> dict[str, np.ndarray]:
    """The inverse of params_from."""
    return weight_names.arrays_from(params, tensors(config))
