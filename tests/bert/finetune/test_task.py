"""The loss of each kind by hand, gradients however the work is divided, and eight examples learned by heart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from bert_flax.finetune.batches import PackedUnits
from bert_flax.finetune.config import FinetuneConfig, FinetuneInputs
from bert_flax.finetune.data import encode
from bert_flax.finetune.examples import Answer, ChoiceExample, QuestionExample, TaggedExample, TextExample
from bert_flax.finetune.inputs import NO_TAG
from bert_flax.finetune.task import Labelled, label_weights, make_model, make_task, scored_sums
from bert_flax.finetune.tasks import TASKS
from bert_flax.model import BertConfig, BertEncoder
from core_flax import sharding
from core_flax.config import MeshConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.evaluate import make_evaluate
from core_flax.program import make_program
from core_flax.step import gradients
from core_flax.text.wordpiece import SPECIALS, WordPiece

WORDS = "the old river king of two towns went there in winter and saw four doors".split()  # noqa: SIM905
VOCABULARY = WordPiece([*SPECIALS, *WORDS])
MODEL = BertConfig(
    vocab_size=VOCABULARY.num_tokens,
    num_layers=2,
    unroll=1,
    width=16,
    num_heads=2,
    mlp_width=32,
    max_length=32,
    init_stddev=0.2,
    attention_dropout=0.0,
    remat="none",
)
INPUTS = FinetuneInputs(max_length=32, stride=8)
KINDS = {"classification": "mnli", "regression": "stsb", "choice": "swag", "span": "squad2", "tagging": "ner"}


@pytest.fixture(scope="module", autouse=True)
def hurry():
    """Programs are compiled fast rather than to be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def examples_of(kind, count=8, seed=0):
    """Of random words, with labels that nothing in them tells."""
    draw = np.random.default_rng(seed)

    def words(least, most):
        return " ".join(draw.choice(WORDS, draw.integers(least, most)))

    match kind:
        case "classification":
            return [TextExample(str(n), words(2, 9), words(1, 9), int(draw.integers(3))) for n in range(count)]
        case "regression":
            return [TextExample(str(n), words(2, 9), words(1, 9), float(draw.uniform(0, 5))) for n in range(count)]
        case "choice":
            endings = [tuple(words(1, 5) for _ in range(4)) for _ in range(count)]
            return [ChoiceExample(str(n), words(1, 4), "the", endings[n], int(draw.integers(4))) for n in range(count)]
        case "tagging":
            texts = [tuple(words(1, 9).split()) for _ in range(count)]
            tags = [tuple(draw.choice(("O", "B-PER", "B-ORG"), len(text)).tolist()) for text in texts]
            return [TaggedExample(str(n), texts[n], tags[n], n) for n in range(count)]
    found = []
    for n in range(count):
        context = " ".join(draw.permutation(WORDS)[: 5 + n])
        first, last = np.sort(draw.integers(0, 5 + n, 2))
        text = " ".join(context.split()[first : last + 1])
        answer = Answer(text, len(" ".join([*context.split()[:first], ""])))
        found.append(QuestionExample(str(n), words(1, 4), context, () if n % 4 == 3 else (answer,), n % 4 == 3))
    return found


@functools.cache
def units_of(kind, count=8):
    return encode(TASKS[KINDS[kind]], examples_of(kind, count), VOCABULARY, INPUTS, labelled=True)


# The loss, by hand


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_are_those_of_each_unit_by_itself(kind):
    """Several units to a row, empty slots, padding, and rows without a unit; scores that nothing made."""
    spec, units = TASKS[KINDS[kind]], units_of(kind)
    packed = PackedUnits(units, 32, row_multiple=5)
    batch = next(packed.in_order(5))
    assert (batch["units"] >= 0).sum(axis=1).max() > 1 and (batch["units"] < 0).any()
    assert (batch["sequences"] == 0).any()
    places, draw = batch["units"].shape, np.random.default_rng(1)
    outputs = {"span": 2, "tagging": len(spec.labels), "classification": 3}.get(kind, 1)
    of_tokens = kind in ("span", "tagging")
    shape = (*batch["tokens"].shape, outputs) if of_tokens else (*places, units.per_unit, outputs)
    scores = draw.normal(size=shape).astype(np.float32) * 3
    loss, correct, weight = 0.0, 0.0, 0
    for row, slot in zip(*np.nonzero(batch["units"] >= 0), strict=True):
        unit = batch["units"][row, slot]
        label, start = units.labels[unit], batch["first_tokens"][row, slot, 0]
        tokens = slice(start, start + len(units.tokens[unit]))
        match kind:
            case "regression":
                loss += (scores[row, slot, 0, 0] - label) ** 2
                weight += 1
            case "span":
                for place in (0, 1):
                    shares = log_softmax(scores[row, tokens, place])
                    loss -= shares[label[place]] / 2
                    correct += (shares.argmax() == label[place]) / 2
                weight += 1
            case "tagging":
                for token in np.flatnonzero(label != NO_TAG):
                    shares = log_softmax(scores[row, tokens][token])
                    loss -= shares[label[token]]
                    correct += shares.argmax() == label[token]
                    weight += 1
            case _:
                shares = log_softmax(scores[row, slot].ravel())
                loss -= shares[label]
                correct += shares.argmax() == label
                weight += 1
    sums, metrics = scored_sums(spec, jnp.asarray(scores), batch)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    assert label_weights(spec, batch).sum() == weight
    if kind == "regression":
        assert metrics == {}
    else:
        assert [float(x) for x in metrics["accuracy"]] == [correct, weight]
    # What stands at padding and in empty slots means nothing.
    nowhere = (batch["sequences"] == 0)[..., None] if of_tokens else (batch["units"] < 0)[..., None, None]
    others, _ = scored_sums(spec, jnp.asarray(np.where(nowhere, 99.0, scores)), batch)
    np.testing.assert_allclose(others["loss"], loss, rtol=1e-5)


