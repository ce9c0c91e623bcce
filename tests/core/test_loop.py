"""The loop on a task of four numbers: what stops it, what it saves, what it measures."""

import dataclasses
import json
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax import cli
from core_flax.checkpoint import list_steps, load_params
from core_flax.config import CheckpointConfig, LogConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from core_flax.evaluate import make_evaluate
from core_flax.logs import MetricsFile
from core_flax.loop import train
from core_flax.params import ParamRule
from core_flax.program import make_program
from core_flax.recorder import NotFiniteError
from core_flax.sharding import make_mesh
from core_flax.signals import Interrupted
from core_flax.task import Evaluator, Task

B = 8
CONFIG = RunConfig(
    optimizer=OptimizerConfig(learning_rate=0.1),
    schedule=ScheduleConfig(name="constant"),
    train=TrainConfig(num_steps=6, batch_size=B, eval_every_steps=0),
    checkpoint=CheckpointConfig(every_steps=2, keep_last=9),
    log=LogConfig(every_steps=1, tensorboard=False),
)
RULES = (ParamRule("line/kernel", "matrix", "embed | small"), ParamRule("line/offset", "bias", "small"))


def batch_of(step):
    """Points near a line. "z" is 1, and where it is 0 the gradient of the offset does not exist."""
    x = np.random.default_rng(step).normal(size=(B, 4)).astype(np.float32)
    return {"x": x, "y": x.sum(1), "z": np.ones(B, np.float32)}


def loss_sums(params, batch, key):
    error = batch["x"] @ params["line"]["kernel"][:, 0] - batch["y"]
    offset = jnp.sqrt(batch["z"] + params["line"]["offset"][0] ** 2) - batch["z"]  # 0 with a gradient of 0
    return {"square": jnp.sum(error**2 + offset)}, {"error": (jnp.sum(jnp.abs(error)), jnp.float32(B))}


def make_task(make_batch=batch_of, evaluators=()):
    def batches(start, rows):
        for step in range(start, CONFIG.train.num_steps):
            yield {name: x[rows] for name, x in make_batch(step).items()}

    return Task(
        init=lambda key: {"line": {"kernel": jnp.zeros((4, 1)), "offset": jnp.zeros(1)}},
        loss_weights=lambda batch: {"square": jnp.float32(batch["x"].shape[0])},
        loss_sums=loss_sums,
        batches=batches,
        param_rules=RULES,
        evaluators=dict(evaluators),
    )


def run(workdir, task=None, config=CONFIG, **sections):
    """Trains; ``sections`` of the config are dicts of changes."""
    for name, changes in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **changes)})
    task = task or make_task()
    return train(task, config, make_program(task, config), workdir)


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# Rates


def test_rates_leave_out_the_compilation_of_another_shape(tmp_path):
    """Step 4 has twice the rows, and is said to take three seconds to compile: more than all the steps together."""

    def batches(start, rows):
        for step in range(6):
            yield {name: np.repeat(x, 1 + (step == 3), 0) for name, x in batch_of(step).items()}

    task = dataclasses.replace(make_task(), batches=batches)
    program = make_program(task, CONFIG, jax.devices()[:1])

    def step(state, batch):
        time.sleep(3.0 * (len(batch["x"]) > B))
        return program.step(state, batch)

    train(task, CONFIG, dataclasses.replace(program, step=step), tmp_path)
    assert 5 * B / records(tmp_path)[-1]["sequences_per_second"] < 3.0


def test_rates_leave_out_what_is_sent_before_a_checkpoint(tmp_path, monkeypatch):
    """Figures, to a bucket: at step 3 that is said to take three seconds."""
    seconds = iter([3.0, 0.0])
    monkeypatch.setattr(MetricsFile, "sync", lambda file: time.sleep(next(seconds)))
    run(tmp_path, checkpoint={"every_steps": 3})
    assert 5 * B / records(tmp_path)[-1]["sequences_per_second"] < 3.0
    assert not list(seconds)


# What is not finite


def poison(name, value):
    """Batches whose field becomes ``value`` at step 4 (the fourth; counted from 0, the third)."""
    return lambda step: batch_of(step) | ({name: np.full_like(batch_of(step)[name], value)} if step == 3 else {})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("y", np.inf, "step 4: loss inf; the gradient of line/kernel is not finite"),
        ("y", np.nan, "step 4: loss nan; the gradient of line/kernel is not finite"),
        ("z", 0, r"step 4: loss \d.*; the gradient of line/offset is not finite"),
    ],
)
def test_what_is_not_finite_stops_the_run(tmp_path, name, value, message):
    with pytest.raises(NotFiniteError, match=message):
        run(tmp_path, make_task(poison(name, value)), checkpoint={"every_steps": 1})
    assert list_steps(tmp_path / "checkpoints") == [1, 2, 3]
    params, step = load_params(tmp_path / "checkpoints")
    assert step == 3 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_an_update_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NotFiniteError, match=r"step 1: line/kernel itself is not finite"):
        run(tmp_path, optimizer={"learning_rate": 1e30}, checkpoint={"every_steps": 1})
    assert list_steps(tmp_path / "checkpoints") == []


def test_an_evaluator_that_finds_such_a_number_stops_the_run(tmp_path):
    """Parameters may be finite, and what they say of held-out data may not."""

    def score(told):
        raise FloatingPointError("a score")

    evaluator = Evaluator(lambda: iter([batch_of(0)]), lambda params, batch: {}, "distance", score=score)
    with pytest.raises(
        NotFiniteError, match=r"step 4: a score of held_out is not finite\. It was not saved; .* step 2"
    ):
        run(tmp_path, make_task(evaluators={"held_out": evaluator}), train={"eval_every_steps": 4})
    assert list_steps(tmp_path / "checkpoints") == [2]


