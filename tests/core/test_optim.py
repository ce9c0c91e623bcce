"""Each optimizer against its paper in numpy, one layer's matrix at a time, and what the state looks like on disk."""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy_optim import DECAY, UPDATES

from core_flax import optim
from core_flax.config import OptimizerConfig
from core_flax.optim import make_optimizer
from core_flax.params import ParamRule
from core_flax.types import UserError

NAMES = tuple(optim.DEFAULTS)
N, D, H, K, F, V = 2, 6, 2, 4, 10, 11
LEARNING_RATE, STEPS = 0.1, 5

SHAPES = {
    "embeddings/token/embedding": (V, D),
    "embeddings/position/embedding": (5, D),
    "embeddings/segment/embedding": (2, D),
    "embeddings/norm/scale": (D,),
    "embeddings/norm/bias": (D,),
    **{f"layers/attention/{name}/kernel": (N, D, H, K) for name in ("query", "key", "value")},
    **{f"layers/attention/{name}/bias": (N, H, K) for name in ("query", "key", "value")},
    "layers/attention/out/kernel": (N, H, K, D),
    "layers/attention/out/bias": (N, D),
    "layers/attention_norm/scale": (N, D),
    "layers/attention_norm/bias": (N, D),
    "layers/mlp/up/kernel": (N, D, F),
    "layers/mlp/up/bias": (N, F),
    "layers/mlp/down/kernel": (N, F, D),
    "layers/mlp/down/bias": (N, D),
    "layers/mlp_norm/scale": (N, D),
    "layers/mlp_norm/bias": (N, D),
    "pooler/kernel": (D, D),
    "pooler/bias": (D,),
    "mlm/transform/kernel": (D, D),
    "mlm/transform/bias": (D,),
    "mlm/norm/scale": (D,),
    "mlm/norm/bias": (D,),
    "mlm/bias": (V,),
    "next_sentence/kernel": (D, 2),
    "next_sentence/bias": (2,),
}
RULES = (
    ParamRule("embeddings/token/embedding", "embedding", "vocab embed"),
    ParamRule("embeddings/(position|segment)/embedding", "embedding", "small embed"),
    ParamRule("embeddings/norm/(scale|bias)", "norm", "embed"),
    ParamRule("layers/attention/(query|key|value)/kernel", "matrix", "layer embed | heads head_width"),
    ParamRule("layers/attention/(query|key|value)/bias", "bias", "layer heads head_width"),
    ParamRule("layers/attention/out/kernel", "matrix", "layer heads head_width | embed"),
    ParamRule("layers/(attention/out|mlp/down)/bias", "bias", "layer embed"),
    ParamRule("layers/(attention|mlp)_norm/(scale|bias)", "norm", "layer embed"),
    ParamRule("layers/mlp/up/kernel", "matrix", "layer embed | mlp"),
    ParamRule("layers/mlp/up/bias", "bias", "layer mlp"),
    ParamRule("layers/mlp/down/kernel", "matrix", "layer mlp | embed"),
    ParamRule("(pooler|mlm/transform)/kernel", "matrix", "embed | embed_out"),
    ParamRule("(pooler|mlm/transform)/bias", "bias", "embed"),
    ParamRule("mlm/norm/(scale|bias)", "norm", "embed"),
    ParamRule("mlm/bias", "bias", "vocab"),
    ParamRule("next_sentence/kernel", "head", "embed | small"),
    ParamRule("next_sentence/bias", "bias", "small"),
)
UNSTACKED_RULES = tuple(
    ParamRule(rule.pattern.replace("layers/", r"layers/\d/"), rule.kind, rule.axes.replace("layer ", ""))
    for rule in RULES
)
NUM_IN = {"layers/attention/out/kernel": 2}
"""Input dims of a kernel, written down here again: the references below know nothing of the table."""


@pytest.fixture(autouse=True)
def small_matrices_factor(monkeypatch):
    monkeypatch.setattr(optim, "MIN_FACTORED_DIM", 5)


def draw(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: scale * rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}


GRADIENTS = [draw(100 + step, 0.3 * 0.2**step) for step in range(STEPS)]
"""Of norms 8, 1.7, 0.3, ...: clipping to 1 and to 0.5 differ in more than a factor."""


