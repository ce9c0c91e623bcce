"""The task is exact: label smoothing, microbatches, meshes, ragged targets; and it learns eight pairs by heart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_text import caption_lengths, write_files, write_store

from core_flax import sharding
from core_flax.config import MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.evaluate import make_evaluate
from core_flax.program import make_program
from core_flax.task import Task
from core_flax.text.sentencepiece_model import SentencePiece
from seq2seq_flax.batches import PairBatches
from seq2seq_flax.config import InputsConfig, TransformerConfig, TranslateConfig
from seq2seq_flax.model import Transformer
from seq2seq_flax.pairs import PairStore
from seq2seq_flax.prepare import PrepareConfig, prepare
from seq2seq_flax.sharding import PARAM_RULES
from seq2seq_flax.task import init_params, loss_weights, make_task, smoothed_sums, translation_sums

R, V, NUM_STEPS = 16, 32, 2
MODEL = Transformer(
    TransformerConfig(
        vocab_size=V,
        num_layers=2,
        width=16,
        num_heads=4,
        mlp_width=32,
        dropout=0.2,
        attention_dropout=0.1,
        activation_dropout=0.1,
    )
)
TASK = Task(
    init=lambda key: init_params(MODEL, key),
    loss_weights=loss_weights,
    loss_sums=lambda params, batch, key: translation_sums(MODEL, params, batch, key, 0.1),
    batches=lambda start, rows: iter(()),
    param_rules=PARAM_RULES,
)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Rows of one to four pairs, some with hardly any target, two without a pair."""
    lengths = caption_lengths(30, seed=4)
    lengths[::5, 1] = 3
    store = write_store(tmp_path_factory.mktemp("store") / "data", np.minimum(lengths, 24), V)
    pairs = PairBatches(store, InputsConfig(row_length=48), R, 1)
    found = [{name: array.copy() for name, array in next(pairs.in_order(R)).items()} for _ in range(NUM_STEPS)]
    assert len({int((row > 0).sum()) for row in found[0]["target_sequences"]}) > 3
    return found


def program_of(num_microbatches, **mesh):
    config = TranslateConfig(
        # With a smaller epsilon Adam would make whole steps of the rounding errors in gradients that are zero.
        optimizer=OptimizerConfig(learning_rate=1e-3, epsilon=1e-6),
        schedule=ScheduleConfig(name="constant"),
        train=TrainConfig(num_steps=NUM_STEPS, batch_size=R, num_microbatches=num_microbatches),
        mesh=MeshConfig(**mesh),
    )
    return make_program(TASK, config, jax.devices()[: np.prod([*mesh.values()], dtype=int)])


@functools.cache
def initial_state():
    return jax.device_get(program_of(1, data=1).init(jax.random.key(0)))


def run(batches, num_microbatches, **mesh):
    program = program_of(num_microbatches, **mesh)
    placed = jax.tree.map(lambda x: x.sharding, program.abstract_state)
    state, metrics = jax.device_put(initial_state(), placed), []
    with jax.set_mesh(program.mesh):
        on_devices = [sharding.place_batch(batch, R, program.mesh) for batch in batches]
        # Compiled in a hurry: how XLA places and divides the work stays the same.
        step = program.step.lower(state, on_devices[0]).compile({"xla_backend_optimization_level": 0})
        for batch in on_devices:
            state, each = step(state, batch)
            metrics.append(jax.device_get(each))
    return metrics, jax.device_get(state.params)


@pytest.fixture(scope="module")
def reference(batches):
    return run(batches, 1, data=1)


@pytest.mark.parametrize(
    ("num_microbatches", "mesh"), [(4, {"data": 1}), (2, {"data": 4}), (1, {"fsdp": 4}), (2, {"data": 2, "tensor": 2})]
)
def test_the_same_run_whatever_the_microbatches_and_the_mesh(batches, reference, num_microbatches, mesh):
    expected, params = reference
    metrics, other = run(batches, num_microbatches, **mesh)
    for step in range(NUM_STEPS):
        assert metrics[step].keys() == expected[step].keys()
        for name in expected[step]:
            np.testing.assert_allclose(metrics[step][name], expected[step][name], rtol=1e-5, atol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, initial_state().params)
    gaps = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, other)
    assert max(jax.tree.leaves(gaps)) < 1e-5 < 1e-3 < max(jax.tree.leaves(moved))


def test_label_smoothing_by_hand():
    logits = np.array([[1.0, 2.0, 0.5, -1.0], [0.0, 0.0, 3.0, 1.0], [5.0, 1.0, 1.0, 1.0]])
    labels, weights, smoothing = np.array([1, 0, 2]), np.array([1.0, 1.0, 0.0]), 0.2
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.full((3, 4), smoothing / 4)
    targets[np.arange(3), labels] += 1 - smoothing
    smoothed, plain, correct = smoothed_sums(jnp.array(logits), jnp.array(labels), jnp.array(weights), smoothing)
    assert float(smoothed) == pytest.approx(-(targets * log_probs)[:2].sum(), rel=1e-6)
    assert float(plain) == pytest.approx(-log_probs[[0, 1], [1, 0]].sum(), rel=1e-6)
    assert float(correct) == 1


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    files = write_files(folder, 8)
    prepare(PrepareConfig(str(folder / "data"), train=tuple(files), valid=tuple(files), vocab_size=70))
    return folder / "data"


def config_of(**train):
    return TranslateConfig(
        model=TransformerConfig(vocab_size=72, num_layers=2, width=32, num_heads=4, mlp_width=64, dropout=0.0),
        inputs=InputsConfig(row_length=96, label_smoothing=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, beta2=0.98),
        schedule=ScheduleConfig(name="inverse_sqrt", warmup_steps=20),
        train=TrainConfig(num_steps=150, batch_size=4, **train),
        mesh=MeshConfig(data=1),
    )


def test_eight_pairs_are_learned_by_heart(eight):
    config, tokenizer = config_of(), SentencePiece.load(eight / "tokenizer.model")
    task = make_task(config, PairStore(eight, "train"), PairStore(eight, "valid"), tokenizer)
    program = make_program(task, config, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        batches = task.batches(0, range(4))
        state, metrics = program.init(jax.random.key(0)), []
        for _ in range(config.train.num_steps):
            batch = sharding.place_batch(next(batches), 4, program.mesh)
            state, each = program.step(state, batch)
            metrics.append({name: float(x) for name, x in jax.device_get(each).items() if x.ndim == 0})
        batches.close()
        held_out = make_evaluate(task.evaluators["held_out"], program.mesh)(state.params)
    assert metrics[0]["nll"] > 3.5  # as good as guessing
    assert metrics[-1]["nll"] < 0.02 and metrics[-1]["accuracy"] == 1
    assert held_out["nll"] == pytest.approx(metrics[-1]["nll"], rel=0.5) and held_out["accuracy"] == 1


def test_hosts_make_the_rows_of_one_batch(eight):
    config, tokenizer = config_of(), SentencePiece.load(eight / "tokenizer.model")
    task = make_task(config, PairStore(eight, "train"), None, tokenizer)
    parts = []
    for rows in (range(4), range(2), range(2, 4)):
        batches = task.batches(3, rows)
        parts.append(next(batches))
        batches.close()
    whole, first, second = parts
    for name, array in whole.items():
        np.testing.assert_array_equal(array, np.concatenate([first[name], second[name]]))
