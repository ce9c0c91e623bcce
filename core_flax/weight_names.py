"""Parameters of ours and the tensors that hold them in other programs' files: the way from one to the other.

Their linear layers hold weights as [outputs, inputs], ours as [inputs, outputs] with heads apart; their layers are
numbered, ours stacked over the first dim. Nothing is computed, so bits are kept both ways.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from core_flax.params import ParamRule, leaves, rule_for
from core_flax.types import Params, UserError


@dataclass(frozen=True)
class Tensor:
    """A parameter of ours, and what holds it in theirs.

    Attributes:
      names: their names, one a layer or one.
      shape: of each of them.
      our_shape: of the parameter, all layers together.
      turned: whether it maps inputs to outputs, which come in the other order.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]
    turned: bool

    def from_theirs(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The parameter, from their arrays by name."""
        return np.stack([self._turn(arrays[name]) for name in self.names]).reshape(self.our_shape)

    def to_theirs(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Their arrays by name, from the parameter."""
        shape = self.shape[::-1] if self.turned else self.shape
        parts = x.reshape(len(self.names), *shape)
        return {name: self._turn(part) for name, part in zip(self.names, parts, strict=True)}

    def _turn(self, x: np.ndarray) -> np.ndarray:
        return x.T if self.turned else x


def tensors_of(
    params: Params, modules: Mapping[str, str], rules: tuple[ParamRule, ...], outputs_first: bool = True
) -> dict[str, Tensor]:
    """What holds each parameter, by its path and in the order of the tree.

    Args:
      params: arrays or shapes.
      modules: our modules and theirs; * is the number of the layer.
      rules: the parameter table.
      outputs_first: whether weights of theirs are [outputs, inputs].
    """
    return {path: _tensor(path, leaf.shape, modules, rules, outputs_first) for path, leaf in leaves(params)}


def _tensor(
    path: str,
    our_shape: tuple[int, ...],
    modules: Mapping[str, str],
    rules: tuple[ParamRule, ...],
    outputs_first: bool,
) -> Tensor:
    module, _, leaf = path.rpartition("/")
    rule = rule_for(path, rules)
    pattern = f"{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"
    assert ("*" in pattern) == (rule.num_stacked > 0), f"{path} is {rule.axes!r} and {pattern}"
    num_layers = our_shape[0] if rule.num_stacked else 1
    one = our_shape[rule.num_stacked :]
    turned = leaf == "kernel" and outputs_first
    if leaf == "kernel":
        shape = math.prod(one[: rule.num_inputs]), math.prod(one[rule.num_inputs :])
        shape = shape[::-1] if turned else shape
    else:
        shape = one if leaf == "embedding" else (math.prod(one),)
    return Tensor(tuple(pattern.replace("*", str(layer)) for layer in range(num_layers)), shape, our_shape, turned)


def params_from(arrays: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor]) -> Params:
    """Our tree of theirs by name, be they weights or gradients; a parameter of which there is nothing is absent."""
    found = {path: tensor.from_theirs(arrays) for path, tensor in tensors.items() if tensor.names[0] in arrays}
    return unflatten_dict(found, sep="/")


def arrays_from(params: Params, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The inverse of params_from."""
    arrays = {}
    for path, x in flatten_dict(params, sep="/").items():
        arrays |= tensors[path].to_theirs(np.asarray(x))
    return arrays


def check_array(folder: Path, name: str, x: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises UserError if an array that was read is not of the shape that config.json gives, or not of numbers."""
    if x.shape != shape or x.dtype != np.float32:
        raise UserError(
            f"{folder}: {name} is {x.dtype}{list(x.shape)} in the weights, and config.json asks for float32"
            f"{list(shape)}; they belong to different models"
        )
    if not np.isfinite(x).all():
        raise UserError(f"{folder}: {name} holds a number that is not finite (nan or inf); the weights are damaged")