def tree(leaves: dict[str, np.ndarray]) -> dict:
    return unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def flat(params: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def unstack(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    layers = {
        path.replace("layers/", f"layers/{layer}/"): leaf[layer]
        for path, leaf in leaves.items()
        if path.startswith("layers/")
        for layer in range(N)
    }
    return layers | {path: leaf for path, leaf in leaves.items() if not path.startswith("layers/")}


def run(config: OptimizerConfig, gradients: list[dict] = GRADIENTS, rules=RULES, start=None):
    """Parameters by path after as many steps as there are gradients, and the last optimizer state."""
    params = tree(draw(0) if start is None else start)
    optimizer = make_optimizer(config, lambda count: LEARNING_RATE / (1.0 + count), rules)
    state = optimizer.init(params)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # there are fifty to compile
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, tree(gradient))
    return flat(params), state


@functools.cache
def default_run(name: str):
    """Several tests look at the same run; compiling it takes a second or two."""
    return run(settings(name))


def settings(name: str, **changes) -> OptimizerConfig:
    return dataclasses.replace(OptimizerConfig(name=name, weight_decay=DECAY, clip_norm=None), **changes)


def reference(name: str) -> dict[str, np.ndarray]:
    """Parameters of unstacked layers after STEPS updates."""
    params, steps = unstack(draw(0)), [unstack(gradient) for gradient in GRADIENTS]
    for path, start in params.items():
        decays = path.endswith(("kernel", "embedding"))
        hidden = path.endswith("kernel") and "next_sentence" not in path
        shape = start.shape
        if path.endswith("kernel"):
            split = 2 if "attention/out" in path else 1
            shape = (math.prod(start.shape[:split]), math.prod(start.shape[split:]))
        w = start.astype(np.float64).reshape(shape)
        memory = {"m": np.zeros(shape), "v": np.zeros(shape)}
        for t, gradients in enumerate(steps, 1):
            g = gradients[path].astype(np.float64).reshape(shape)
            w = w - LEARNING_RATE / t * UPDATES[name](w, g, t, memory, decays, hidden)
        params[path] = w.reshape(start.shape)
    return params


@pytest.mark.parametrize("name", NAMES)
def test_against_numpy(name):
    got, _ = default_run(name)
    want = reference(name)
    for path, value in unstack(got).items():
        np.testing.assert_allclose(value, want[path], rtol=1e-4, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_equal_layers_that_stand_alone(name):
    stacked, _ = default_run(name)
    alone, _ = run(settings(name), [unstack(gradient) for gradient in GRADIENTS], UNSTACKED_RULES, unstack(draw(0)))
    stacked = unstack(stacked)
    assert stacked.keys() == alone.keys()
    for path, value in alone.items():
        np.testing.assert_allclose(stacked[path], value, rtol=1e-5, atol=1e-5, err_msg=path)


def test_adamw_and_lion_are_those_of_optax():
    def decays(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    def schedule(count):
        return LEARNING_RATE / (1.0 + count)

    for name, theirs in {
        "adamw": optax.adamw(schedule, weight_decay=DECAY, mask=decays),
        "lion": optax.lion(schedule, weight_decay=DECAY, mask=decays),
    }.items():
        params = tree(draw(0))
        state = theirs.init(params)
        step = jax.jit(theirs.update)
        for gradient in GRADIENTS:
            updates, state = step(tree(gradient), state, params)
            params = optax.apply_updates(params, updates)
        got, _ = default_run(name)
        for path, value in flat(params).items():
            np.testing.assert_allclose(got[path], value, rtol=1e-6, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_no_decay_on_norms_and_biases(name):
    without, _ = run(settings(name, weight_decay=0.0))
    with_decay, _ = default_run(name)
    for path, value in without.items():
        decays = path.endswith(("kernel", "embedding"))
        assert np.array_equal(value, with_decay[path]) != decays, path


def test_muon_makes_each_layer_orthogonal():
    """Each layer's singular values come near 1, also those of a layer whose gradient is 1000 times smaller."""
    gradient = draw(1)
    gradient["layers/mlp/up/kernel"][1] *= 1e-3
    before = draw(0)
    after, _ = run(settings("muon", weight_decay=0.0), [gradient])
    for path, num_in in (("layers/mlp/up/kernel", 1), ("layers/attention/out/kernel", 2)):
        for layer in range(N):
            update = (after[path] - before[path])[layer] / (LEARNING_RATE * optim.MUON_RMS)
            update = update.reshape(math.prod(update.shape[:num_in]), -1)
            values = np.linalg.svd(update / math.sqrt(max(update.shape)), compute_uv=False)
            assert 0.3 < values.min() < values.max() < 1.3, (path, layer, values)


def test_lamb_starts_parameters_of_norm_zero():
    start = draw(0)
    start["pooler/kernel"][:] = 0
    after, _ = run(settings("lamb"), GRADIENTS[:1], start=start)
    np.testing.assert_allclose(np.abs(after["pooler/kernel"]), LEARNING_RATE, rtol=1e-3)


def test_adafactor_factors_over_inputs_and_outputs_and_never_over_layers(monkeypatch):
    monkeypatch.undo()
    assert optim.MIN_FACTORED_DIM == 128
    wide = (
        ParamRule("kernel", "matrix", "layer embed | heads head_width"),
        ParamRule("narrow", "matrix", "layer embed | mlp"),
        ParamRule("table", "embedding", "vocab embed"),
        ParamRule("norm", "norm", "layer embed"),
    )
    shapes = {"kernel": (200, 128, 4, 32), "narrow": (200, 127, 128), "table": (130, 128), "norm": (200, 128)}
    optimizer = make_optimizer(settings("adafactor"), lambda count: 0.1, wide)
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    state = jax.eval_shape(optimizer.init, params)["factored"]
    assert jax.tree.map(lambda x: x.shape, {name: state[name] for name in ("row", "col", "full")}) == {
        "row": {"kernel": (200, 128), "table": (130,)},
        "col": {"kernel": (200, 128), "table": (128,)},
        "full": {"narrow": (200, 127, 128), "norm": (200, 128)},
    }


def test_clipping_is_by_the_norm_of_all_gradients():
    gradient = {path: np.zeros(shape, np.float32) for path, shape in SHAPES.items()}
    gradient["pooler/kernel"][0, 0], gradient["mlm/bias"][0] = 3.0, 4.0
    first, _ = run(settings("adamw", epsilon=1.0, weight_decay=0.0, clip_norm=1.0), [gradient])
    start = draw(0)
    np.testing.assert_allclose(
        start["pooler/kernel"] - first["pooler/kernel"], gradient["pooler/kernel"] * 0.1 * 0.6 / 3 / 1.6, atol=1e-6
    )
    np.testing.assert_allclose(
        start["mlm/bias"] - first["mlm/bias"], gradient["mlm/bias"] * 0.1 * 0.8 / 4 / 1.8, atol=1e-6
    )
    unclipped, _ = run(settings("adamw", clip_norm=1e9))
    for path, value in default_run("adamw")[0].items():
        np.testing.assert_allclose(unclipped[path], value, rtol=1e-6, atol=1e-7)


def test_sgd_with_momentum_is_that_of_optax():
    params, theirs = tree(draw(0)), optax.sgd(lambda count: LEARNING_RATE / (1.0 + count), momentum=0.8)
    state = theirs.init(params)
    for gradient in GRADIENTS:
        updates, state = theirs.update(tree(gradient), state)
        params = optax.apply_updates(params, updates)
    got, state = run(settings("sgd", weight_decay=0.0, beta1=0.8))
    assert set(flatten_dict(serialization.to_state_dict(state), sep="/")) == SCHEMA["sgd"] | under(
        "momentum/trace", MIRROR
    )
    for path, value in flat(params).items():
        np.testing.assert_allclose(got[path], value, rtol=1e-6, atol=1e-6, err_msg=path)


MIRROR = set(SHAPES)
MATRICES = {path for path in SHAPES if path.endswith("kernel") and "next_sentence" not in path}
FACTORED = MATRICES | {"embeddings/token/embedding", "embeddings/position/embedding"}


def under(prefix: str, paths: set[str]) -> set[str]:
    return {f"{prefix}/{path}" for path in paths}


SCHEMA = {
    "adamw": {"adam/count", "schedule/count"} | under("adam/mu", MIRROR) | under("adam/nu", MIRROR),
    "lamb": {"adam/count", "schedule/count"} | under("adam/mu", MIRROR) | under("adam/nu", MIRROR),
    "adafactor": {"factored/count", "schedule/count"}
    | under("factored/row", FACTORED)
    | under("factored/col", FACTORED)
    | under("factored/full", MIRROR - FACTORED),
    "lion": {"lion/count", "schedule/count"} | under("lion/mu", MIRROR),
    "muon": {"muon/count", "adam/count", "schedule/count"}
    | under("muon/mu", MATRICES)
    | under("adam/mu", MIRROR - MATRICES)
    | under("adam/nu", MIRROR - MATRICES),
    "sgd": {"schedule/count"},
}


@pytest.mark.parametrize("name", NAMES)
def test_state_on_disk(name):
    """Our names and nothing else, no empty nodes, and what is restored is what was saved."""
    _, state = default_run(name)
    stored = serialization.to_state_dict(state)
    leaves = flatten_dict(stored, sep="/", keep_empty_nodes=True)
    assert set(leaves) == SCHEMA[name]
    assert all(isinstance(leaf, jax.Array) for leaf in leaves.values())
    # Clipping keeps no state: it may be turned on or off without a change of the layout.
    start = make_optimizer(settings(name, clip_norm=1.0), lambda count: 0.1, RULES).init(tree(draw(0)))
    restored = serialization.from_state_dict(start, stored)
    assert jax.tree.structure(restored) == jax.tree.structure(state) == jax.tree.structure(start)
    assert all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves(state)))


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_that_no_rule_matches_is_an_error(name):
    rules = tuple(rule for rule in RULES if rule.pattern != "mlm/bias")
    with pytest.raises(ValueError, match="mlm/bias"):
        run(settings(name), rules=rules)
    with pytest.raises(ValueError, match="mlm/bias"):
        run(settings(name), rules=(*RULES, ParamRule("mlm/.*", "bias", "vocab")))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_a_matrix_without_outputs_is_an_error(name):
    rules = tuple(dataclasses.replace(rule, axes=rule.axes.replace("embed | mlp", "embed mlp")) for rule in RULES)
    with pytest.raises(ValueError, match=r"no inputs or no outputs in .*layers/mlp/up/kernel"):
        run(settings(name), rules=rules)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OptimizerConfig(name="adam"), "unknown optimizer.name 'adam'; choose one of adamw"),  # type: ignore[arg-type]
        (OptimizerConfig(name="lion", epsilon=1e-8), "optimizer.epsilon is not used by lion"),
        (OptimizerConfig(name="adafactor", beta2=0.9), "optimizer.beta2 is not used by adafactor"),
    ],
)
def test_refused(config, words):
    with pytest.raises(UserError, match=words) as caught:
        make_optimizer(config, lambda count: 0.1, RULES)
    assert "\n" not in str(caught.value)


FEW = ("layers/mlp/up/kernel", "layers/mlp/up/bias", "embeddings/token/embedding")
OTHERS = {"weight_decay": 0.3, "clip_norm": 0.5, "beta1": 0.5, "beta2": 0.6, "epsilon": 0.1}


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_dead_knob(name, field):
    config = OptimizerConfig(name=name)
    few = [{path: gradient[path] for path in FEW} for gradient in GRADIENTS]
    base, _ = run(config, few, start=few[0])
    try:
        changed, _ = run(dataclasses.replace(config, **{field: OTHERS[field]}), few, start=few[0])
    except UserError:
        assert field not in optim.DEFAULTS[name]
        return
    assert any(not np.array_equal(base[path], changed[path]) for path in base)


def test_every_field_is_covered_and_every_name_differs():
    """learning_rate is the schedule's peak: tests/core/test_schedule.py."""
    assert {field.name for field in dataclasses.fields(OptimizerConfig)} == {"name", "learning_rate", *OTHERS}
    assert set(typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])) == set(NAMES)
    ends = [default_run(name)[0]["layers/mlp/up/kernel"].tobytes() for name in NAMES]
    assert len(set(ends)) == len(NAMES)
