"""Word vectors: gradients by hand, which pairs there are, what is drawn and how often, learning."""

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core_flax.config import MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.evaluate import make_evaluate
from core_flax.program import make_program
from core_flax.sharding import place_batch
from core_flax.types import UserError
from lm_flax.config import Word2VecRun
from lm_flax.windows import WindowBatches, WindowsConfig
from lm_flax.word2vec import Word2Vec, Word2VecConfig, loss_weights, word2vec_sums
from lm_flax.word2vec_task import make_task

V, D, W, K = 20, 6, 3, 2
TEXT = np.random.default_rng(0).integers(0, V, 700)
ENDS = np.array([100, 130, 700])
COUNTS = np.bincount(TEXT, minlength=V)
INPUTS = WindowsConfig(length=16, window=W, num_negatives=K, subsample=0.03)


def batches(config=INPUTS, seed=0, text=TEXT, ends=ENDS, counts=COUNTS, batch_size=4):
    return WindowBatches(text, ends, counts, config, seed, batch_size)


def pairs_of(batch):
    """By hand: (row, place of the word, places of its context)."""
    for row, (sequences_L, reach_L) in enumerate(zip(batch["sequences"], batch["reach"], strict=True)):
        for place, (sequence, reach) in enumerate(zip(sequences_L, reach_L, strict=True)):
            near = [at for at in range(max(0, place - reach), min(len(reach_L), place + reach + 1)) if at != place]
            around = [at for at in near if sequences_L[at] == sequence]
            if sequence and around:
                yield row, place, around


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(params, batch, cbow):
    """(loss, number of pairs, gradients), pair after pair as the authors' code goes."""
    vectors, outputs = params["token"]["embedding"].astype(float), params["head"]["embedding"].astype(float)
    grads, loss, number = (np.zeros_like(vectors), np.zeros_like(outputs)), 0.0, 0
    for row, place, around in pairs_of(batch):
        word, noise = batch["tokens"][row, place], batch["negatives"][row, place]
        for group in [around] if cbow else [[at] for at in around]:
            context = batch["tokens"][row, group]
            x, number = vectors[context].mean(0), number + 1
            for label, target in [(1, word), *((0, each) for each in noise if each != word)]:
                probability = sigmoid(x @ outputs[target])
                loss -= np.log(probability if label else 1 - probability)
                grads[1][target] += (probability - label) * x
                for each in context:
                    grads[0][each] += (probability - label) * outputs[target] / len(context)
    return loss, number, grads


@pytest.mark.parametrize("method", ["skip_gram", "cbow"])
def test_loss_and_gradients_are_those_by_hand(method):
    config = Word2VecConfig(vocab_size=V, width=D, method=method)
    draw, batch = np.random.default_rng(1), batches().make_batch(3, range(4))
    params = {name: {"embedding": draw.normal(size=(V, D)).astype(np.float32)} for name in ("token", "head")}

    def loss(params):
        return word2vec_sums(Word2Vec(config), params, batch, W)[0]["loss"]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    expected, number, expected_grads = by_hand(params, batch, method == "cbow")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert loss_weights(batch, config, W)["loss"] == number > 30
    np.testing.assert_allclose(grads["token"]["embedding"], expected_grads[0], atol=1e-4)
    np.testing.assert_allclose(grads["head"]["embedding"], expected_grads[1], atol=1e-4)


def test_a_batch_is_a_function_of_seed_and_step_whatever_its_rows():
    whole = batches().make_batch(7, range(4))
    for name, rows in batches().make_batch(7, range(2, 4)).items():
        np.testing.assert_array_equal(rows, whole[name][2:])
    for other in (batches().make_batch(8, range(4)), batches(seed=1).make_batch(7, range(4))):
        assert (other["negatives"] != whole["negatives"]).mean() > 0.5


def test_an_epoch_is_the_text_once_and_its_order_is_kept():
    everything = WindowsConfig(length=16, window=W, num_negatives=K, subsample=0)
    made = batches(everything)
    assert made.num_rows == 44
    rows = [row for step in range(11) for row in _words(made.make_batch(step, range(4)))]
    expected = [tuple(TEXT[start : start + 16].tolist()) for start in range(0, 700, 16)]
    assert collections.Counter(rows) == collections.Counter(expected) and rows != expected
    assert [row for batch in made.in_order() for row in _words(batch)] == expected


def _words(batch):
    """The words of each row, and of none that is empty."""
    rows = [tuple(row[real > 0].tolist()) for row, real in zip(batch["tokens"], batch["sequences"], strict=True)]
    return [row for row in rows if row]


def test_no_context_reaches_into_another_document():
    for batch in batches().in_order():
        assert all(np.all(np.diff(row[row > 0]) >= 0) for row in batch["sequences"])
    tokens = [
        (word, doc)
        for b in batches().in_order()
        for word, doc in zip(b["tokens"].flat, b["sequences"].flat, strict=True)
    ]
    assert {doc for _, doc in tokens} == {0, 1, 2, 3}


