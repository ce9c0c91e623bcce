"""The parameter table: one line per parameter says its dims, and with them how it is sharded and optimised."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from core_flax.types import Array, Params

Kind = Literal["matrix", "embedding", "head", "bias", "norm"]


@dataclass(frozen=True)
class ParamRule:
    """One line of a family's parameter table.

    Attributes:
      pattern: regular expression that the whole path of the parameter matches ("layers/attention/query/kernel").
      kind: matrix (a hidden layer's linear map), embedding, head (a map to outputs), bias or norm. Only matrices are
        orthogonalised by Muon; biases and norms do not decay.
      axes: the logical axis of each dim, in order; "layer" marks a dim over which equal layers are stacked, and "|"
        stands between a matrix's inputs and its outputs: "layer embed | heads head_width".
    """

    pattern: str
    kind: Kind
    axes: str

    @property
    def names(self) -> tuple[str, ...]:
        """The logical axis of each dim."""
        return tuple(name for name in self.axes.split() if name != "|")

    @property
    def num_stacked(self) -> int:
        """Leading dims that only stack layers: norms, trust ratios and factors are taken for each layer alone."""
        return sum(name == "layer" for name in self.names)

    @property
    def num_inputs(self) -> int:
        """Dims of a matrix that it maps from (after the stacked ones)."""
        before, _, _ = self.axes.partition("|")
        return len(before.split()) - self.num_stacked


def path_of(keys: tuple[Any, ...]) -> str:
    """A jax key path as "layers/attention/query/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def leaves(params: Params) -> Iterator[tuple[str, Array]]:
    """(path, array) of every parameter, in the order of jax.tree.leaves."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        yield path_of(keys), leaf


def rule_for(path: str, rules: tuple[ParamRule, ...]) -> ParamRule:
    """The one rule that matches. Raises ValueError if none or several do."""
    matching = [rule for rule in rules if re.fullmatch(rule.pattern, path)]
    if len(matching) != 1:
        found = "no line" if not matching else f"{len(matching)} lines ({', '.join(r.pattern for r in matching)})"
        raise ValueError(f"parameter {path!r} matches {found} of the parameter table; it must match exactly one")
    return matching[0]


def map_rules(function: Any, params: Params, rules: tuple[ParamRule, ...]) -> Any:
    """The tree of function(path, leaf, rule) over all parameters.

    Raises:
      ValueError: a parameter matches no rule or several, or has another number of dims than its rule.
    """

    def apply(keys: tuple[Any, ...], leaf: Array) -> Any:
        path = path_of(keys)
        rule = rule_for(path, rules)
        if len(rule.names) != len(leaf.shape):
            raise ValueError(f"parameter {path!r} has shape {leaf.shape}, its line in the table says {rule.axes!r}")
        return function(path, leaf, rule)

    return jax.tree_util.tree_map_with_path(apply, params)


def count(params: Mapping[str, Any]) -> int:
    """Number of parameters (scalars, not arrays)."""
    return sum(int(leaf.size) for _, leaf in leaves(params))
