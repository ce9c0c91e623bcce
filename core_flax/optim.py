"""Optimizers that know what each parameter is: a matrix of hidden layers, a head, an embedding, a bias or a norm.

The family's table (params.ParamRule) says which parameters decay, which leading dims merely stack layers (a layer is
treated as if it stood alone: its own trust ratio, its own factored moments, its own orthogonalised matrix) and which
dims of a kernel are its inputs.

``make_optimizer`` composes optax transformations under names of our own. Its state is a plain dict from stage name to
the stage's state, without the stages that keep none; ``flax.serialization.to_state_dict`` makes nested dicts of it,
with nothing but our names, optax's field names (count, mu, nu, ema) and the parameter paths. It is the layout on disk:

=========  ==================================================================================
adamw      adam {count, mu, nu}, schedule {count}
lamb       adam {count, mu, nu}, schedule {count}
adafactor  factored {count, row, col, full}, schedule {count}; with beta1 momentum {count, ema}
lion       lion {count, mu}, schedule {count}
muon       muon {count, mu} of matrices, adam {count, mu, nu} of the rest, schedule {count}
sgd        schedule {count}; with beta1 momentum {trace}
=========  ==================================================================================

Every moment has its parameter's path and shape, but for adafactor's row ([..stack, in]) and col ([..stack, out]).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from core_flax.config import OptimizerConfig
from core_flax.params import ParamRule, map_rules
from core_flax.types import Array, UserError

Tree = Any
"""Nested dict of arrays like the parameters. optax types its trees too widely for a checker to see that."""
Stage = tuple[str, optax.GradientTransformation]
Rules = tuple[ParamRule, ...]

DEFAULTS: dict[str, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "lamb": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-6},
    "adafactor": {"beta1": 0.0, "epsilon": 1e-30},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "muon": {"beta1": 0.95, "beta2": 0.999, "epsilon": 1e-8},
    "sgd": {"beta1": 0.0},
}
"""What each optimizer uses and its published value; a setting absent here is refused for that optimizer."""

MUON_ADAM_BETA1 = 0.9
"""First-moment decay of the AdamW that serves what Muon does not; optimizer.beta1 is Muon's momentum."""
MUON_RMS = 0.2
"""RMS of a Muon update: about that of AdamW's, so that both share learning rate and decay (Liu et al. 2025, 2.2)."""
MIN_FACTORED_DIM = 128
"""Adafactor keeps full second moments of matrices with a side below this, as its authors' code does."""


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, rules: Rules) -> optax.GradientTransformation:
    """Clipping by global norm, the named update rule, decoupled weight decay and the learning rate, in this order.

    - adamw: Loshchilov & Hutter 2019, algorithm 2; with bias correction.
    - lamb: You et al. 2020, algorithm 2. As in the authors' code, biases and norms have a trust ratio of 1.
    - adafactor: Shazeer & Stern 2018, algorithm 4 with 1 - t^-0.8 and relative step size: the learning rate is a share
      of each parameter's RMS. Momentum (beta1) and weight decay, if any, come before the learning rate.
    - lion: Chen et al. 2023, algorithm 2.
    - muon: Jordan 2024 (Nesterov momentum, five Newton-Schulz steps) for kind matrix, scaled to AdamW's RMS as in Liu
      et al. 2025, section 2.2; AdamW for every other kind. Dims are grouped into (in, out) by the rule.
    - sgd: the gradient or, with beta1, the sum of it and beta1 times the sum before (Polyak 1964).

    Args:
        config: Update rule and its settings; None takes the published default (``DEFAULTS``).
        schedule: Learning rate by number of updates.
        rules: The family's table of parameter kinds.

    Raises:
        UserError: On a setting that the update rule does not use.
    """
    settings = _settings(config)
    clip = [] if config.clip_norm is None else [("clip", _clip(config.clip_norm))]
    decay = [("decay", _decay(config.weight_decay, rules))] if config.weight_decay else []
    stages = _UPDATE_RULES[config.name](settings, rules, decay)
    return _chain([*clip, *stages, ("schedule", optax.scale_by_learning_rate(schedule))])


def _settings(config: OptimizerConfig) -> dict[str, float]:
    """beta1, beta2 and epsilon as far as the optimizer has them; refuses what it would ignore."""
    if config.name not in DEFAULTS:
        raise UserError(f"unknown optimizer.name {config.name!r}; choose one of {', '.join(DEFAULTS)}")
    settings = dict(DEFAULTS[config.name])
    for field in ("beta1", "beta2", "epsilon"):
        value = getattr(config, field)
        if value is None:
            continue
        if field not in settings:
            raise UserError(f"optimizer.{field} is not used by {config.name}; leave it out")
        settings[field] = value
    return settings


def _adam(settings: dict[str, float]) -> optax.GradientTransformation:
    return optax.scale_by_adam(settings["beta1"], settings["beta2"], settings["epsilon"])