# The same whatever the division


def task_of(kind, **settings):
    config = FinetuneConfig(model=MODEL, inputs=INPUTS, **settings)
    units = units_of(kind, 24)
    held_out = {"dev": Labelled(examples_of(kind, 24), units)}
    return make_task(config, TASKS[KINDS[kind]], units, held_out, {}, row_multiple=4)


def placed_gradients(kind, num_microbatches, mesh_config):
    """Gradients with dropout, computed on a mesh, and the loss."""
    task, batch = task_of(kind, train=TrainConfig(batch_size=16)), ragged_batch(kind)
    num_devices = mesh_config.data * mesh_config.tensor
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:num_devices])
    params = initial_params(kind)
    params = jax.device_put(params, sharding.param_shardings(params, task.param_rules, mesh, task.axis_fields))
    with jax.set_mesh(mesh):
        placed = sharding.place_batch(batch, len(batch["tokens"]), mesh)
        compute = jax.jit(lambda p, b: gradients(task, p, b, jax.random.key(3), num_microbatches))
        return jax.device_get(compute(params, placed))[:3]


@functools.cache
def initial_params(kind):
    return jax.device_get(jax.jit(task_of(kind).init)(jax.random.key(0)))


@functools.cache
def ragged_batch(kind):
    """Rows hold other numbers of units, so that a mean of means is another one."""
    batch = PackedUnits(units_of(kind, 24), 32, row_multiple=4).make_batch(0, 16, seed=0)
    in_row = (batch["units"] >= 0).sum(axis=1)
    assert len(set(in_row.tolist())) > 1 and len(in_row) % 4 == 0
    return batch


@functools.cache
def undivided(kind):
    return placed_gradients(kind, 1, MeshConfig(data=1))


@pytest.mark.parametrize(
    ("kind", "num_microbatches", "mesh"),
    [
        ("choice", 4, {"data": 1}),
        ("choice", 1, {"data": 4}),
        ("tagging", 2, {"data": 1}),
        ("tagging", 2, {"data": 2, "tensor": 2}),
    ],
)
def test_gradients_whatever_the_microbatches_and_the_mesh(kind, num_microbatches, mesh):
    expected, terms, metrics = undivided(kind)
    found, other_terms, other_metrics = placed_gradients(kind, num_microbatches, MeshConfig(**mesh))
    np.testing.assert_allclose(other_terms["loss"], terms["loss"], rtol=1e-5)
    np.testing.assert_allclose(other_metrics["accuracy"], metrics["accuracy"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)
    assert norm(expected) > 0.1


def norm(tree):
    return np.sqrt(sum(float(np.sum(x**2)) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_units_have_the_loss_of_units_alone(kind):
    spec, units = TASKS[KINDS[kind]], units_of(kind, 24)
    packed = PackedUnits(units, 32)
    numbers = np.arange(units.num_units)
    together = next(packed.in_order(units.num_units))
    assert len(together["tokens"]) < units.num_units
    rows = units.num_units - len(together["tokens"])
    together = {name: np.concatenate([x, empty_rows(name, x, rows)]) for name, x in together.items()}
    alone = packed._batch(numbers, numbers, 0 * numbers, 0 * numbers, units.num_units)
    task = task_of(kind)
    model = make_model(spec, MODEL)
    sums = jax.jit(lambda p, b: scored_sums(spec, model.apply({"params": p}, b), b))
    one, other = (jax.device_get(sums(initial_params(kind), batch)) for batch in (together, alone))
    np.testing.assert_allclose(one[0]["loss"], other[0]["loss"], rtol=1e-5)
    for name in one[1]:
        np.testing.assert_allclose(one[1][name], other[1][name])
    for name, weight in task.loss_weights(together).items():
        assert weight == task.loss_weights(alone)[name] > 0


def empty_rows(name, array, count):
    fill = {"units": -1, "labels": NO_TAG if array.shape[1] == 32 else 0}.get(name, 0)
    return np.full((count, *array.shape[1:]), fill, array.dtype)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_few_places_have_the_states_that_all_have(num_layers):
    """Values and gradients; no other test sees them apart, for no loss of sequences asks for all."""
    encoder = BertEncoder(dataclasses.replace(MODEL, num_layers=num_layers))
    draw = np.random.default_rng(0)
    tokens, segments = (draw.integers(0, n, (2, 12)) for n in (MODEL.vocab_size, 2))
    sequences = np.repeat([[1, 1, 2], [1, 2, 0]], 4, axis=1)
    positions, places = np.tile(np.arange(4), (2, 3)), np.array([[0, 8], [4, 0]])
    packed = {"positions_BL": positions, "sequences_BL": sequences}
    params = jax.jit(encoder.init)(jax.random.key(0), tokens, segments, **packed)

    weights = draw.normal(size=(2, 2, MODEL.width))

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.grad, has_aux=True)
    def run(params, few):
        if few:
            x_BTD = encoder.apply(params, places, tokens, segments, **packed, method="at")
        else:
            x_BTD = encoder.apply(params, tokens, segments, **packed)[0][np.arange(2)[:, None], places]
        return jnp.sum(weights * x_BTD), x_BTD

    (gradient, expected), (mine, found) = run(params, False), run(params, True)
    assert np.ptp(expected, axis=(0, 1)).min() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), mine, gradient)