def test_frequent_words_are_left_out_as_often_as_the_paper_says():
    counts = np.array([900, 90, 10])
    text = np.repeat([0, 1, 2], counts)
    config = WindowsConfig(length=100, window=1, num_negatives=1, subsample=0.01)
    made = batches(config, text=text, ends=np.array([1000]), counts=counts, batch_size=10)
    kept = np.zeros(3)
    for step in range(60):
        batch = made.make_batch(step, range(10))
        kept += np.bincount(batch["tokens"][batch["sequences"] > 0], minlength=3)
    expected = np.minimum(1, np.sqrt(0.01 / (counts / 1000)))
    np.testing.assert_allclose(kept / (60 * counts), expected, rtol=0.05)


def test_noise_and_reach_are_drawn_as_often_as_the_paper_says():
    counts = np.array([600, 0, 300, 100])
    text = np.repeat([0, 2, 3], [600, 300, 100])
    config = WindowsConfig(length=100, window=4, num_negatives=5, subsample=0)
    made = batches(config, text=text, ends=np.array([1000]), counts=counts, batch_size=10)
    drawn = [made.make_batch(step, range(10)) for step in range(10)]
    noise = np.bincount(np.concatenate([batch["negatives"].ravel() for batch in drawn]), minlength=4)
    np.testing.assert_allclose(noise / noise.sum(), counts**0.75 / (counts**0.75).sum(), atol=0.01)
    reach = np.bincount(np.concatenate([batch["reach"].ravel() for batch in drawn]), minlength=5)
    np.testing.assert_allclose(reach[1:] / reach.sum(), 0.25, atol=0.02)
    assert reach[0] == 0


@pytest.mark.parametrize("method", ["skip_gram", "cbow"])
def test_words_with_the_same_neighbours_become_alike(method):
    """Words 2n and 2n + 1 stand in the same places."""
    draw = np.random.default_rng(0)
    text = (2 * (np.arange(3000) % 5) + draw.integers(0, 2, 3000)).astype(np.int64)
    config = Word2VecConfig(vocab_size=10, width=8, method=method)
    inputs = WindowsConfig(length=50, window=1, num_negatives=3, subsample=0)
    made = batches(inputs, text=text, ends=np.array([3000]), counts=np.bincount(text), batch_size=8)
    model, optimizer = Word2Vec(config), optax.adam(0.03)
    first = made.make_batch(0, range(8))
    params = model.init(jax.random.key(0), first["tokens"], first["negatives"], jnp.zeros((8, 50, 2), bool))["params"]

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            return word2vec_sums(model, params, batch, 1)[0]["loss"] / loss_weights(batch, config, 1)["loss"]

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for number in range(60):
        params, state, value = step(params, state, made.make_batch(number, range(8)))
        losses.append(float(value))
    # Outputs begin at 0: every decision costs log 2, and the noise that is the word, a tenth, is none.
    np.testing.assert_allclose(losses[0], (1 + 3 * 0.9) * np.log(2), rtol=0.02)
    assert losses[-1] < 0.75 * losses[0]
    vectors = np.asarray(params["token"]["embedding"])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T - 2 * np.eye(10)
    np.testing.assert_array_equal(cosines.argmax(axis=1), np.arange(10) ^ 1)


def test_a_run_is_the_same_whatever_the_microbatches_and_the_mesh():
    text = SimpleNamespace(tokens_T=TEXT, ends=ENDS, counts_V=COUNTS)
    held_out = SimpleNamespace(tokens_T=TEXT[:90], ends=np.array([90]))

    def run(num_microbatches, **mesh):
        config = Word2VecRun(
            model=Word2VecConfig(vocab_size=V, width=D),
            inputs=INPUTS,
            optimizer=OptimizerConfig("sgd", learning_rate=0.5, weight_decay=0.0),
            schedule=ScheduleConfig("constant"),
            train=TrainConfig(num_steps=4, batch_size=8, num_microbatches=num_microbatches),
            mesh=MeshConfig(**mesh),
        )
        task = make_task(config, text, held_out)
        program = make_program(task, config, jax.devices()[: np.prod([*mesh.values()])])
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(0))
            for batch in task.batches(0, range(8)):
                state, metrics = program.step(state, place_batch(batch, 8, program.mesh))
        measured = make_evaluate(task.evaluators["held_out"], program.mesh)(state.params)
        return float(metrics["loss"]), jax.device_get(state.params), measured

    expected, found = run(1, data=1), run(2, data=2, tensor=2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    assert 0 < found[2]["loss"] < 3 * np.log(2)


def test_text_and_settings_that_make_no_batch():
    with pytest.raises(UserError, match=r"a text of 9 tokens, .* is shorter than a row of 16"):
        batches(text=TEXT[:9], ends=np.array([9]))
    with pytest.raises(UserError, match=r"--inputs\.window 0"):
        WindowsConfig(window=0)
    with pytest.raises(UserError, match=r"--model\.width 0"):
        Word2VecConfig(width=0)
