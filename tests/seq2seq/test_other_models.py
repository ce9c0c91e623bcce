"""The recurrent models and the modern Transformer: by hand, packed as alone, token by token, learned by heart."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_recurrent
import optax
import pytest
from pair_text import caption_lengths, write_store
from small_models import CONFIGS, drawn_params

from core_flax import sharding
from core_flax.cache import fork, reorder
from core_flax.config import MeshConfig
from core_flax.params import leaves
from seq2seq_flax.architectures import _products, axis_fields, make_model, param_rules
from seq2seq_flax.batches import PairBatches
from seq2seq_flax.config import InputsConfig, TransformerConfig
from seq2seq_flax.interface import _TABLES
from seq2seq_flax.presets import PRESETS
from seq2seq_flax.task import init_params, loss_weights, translation_sums

every_model = pytest.mark.parametrize("name", CONFIGS)
MAIN = ["lstm_seq2seq", "lstm_attention", "gnmt", "transformer_modern"]


@pytest.fixture(scope="module")
def packed_and_alone(tmp_path_factory):
    """The same seven pairs, several to a row and one to a row."""
    lengths = np.minimum(caption_lengths(7, seed=1), 24)
    store = write_store(tmp_path_factory.mktemp("store") / "data", lengths)
    packed, alone = (PairBatches(store, InputsConfig(row_length=48, packing=each), 8, 1) for each in (True, False))
    return next(packed.in_order(8)), next(alone.in_order(8))


@cache
def known(name):
    """(model, parameters, jitted function of a batch that gives logits)."""
    model = make_model(CONFIGS[name])
    params = drawn_params(model)

    @jax.jit
    def logits_of(batch):
        return model.apply(
            {"params": params},
            batch["source_tokens"],
            batch["target_inputs"],
            source_sequences_BM=batch["source_sequences"],
            target_sequences_BL=batch["target_sequences"],
            source_positions_BM=batch["source_positions"],
            target_positions_BL=batch["target_positions"],
        )

    return model, params, logits_of


def by_pair(batch, logits):
    """Logits of each pair, by its source's and target's tokens."""
    found = {}
    for row, numbers in enumerate(batch["target_sequences"]):
        for number in range(1, numbers.max() + 1):
            source, target = (batch[f"{side}_sequences"][row] == number for side in ("source", "target"))
            key = tuple(batch["source_tokens"][row][source]), tuple(batch["target_inputs"][row][target])
            found[key] = np.asarray(logits[row][target])
    return found


@every_model
def test_packed_equals_alone(name, packed_and_alone):
    together, apart = (by_pair(batch, known(name)[2](batch)) for batch in packed_and_alone)
    assert together.keys() == apart.keys() and len(together) == 7
    assert packed_and_alone[0]["target_sequences"].max() > 1
    for key in together:
        np.testing.assert_allclose(together[key], apart[key], atol=1e-5)
        assert apart[key].std() > 0.05


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "transformer_modern"])
def test_recurrent_models_by_hand(name, packed_and_alone):
    """Scores, input feeding, residual connections, which state goes where: against plain loops over one pair."""
    model, params, logits_of = known(name)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    names = _TABLES[model.config.tied_embeddings]
    tables = {which: params[f"embeddings_{name}"]["embedding"] for which, name in names.items()}
    by_hand = getattr(numpy_recurrent, next(each for each in MAIN if name.startswith(each)))
    pairs = by_pair(packed_and_alone[1], logits_of(packed_and_alone[1]))
    for (source, target), found in list(pairs.items())[:2]:
        expected = by_hand(model.config, params, np.array(source), np.array(target), tables)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_modern_transformer_by_hand(packed_and_alone):
    model, params, logits_of = known("transformer_modern")
    config, params = model.config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table = params["embeddings_token"]["embedding"]
    half = config.width // config.num_heads // 2

    def norm(x, layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * layer["scale"]

    def turn(x_LHK):
        angles = np.arange(len(x_LHK))[:, None] * config.rope_theta ** (-np.arange(half) / half)
        whole = (x_LHK[..., :half] + 1j * x_LHK[..., half:]) * np.exp(1j * angles)[:, None]
        return np.concatenate([whole.real, whole.imag], -1)

    def attend(x, memory, layer, causal, turned):
        q, k, v = (
            np.einsum("LD,DHK->LHK", source, layer[which]["kernel"])
            for which, source in (("query", x), ("key", memory), ("value", memory))
        )
        q, k = (turn(q), turn(k)) if turned else (q, k)
        scores = np.einsum("LHK,MHK->HLM", q, k) / np.sqrt(2 * half)
        scores = np.where(np.tri(len(x), len(memory), dtype=bool) if causal else True, scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("HLM,MHK->LHK", probs / probs.sum(-1, keepdims=True), v)
        return np.einsum("LHK,HKD->LD", mixed, layer["out"]["kernel"])

    def mlp(x, layer):
        gate = x @ layer["gate"]["kernel"]
        return (gate * numpy_recurrent.sigmoid(gate) * (x @ layer["up"]["kernel"])) @ layer["down"]["kernel"]

    def by_hand(source, target):
        m, x = (table[tokens] * np.sqrt(config.width) for tokens in (source, target))
        for number in range(config.num_layers):
            own = jax.tree.map(lambda p, n=number: p[n], params["encoder"])
            normed = norm(m, own["attention_norm"])
            m = m + attend(normed, normed, own["attention"], False, True)
            m = m + mlp(norm(m, own["mlp_norm"]), own["mlp"])
        m = norm(m, params["encoder_norm"])
        for number in range(config.num_layers):
            own = jax.tree.map(lambda p, n=number: p[n], params["decoder"])
            normed = norm(x, own["self_attention_norm"])
            x = x + attend(normed, normed, own["self_attention"], True, True)
            x = x + attend(norm(x, own["cross_attention_norm"]), m, own["cross_attention"], False, False)
            x = x + mlp(norm(x, own["mlp_norm"]), own["mlp"])
        return norm(x, params["decoder_norm"]) @ table.T

    for (source, target), found in list(by_pair(packed_and_alone[1], logits_of(packed_and_alone[1])).items())[:2]:
        np.testing.assert_allclose(found, by_hand(np.array(source), np.array(target)), atol=2e-5)


@pytest.mark.parametrize("name", [*MAIN, "lstm_attention_additive"])
def test_step_by_step_equals_all_at_once(name, packed_and_alone):
    """A beginning of its own length for each row, then single tokens, some rows waiting; then three beams a row."""
    (model, params, logits_of), (_, batch), rows = known(name), packed_and_alone, np.arange(8)
    expected, inputs = logits_of(batch), batch["target_inputs"]
    lengths = (batch["target_sequences"] > 0).sum(1)

    @jax.jit
    def extend(cache, tokens_BL, num_tokens_B):
        x_BLD, cache = model.apply({"params": params}, tokens_BL, cache, num_tokens_B, method="extend")
        return model.apply({"params": params}, x_BLD, method="logits"), cache

    start = jax.jit(partial(model.apply, method="start"), static_argnums=3)
    cache = start({"params": params}, batch["source_tokens"], batch["source_sequences"] > 0, inputs.shape[1])
    position_B = 1 + rows % 3
    logits, cache = extend(cache, inputs[:, :3], position_B)
    for row in rows[lengths > 0]:
        np.testing.assert_allclose(logits[row, : position_B[row]], expected[row, : position_B[row]], atol=1e-5)
    for turn in range(4):
        goes_on_B = (rows % 2 == 0) | (turn % 2 > 0)
        logits, cache = extend(cache, inputs[rows, position_B][:, None], goes_on_B.astype(np.int32))
        for row in rows[goes_on_B & (position_B < lengths)]:
            np.testing.assert_allclose(logits[row, 0], expected[row, position_B[row]], atol=1e-5)
        position_B += goes_on_B
    beams, ones = fork(cache, 3), np.ones(24, np.int32)
    others = np.stack([inputs[rows, position_B], (inputs[rows, position_B] + 5) % 50, rows + 3], 1).reshape(-1, 1)
    _, beams = extend(beams, others, ones)
    beams = reorder(beams, jnp.array([[1, 0, 0]] * 8))
    logits, _ = extend(beams, np.repeat(inputs[rows, position_B + 1], 3)[:, None], ones)
    logits = np.asarray(logits).reshape(8, 3, -1)
    for row in rows[position_B + 1 < lengths]:
        np.testing.assert_allclose(logits[row, 1], expected[row, position_B[row] + 1], atol=1e-5)
        np.testing.assert_allclose(logits[row, 2], logits[row, 1], atol=1e-5)
        assert np.abs(logits[row, 0] - logits[row, 1]).max() > 1e-3


def in_a_hurry(function, *given):
    """What a jitted function returns, compiled fast: how XLA places and divides the work stays the same."""
    return function.lower(*given).compile({"xla_backend_optimization_level": 0})(*given)


@pytest.mark.parametrize("name", MAIN)
def test_learned_by_heart(name, tmp_path):
    """Six pairs in rows of several; at the start the model guesses; with dropout it says something else each time."""
    store = write_store(tmp_path / "data", np.array([[5, 6], [4, 4], [6, 5], [3, 6], [5, 3], [6, 6]]), 20)
    batch = next(PairBatches(store, InputsConfig(row_length=16), 3, 1).in_order(3))
    changes = {"vocab_size": 20, "width": 32, "dropout": 0.0} | ({} if "modern" in name else {"init_limit": 0.15})
    model = make_model(dataclasses.replace(CONFIGS[name], **changes))
    params, optimizer = jax.jit(lambda key: init_params(model, key))(jax.random.key(1)), optax.adam(0.01)
    total = loss_weights(batch)["loss"]

    @jax.jit
    def trained(params):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(
                lambda p: translation_sums(model, p, batch, None, 0.0)[0]["loss"] / total
            )(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=150)

    (params, _), losses = in_a_hurry(trained, params)
    assert losses[0] > 2.5 and losses[-1] < 0.05
    dropping = make_model(dataclasses.replace(model.config, dropout=0.3))
    loss = jax.jit(lambda key: translation_sums(dropping, params, batch, key, 0.0)[0]["loss"])
    drawn = [float(in_a_hurry(loss, jax.random.key(seed))) for seed in (1, 2)]
    assert len({*drawn, float(losses[-1] * total)}) == 3 and min(drawn) > float(losses[-1] * total)


@pytest.mark.parametrize("name", ["lstm_attention", "transformer_modern"])
def test_the_same_on_any_mesh(name, packed_and_alone):
    """Loss and gradient, dropout on, of a batch and parameters that four devices share in two ways."""
    batch, devices = packed_and_alone[0], jax.devices()[:4]
    config = dataclasses.replace(CONFIGS[name], dropout=0.2, vocab_size=52)
    model, found = make_model(config), []
    params = drawn_params(model)
    for sizes in ({"data": 1}, {"data": 2, "fsdp": 2}):
        mesh = sharding.make_mesh(MeshConfig(**sizes), devices[: np.prod([*sizes.values()])])
        placed = jax.device_put(
            params, sharding.param_shardings(params, param_rules(config), mesh, axis_fields(config))
        )
        function = jax.value_and_grad(lambda p, b: translation_sums(model, p, b, jax.random.key(3), 0.1)[0]["loss"])
        with jax.set_mesh(mesh):
            given = placed, sharding.place_batch(batch, 8, mesh)
            found.append(jax.device_get(in_a_hurry(jax.jit(function), *given)))
    for one, four in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-4)


SIZES = {
    "transformer_modern": 63_787_008,
    "transformer_modern_tiny": 2_609_920,
    "lstm_seq2seq": 175_032_000,
    "lstm_seq2seq_small": 4_661_248,
    "lstm_attention": 182_032_000,
    "lstm_attention_small": 5_120_000,
    "gnmt": 296_186_880,
    "gnmt_small": 8_729_856,
}


def shapes(config):
    return jax.eval_shape(lambda key: init_params(make_model(config), key), jax.random.key(0))


def test_parameter_counts():
    """As the presets tell them; each parameter has its line; and the LSTMs have the papers' own figures."""
    sizes = {}
    for name, preset in PRESETS.items():
        config = preset().model
        if not isinstance(config, TransformerConfig):
            params = shapes(config)
            sharding.table(params, param_rules(config))
            sizes[name] = sum(x.size for x in jax.tree.leaves(params))
            assert f"{sizes[name]:,} parameters" in preset.__doc__, sizes[name]
    assert sizes == SIZES
    # Sutskever et al. 2014, section 3.4: "384M parameters of which 64M are pure recurrent connections".
    tables = 3 * 37_000 * 1000
    assert round((sizes["lstm_seq2seq"] - tables) / 1e6) == 64
    assert round((sizes["lstm_seq2seq"] - tables + 1000 * (160_000 + 2 * 80_000)) / 1e6) == 384
    # Wu et al. 2016 by hand: two kernels and a bias for each LSTM, three parameters of attention.
    width, lstm = 1024, lambda inputs: 4 * 1024 * (inputs + 1024 + 1)
    encoder = 2 * lstm(width) + lstm(2 * width) + 6 * lstm(width)
    assert sizes["gnmt"] == encoder + 8 * lstm(2 * width) + 2 * width**2 + width + 3 * 37_000 * width


@every_model
def test_each_weight_is_counted_once(name):
    """Products for a source's and a target's token together: the sizes of all matrices."""
    config = CONFIGS[name]
    matrices = [leaf for path, leaf in leaves(shapes(config)) if "kernel" in path]
    source, target, _ = _products(config)
    assert source + target == sum(leaf.size for leaf in matrices)
