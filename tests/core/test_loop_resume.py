"""The loop when it is stopped, at whatever moment, and goes on: what it writes down is what it would have been."""

import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import B, batch_of, make_task, records, run

from core_flax import snapshot
from core_flax.checkpoint import Checkpoints, list_steps
from core_flax.config import CheckpointConfig
from core_flax.signals import Interrupted
from core_flax.task import Evaluator

LAST = 6
TIMED = {"time", "sequences_per_second", "tokens_per_second", "data_wait"}


def figures(workdir):
    return [{name: value for name, value in each.items() if name not in TIMED} for each in records(workdir)]


def told_at(step):
    """Batches, of which that of the given step (from 1) comes with a signal."""

    def batch(index):
        if index == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return batch_of(index)

    return batch


@pytest.mark.parametrize("every_steps", [1, 2, 4, 5])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_records_are_those_of_a_run_that_never_stopped(tmp_path, step, every_steps):
    """The sums are added up in the same order, so the means are equal bit by bit."""
    log = {"every_steps": every_steps}
    run(tmp_path / "whole", log=log)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", make_task(told_at(step)), log=log)
    run(tmp_path / "stopped", log=log)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")


def test_records_after_a_kill_are_those_of_a_run_that_never_stopped(tmp_path):
    """It goes on from a checkpoint before the last record."""

    def batch(index):
        if index == 4:
            raise OSError("as if killed")
        return batch_of(index)

    log = {"every_steps": 3}
    run(tmp_path / "whole", log=log)
    with pytest.raises(OSError, match="as if killed"):
        run(tmp_path / "killed", make_task(batch), log=log)
    assert [record["step"] for record in records(tmp_path / "killed")] == [3]
    assert list_steps(tmp_path / "killed" / "checkpoints") == [2, 4]
    run(tmp_path / "killed", log=log)
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")


def test_a_checkpoint_without_notes(tmp_path):
    """As the first version wrote them: the record is the mean of what is known."""
    run(tmp_path / "each")
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", make_task(told_at(3)), log={"every_steps": 5})
    path = tmp_path / "stopped" / "checkpoints" / "3" / "manifest" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["notes"]
    path.write_text(json.dumps(snapshot.seal(manifest)))
    run(tmp_path / "stopped", log={"every_steps": 5})
    each = [record["loss"] for record in records(tmp_path / "each")]
    found = {record["step"]: record["loss"] for record in records(tmp_path / "stopped")}
    assert found == pytest.approx({5: np.mean(each[3:5]), 6: each[5]}, rel=1e-6)


# Evaluation


class HeldOut:
    """Ten batches; a signal comes with one of an evaluation. The loss is the distance of a parameter from a target."""

    def __init__(self, target=0.3, evaluation=0, batch=0):
        self.target, self.told, self.evaluation, self.taken = target, (evaluation, batch), 0, 0

    def batches(self):
        self.evaluation += 1
        for number in range(1, 11):
            if (self.evaluation, number) == self.told:
                signal.raise_signal(signal.SIGTERM)
            self.taken += 1
            yield {"x": np.zeros(B, np.float32)}

    def metric_sums(self, params, batch):
        return {"distance": (jnp.abs(params["line"]["kernel"][0, 0] - self.target), jnp.float32(1))}

    def task(self, **settings):
        return make_task(evaluators={"held_out": Evaluator(self.batches, self.metric_sums, "distance")}, **settings)


TWICE = {"train": {"eval_every_steps": 3}, "checkpoint": {"every_steps": 0, "every_minutes": 0}}


@pytest.mark.parametrize(("evaluation", "step"), [(1, 3), (2, LAST)])
def test_a_signal_puts_an_end_to_an_evaluation(tmp_path, evaluation, step):
    """The state is saved after the batch in which it comes, and what was not measured is when the run goes on."""
    run(tmp_path / "whole", HeldOut().task(), **TWICE)
    held_out = HeldOut(evaluation=evaluation, batch=4)
    with pytest.raises(Interrupted, match=f"step {step} is saved"):
        run(tmp_path / "stopped", held_out.task(), **TWICE)
    assert held_out.taken == 10 * (evaluation - 1) + 4
    assert max(list_steps(tmp_path / "stopped" / "checkpoints")) == step
    assert [r["step"] for r in records(tmp_path / "stopped") if "held_out/distance" in r] == [3][: evaluation - 1]

    again = HeldOut()
    last = run(tmp_path / "stopped", again.task(), **TWICE)
    assert again.evaluation == 3 - evaluation
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    assert last["distance"] == figures(tmp_path / "whole")[-1]["held_out/distance"]
    checkpoints = Checkpoints(tmp_path / "stopped" / "checkpoints", CheckpointConfig())
    assert checkpoints.metrics(LAST) == {"loss": last["distance"]}
    checkpoints.close()


def test_a_signal_before_an_evaluation_is_due_comes_before_it(tmp_path):
    held_out = HeldOut()
    with pytest.raises(Interrupted, match="step 3 is saved"):
        run(tmp_path, held_out.task(make_batch=told_at(3)), **TWICE)
    assert held_out.taken <= 1
    run(tmp_path, held_out.task(), **TWICE)
    run(tmp_path / "whole", HeldOut().task(), **TWICE)
    assert figures(tmp_path) == figures(tmp_path / "whole")


def test_what_was_measured_is_written_once(tmp_path):
    """Killed between the record and the checkpoint that is given the metrics: it is measured again, and equal."""
    with pytest.raises(Interrupted):
        run(tmp_path, HeldOut(evaluation=1, batch=1).task(), **TWICE)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "held_out/distance": 0.5}\n')
    run(tmp_path, HeldOut().task(), **TWICE)
    assert [r["step"] for r in records(tmp_path) if "held_out/distance" in r] == [3, LAST]


def test_the_best_loss_is_remembered(tmp_path):
    """The parameter moves from 0 up, so that the distance from -1 grows: only the first evaluation is the best."""
    settings = {"train": {"eval_every_steps": 1}, "checkpoint": TWICE["checkpoint"] | {"keep_last": 9}}
    with pytest.raises(Interrupted):
        run(tmp_path, HeldOut(target=-1.0).task(make_batch=told_at(3)), **settings)
    assert list_steps(tmp_path / "checkpoints") == [1, 3]
    run(tmp_path, HeldOut(target=-1.0).task(), **settings)
    distances = [record["held_out/distance"] for record in records(tmp_path) if "held_out/distance" in record]
    assert distances == sorted(distances) and len(distances) == LAST
    assert list_steps(tmp_path / "checkpoints") == [1, 3, LAST]