def _adamw_stages(settings: dict[str, float], rules: Rules, decay: list[Stage]) -> list[Stage]:
    del rules
    return [("adam", _adam(settings)), *decay]


def _lamb_stages(settings: dict[str, float], rules: Rules, decay: list[Stage]) -> list[Stage]:
    ratio = _each_layer(optax.scale_by_trust_ratio(), rules, _decays)
    return [("adam", _adam(settings)), *decay, ("trust_ratio", ratio)]


def _adafactor_stages(settings: dict[str, float], rules: Rules, decay: list[Stage]) -> list[Stage]:
    stages = [
        ("factored", _scale_by_factored_rms(settings["epsilon"], rules)),
        ("block_clip", _each_layer(optax.clip_by_block_rms(1.0), rules)),
        ("parameter_scale", _each_layer(optax.scale_by_param_block_rms(1e-3), rules)),
    ]
    if settings["beta1"]:
        stages.append(("momentum", optax.ema(settings["beta1"], debias=False)))
    return [*stages, *decay]


def _lion_stages(settings: dict[str, float], rules: Rules, decay: list[Stage]) -> list[Stage]:
    del rules
    return [("lion", optax.scale_by_lion(settings["beta1"], settings["beta2"])), *decay]


def _muon_stages(settings: dict[str, float], rules: Rules, decay: list[Stage]) -> list[Stage]:
    adam = _adam({**settings, "beta1": MUON_ADAM_BETA1})
    return [
        ("muon", _only(_scale_by_muon(settings["beta1"], rules), rules, lambda rule: rule.kind == "matrix")),
        ("adam", _only(adam, rules, lambda rule: rule.kind != "matrix")),
        *decay,
    ]


def _sgd_stages(settings: dict[str, float], rules: Rules, decay: list[Stage]) -> list[Stage]:
    del rules
    momentum = [("momentum", optax.trace(settings["beta1"]))] if settings["beta1"] else []
    return [*momentum, *decay]


_UPDATE_RULES: dict[str, Callable[[dict[str, float], Rules, list[Stage]], list[Stage]]] = {
    "adamw": _adamw_stages,
    "lamb": _lamb_stages,
    "adafactor": _adafactor_stages,
    "lion": _lion_stages,
    "muon": _muon_stages,
    "sgd": _sgd_stages,
}


def _decays(rule: ParamRule) -> bool:
    """Whether it is a matrix of some kind; biases and norms have no decay and no trust ratio."""
    return rule.kind not in ("bias", "norm")


