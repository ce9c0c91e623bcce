"""Our parameters and the tensors of transformers' BertForPreTraining: names, shapes, and the way from one to the other.

Their linear layers hold weights as [outputs, inputs], ours as [inputs, outputs] with heads apart; their layers are
numbered, ours stacked over the first dim. Nothing is computed, so bits are kept both ways.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bert_flax.config import BertConfig
from bert_flax.model import BertForPreTraining
from bert_flax.sharding import PARAM_RULES
from core_flax.params import leaves, rule_for
from core_flax.types import Params

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


@dataclass(frozen=True)
class Tensor:
    """A parameter of ours, and what holds it in theirs.

    Attributes:
      names: their names, one a layer or one.
      shape: of each of them.
      our_shape: of the parameter, all layers together.
      is_matrix: whether it maps inputs to outputs, which come in the other order.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    is_matrix: bool

    def from_theirs(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The parameter, from their arrays by name."""
        return np.stack([self._turned(arrays[name]) for name in self.names]).reshape(self.our_shape)

    def to_theirs(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Their arrays by name, from the parameter."""
        shape = self.shape[::-1] if self.is_matrix else self.shape
        parts = x.reshape(len(self.names), *shape)
        return {name: self._turned(part) for name, part in zip(self.names, parts, strict=True)}

    def _turned(self, x: np.ndarray) -> np.ndarray:
        return x.T if self.is_matrix else x


@functools.cache
def tensors(config: BertConfig) -> dict[str, Tensor]:
    """All that BertForPreTraining has, by the path of our parameter, in the order of our tree."""
    ids, valid = jax.ShapeDtypeStruct((1, 1), "int32"), jax.ShapeDtypeStruct((1, 1), bool)
    tree = jax.eval_shape(BertForPreTraining(config).init, jax.random.key(0), ids, ids, valid, ids)["params"]
    return {path: _tensor(path, leaf.shape, config.num_layers) for path, leaf in leaves(tree)}


def _tensor(path: str, our_shape: tuple[int, ...], num_layers: int) -> Tensor:
    module, _, leaf = path.rpartition("/")
    pattern = f"{MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    names = tuple(pattern.replace("*", str(layer)) for layer in range(num_layers)) if "*" in pattern else (pattern,)
    rule = rule_for(path, PARAM_RULES)
    one = our_shape[rule.num_stacked :]
    if leaf == "kernel":
        shape = math.prod(one[rule.num_inputs :]), math.prod(one[: rule.num_inputs])
    else:
        shape = one if leaf == "embedding" else (math.prod(one),)
    return Tensor(names, shape, our_shape, leaf == "kernel")


def params_from(arrays: Mapping[str, np.ndarray], config: BertConfig) -> Params:
    """Our tree of theirs by name, be they weights or gradients; a parameter of which there is nothing is absent."""
    found = {path: tensor.from_theirs(arrays) for path, tensor in tensors(config).items() if tensor.names[0] in arrays}
    return unflatten_dict(found, sep="/")


def arrays_from(params: Params, config: BertConfig) -> dict[str, np.ndarray]:
    """The inverse of params_from."""
    arrays = {}
    for path, x in flatten_dict(params, sep="/").items():
        arrays |= tensors(config)[path].to_theirs(np.asarray(x))
    return arrays