def test_it_takes_one_line_and_a_status_of_its_own(tmp_path, capsys):
    def command(argv):
        run(tmp_path, make_task(poison("y", np.nan)))

    with pytest.raises(SystemExit) as stop:
        cli.main("prog", {"go": ("", command)}, ["go"])
    assert stop.value.code == 70
    assert capsys.readouterr().err.splitlines() == [
        "prog: step 4: loss nan; the gradient of line/kernel is not finite. It was not saved; the last good "
        f"checkpoint in {tmp_path / 'checkpoints'} is of step 2. Start again in a new workdir with a lower "
        "optimizer.learning-rate or optimizer.clip-norm"
    ]


@pytest.mark.parametrize(
    ("every_steps", "good"), [(1, "is of step 3"), (2, "is of step 2"), (0, "It was not saved; no step before was.")]
)
def test_it_names_the_last_good_checkpoint(tmp_path, every_steps, good):
    """The same one when the run is resumed and ends there again."""
    for _ in range(2):
        with pytest.raises(NotFiniteError) as caught:
            run(tmp_path, make_task(poison("y", np.nan)), checkpoint={"every_steps": every_steps})
        assert good in str(caught.value)
    steps = list_steps(tmp_path / "checkpoints")
    assert steps == {0: [], 1: [1, 2, 3], 2: [2]}[every_steps]


# When it saves


def test_saves_by_steps_and_at_the_end(tmp_path):
    run(tmp_path, checkpoint={"every_steps": 4})
    assert list_steps(tmp_path / "checkpoints") == [4, 6]


def test_saves_by_minutes(tmp_path):
    run(tmp_path, checkpoint={"every_steps": 0, "every_minutes": 1e-9})
    assert list_steps(tmp_path / "checkpoints") == [1, 2, 3, 4, 5, 6]


def test_a_signal_saves_the_step_it_comes_in(tmp_path):
    def batch(step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch_of(step)

    with pytest.raises(Interrupted, match="SIGTERM: step 3 is saved"):
        run(tmp_path, make_task(batch), checkpoint={"every_steps": 0})
    assert list_steps(tmp_path / "checkpoints") == [3]
    run(tmp_path)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_data_keeps_what_is_being_saved(tmp_path):
    def batch(step):
        if step == 2:
            raise OSError("no such shard")
        return batch_of(step)

    with pytest.raises(OSError, match="no such shard"):
        run(tmp_path, make_task(batch))
    assert list_steps(tmp_path / "checkpoints") == [2]


# What it measures


def held_out(num_examples, objective="error"):
    """Batches of B over the examples; the last is filled up with weight 0 and numbers that would show."""
    x = np.random.default_rng(0).normal(size=num_examples).astype(np.float32)

    def batches():
        for start in range(0, num_examples, B):
            part = x[start : start + B]
            rest = B - len(part)
            yield {"x": np.pad(part, (0, rest), constant_values=99), "weight": np.pad(np.ones(len(part)), (0, rest))}

    def metric_sums(params, batch):
        total = jnp.sum(batch["weight"])
        return {"error": (jnp.sum(batch["x"] * batch["weight"]), total), "share": (total, jnp.float32(num_examples))}

    return x, Evaluator(batches, metric_sums, objective)


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("num_examples", [8, 13, 17])
def test_evaluation_counts_every_example_once(num_examples, num_devices):
    x, evaluator = held_out(num_examples)
    evaluate = make_evaluate(evaluator, make_mesh(CONFIG.mesh, jax.devices()[:num_devices]))
    metrics = evaluate({})
    assert metrics["error"] == pytest.approx(x.astype(np.float64).mean(), abs=1e-6)
    # Of each batch: its weight over all examples' number; added up over batches and divided by as many.
    assert metrics["share"] * -(-num_examples // B) == pytest.approx(1)
    assert evaluate({}) == metrics


def test_the_best_stays(tmp_path):
    """The held-out loss is the distance from 0.3 of a number that training moves from 0 past it."""

    def metric_sums(params, batch):
        return {"distance": (jnp.abs(params["line"]["kernel"][0, 0] - 0.3), jnp.float32(1))}

    batch = {"x": np.zeros(B, np.float32)}
    evaluators = {"held_out": Evaluator(lambda: iter([batch]), metric_sums, "distance")}
    last = run(
        tmp_path,
        make_task(evaluators=evaluators),
        train={"eval_every_steps": 1},
        checkpoint={"every_steps": 0, "every_minutes": 0, "keep_last": 1},
    )
    distances = [record["held_out/distance"] for record in records(tmp_path) if "held_out/distance" in record]
    assert len(distances) == 6 and last == {"loss": distances[-1], "distance": distances[-1]}
    best = 1 + int(np.argmin(distances))
    assert best < 6 and list_steps(tmp_path / "checkpoints") == [best, 6]


def test_figures_are_means_over_their_interval(tmp_path):
    run(tmp_path / "each")
    run(tmp_path / "three", log={"every_steps": 3})
    each = [record["loss"] for record in records(tmp_path / "each")]
    for number, record in enumerate(records(tmp_path / "three")):
        assert record["step"] == 3 * number + 3
        assert record["loss"] == pytest.approx(np.mean(each[3 * number : 3 * number + 3]), rel=1e-6)