def _matrix_dims(rule: ParamRule, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which dims are the inputs and which the outputs of one layer's matrix; a table maps its first dim."""
    first = rule.num_stacked
    split = first + (1 if rule.kind == "embedding" else rule.num_inputs)
    if not first < split < len(shape):
        raise ValueError(f'no inputs or no outputs in {rule}; the axes of a {rule.kind} read like "layer embed | mlp"')
    return tuple(range(first, split)), tuple(range(split, len(shape)))


def _matrix_shape(rule: ParamRule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with input dims merged and output dims merged: [..stack, in, out]."""
    inputs, outputs = _matrix_dims(rule, shape)
    return *shape[: inputs[0]], math.prod(shape[dim] for dim in inputs), math.prod(shape[dim] for dim in outputs)


def _rules_of(tree: Tree, rules: Rules) -> Tree:
    """The rule of every leaf. Raises ValueError naming a parameter that does not match exactly one."""
    return map_rules(lambda path, leaf, rule: rule, tree, rules)


def _flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by path, such as ``layers/mlp/up/kernel``."""
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def _unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(leaves, sep="/")


def _chain(stages: Sequence[Stage]) -> optax.GradientTransformation:
    """optax.named_chain with a plain dict for its state, in which only the stages that keep one appear."""
    chain = optax.named_chain(*stages)

    def init(params: Tree) -> Any:
        states: Any = chain.init(params)
        return {name: state for name, state in states.items() if jax.tree.leaves(state)}

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Any, Any]:
        whole = {name: state.get(name, optax.EmptyState()) for name, _ in stages}
        updates, new = chain.update(updates, whole, params)
        return updates, {name: new[name] for name in state}  # pyright: ignore[reportIndexIssue]

    return optax.GradientTransformation(init, update)


def sums_of_squares(tree: Tree) -> Array:
    """The sum of squares of each array, float32, in the order of jax.tree.leaves: the squares of their L2 norms."""
    return jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)])


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Clipping by the L2 norm of all gradients together (Pascanu et al. 2013, section 3.2).

    One factor for all, 1 if nothing is to be clipped, so that it is applied in passing; optax's own selects and divides
    each element, for which XLA writes the clipped gradients out.
    """

    def update(updates: Tree, params: Tree = None) -> Tree:
        del params
        factor = jnp.minimum(1.0, max_norm / jnp.sqrt(jnp.sum(sums_of_squares(updates))))
        return jax.tree.map(lambda update: factor * update, updates)

    return optax.stateless(update)


def _stateless(function: Callable[[ParamRule, Array, Array], Array], rules: Rules) -> optax.GradientTransformation:
    """A stage that maps every update with its rule and its parameter."""

    def update(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(function, _rules_of(updates, rules), updates, params)

    return optax.stateless(update)


def _decay(rate: float, rules: Rules) -> optax.GradientTransformation:
    return _stateless(lambda rule, update, param: update + rate * param if _decays(rule) else update, rules)


def _each_layer(
    stage: optax.GradientTransformation, rules: Rules, where: Callable[[ParamRule], bool] = lambda rule: True
) -> optax.GradientTransformation:
    """A stateless stage applied to every layer of a stacked parameter on its own, where the rule says so."""

    def one_layer(update: Array, param: Array) -> Array:
        return stage.update(update, optax.EmptyState(), param)[0]

    def apply(rule: ParamRule, update: Array, param: Array) -> Array:
        function = one_layer
        for _ in range(rule.num_stacked):
            function = jax.vmap(function)
        return function(update, param) if where(rule) else update

    return _stateless(apply, rules)


def _only(
    stage: optax.GradientTransformation, rules: Rules, keep: Callable[[ParamRule], bool]
) -> optax.GradientTransformation:
    """The stage on the parameters to keep; the others pass and leave no trace in its state (unlike optax.masked)."""

    def pick(tree: Tree) -> Tree:
        kinds = _flatten(_rules_of(tree, rules))
        return _unflatten({path: value for path, value in _flatten(tree).items() if keep(kinds[path])})

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Any, Any]:
        changed, state = stage.update(pick(updates), state, pick(params))
        return _unflatten({**_flatten(updates), **_flatten(changed)}), state

    return optax.GradientTransformation(lambda params: stage.init(pick(params)), update)


def _scale_by_muon(momentum: float, rules: Rules) -> optax.GradientTransformation:
    """optax's Muon with our dims and scale. Its coefficients, which it keeps in its state, are left out of ours."""

    def dims(path: str, x: Array, rule: ParamRule) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(*_matrix_dims(rule, x.shape))

    def scale(rule: ParamRule, update: Array) -> Array:
        return MUON_RMS * math.sqrt(max(_matrix_shape(rule, update.shape)[-2:])) * update

    def all_dims(updates: Tree) -> Tree:
        return map_rules(dims, updates, rules)

    muon = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=all_dims)

    def init(params: Tree) -> Any:
        state: Any = muon.init(params)
        return {"count": state.count, "mu": state.mu}

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Any, Any]:
        del params
        empty: Any = muon.init({})
        updates, new = muon.update(updates, empty._replace(**state))
        new = new._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        return jax.tree.map(scale, _rules_of(updates, rules), updates), {name: new[name] for name in state}

    return optax.GradientTransformation(init, update)


def _scale_by_factored_rms(epsilon: float, rules: Rules) -> optax.GradientTransformation:
    """Adafactor's second moments (algorithm 4), factored over (in, out) of each layer's matrix.

    optax's own factors the two largest dims of the array, which of a stacked kernel may be the layers, and of a w_DHK
    kernel leaves out the heads.
    """

    def init(params: Tree) -> Any:
        kinds, leaves = _flatten(_rules_of(params, rules)), {}
        for path, param in _flatten(params).items():
            *stack, rows, cols = _matrix_shape(kinds[path], param.shape) if _decays(kinds[path]) else (1, 1)
            if min(rows, cols) >= MIN_FACTORED_DIM:
                leaves[f"row/{path}"] = jnp.zeros((*stack, rows), param.dtype)
                leaves[f"col/{path}"] = jnp.zeros((*stack, cols), param.dtype)
            else:
                leaves[f"full/{path}"] = jnp.zeros_like(param)
        return {"count": jnp.zeros([], jnp.int32), **_unflatten(leaves)}

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Any, Any]:
        del params
        count = state["count"] + 1
        decay = 1.0 - count.astype(jnp.float32) ** -0.8
        kinds, old, new, scaled = _flatten(_rules_of(updates, rules)), _flatten(state), {"count": count}, {}

        def average(name: str, value: Array) -> Array:
            new[name] = decay * old[name] + (1.0 - decay) * value
            return new[name]

        for path, update in _flatten(updates).items():
            if f"full/{path}" in old:
                scaled[path] = update * jax.lax.rsqrt(average(f"full/{path}", update**2 + epsilon))
                continue
            update_IO = update.reshape(_matrix_shape(kinds[path], update.shape))
            square_IO = update_IO**2 + epsilon
            row_I = average(f"row/{path}", square_IO.mean(-1))
            col_O = average(f"col/{path}", square_IO.mean(-2))
            row_share_I = row_I / row_I.mean(-1, keepdims=True)
            update_IO = update_IO * jax.lax.rsqrt(row_share_I)[..., :, None] * jax.lax.rsqrt(col_O)[..., None, :]
            scaled[path] = update_IO.reshape(update.shape)
        return _unflatten(scaled), _unflatten(new)

    return optax.GradientTransformation(init, update)