def test_dropout_at_few_places_follows_the_example():
    """What is dropped follows the example, not its place in the batch."""
    encoder = BertEncoder(dataclasses.replace(MODEL, num_layers=3))
    ones, places = np.ones((2, 6), int), np.zeros((2, 1), int)
    packed = {"positions_BL": np.tile(np.arange(6), (2, 1)), "sequences_BL": ones}
    params = jax.jit(encoder.init)(jax.random.key(0), ones, ones, **packed)

    @jax.jit
    def run(*rows):
        rngs = {"dropout": jax.random.key(1)}
        drawn = {"row_B": jnp.stack(rows), "deterministic": False}
        return encoder.apply(params, places, ones, ones, **packed, **drawn, rngs=rngs, method="at")

    first = run(0, 1)
    assert not np.allclose(first[0], first[1])
    np.testing.assert_array_equal(first[::-1], run(1, 0))


def test_scores_that_are_not_finite_are_no_figures():
    """The largest of them would be a class all the same."""
    for kind in KINDS:
        task = task_of(kind)
        evaluator = task.evaluators["dev"]
        batch = next(evaluator.batches())
        for bad in (np.nan, np.inf):
            with pytest.raises(FloatingPointError, match="a score"):
                evaluator.score([(batch, {"scores": np.array([0.0, bad])})])


def test_hosts_share_the_rows_of_a_batch():
    task = task_of("tagging", train=TrainConfig(batch_size=16, num_steps=3))
    whole = list(task.batches(0, range(16)))
    halves = [list(task.batches(0, rows)) for rows in (range(8), range(8, 16))]
    assert len(whole) == 3
    for batch, *parts in zip(whole, *halves, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    for batch, again in zip(whole[1:], task.batches(1, range(16)), strict=True):
        np.testing.assert_array_equal(batch["tokens"], again["tokens"])


def test_a_models_own_arrays_are_begun_with():
    task = task_of("tagging")
    config = FinetuneConfig(model=MODEL, inputs=INPUTS)
    given = {"encoder": initial_params("tagging")["encoder"], "masked_language": {"bias": np.zeros(20)}}
    other = make_task(config, TASKS["ner"], units_of("tagging"), {}, given)
    assert task.initial == {} and {path.split("/")[0] for path in other.initial} == {"encoder"}


# By heart


@pytest.mark.parametrize("kind", KINDS)
def test_eight_examples_are_learned_by_heart(kind):
    """And the official metric of the dev set, which is the same, finds all of them."""
    spec, steps = TASKS[KINDS[kind]], 80
    config = FinetuneConfig(
        model=dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, width=32),
        inputs=INPUTS,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=8),
        train=TrainConfig(num_steps=steps, batch_size=8),
        mesh=MeshConfig(data=1),
    )
    examples, units = examples_of(kind), units_of(kind)
    task = make_task(config, spec, units, {"dev": Labelled(examples, units)}, {})
    program = make_program(task, config, jax.devices()[:1])
    batch = next(PackedUnits(units, 32).in_order(8))
    with jax.set_mesh(program.mesh):
        batch = sharding.place_batch(batch, len(batch["tokens"]), program.mesh)
        state, losses = program.init(jax.random.key(0)), []
        step = program.step.lower(state, batch).compile()
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        figures = make_evaluate(task.evaluators["dev"], program.mesh)(state.params)
    assert losses[0] > 0.5 and losses[-1] < 0.02
    assert figures[spec.primary] > 99.9 and figures["total"] == {"tagging": num_entities()}.get(kind, 8)


def num_entities():
    return sum(tag != "O" for example in examples_of("tagging") for tag in example.tags)
