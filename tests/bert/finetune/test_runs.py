"""What settings become, which checkpoint counts as the best, what is told from seeds, and which head is kept."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from bert_flax.finetune.command import _check_segments, _head, _places, summarize, table
from bert_flax.finetune.config import FinetuneInputs, FinetuneSettings, resolve, settings_of
from bert_flax.finetune.data import TaskData, encode
from bert_flax.finetune.examples import TextExample
from bert_flax.finetune.predictions import _between
from bert_flax.finetune.runs import (
    FinetuneRun,
    Origin,
    Result,
    TaskChoice,
    _check_not_behind,
    _check_resumable,
    _result,
    best_run,
    figures_by_step,
)
from bert_flax.finetune.task import Labelled
from bert_flax.finetune.tasks import TASKS
from bert_flax.huggingface import Pretrained, Report, TaskHead
from bert_flax.model import BertConfig
from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig, OptimizerConfig, TrainConfig
from core_flax.state import TrainState
from core_flax.text.wordpiece import SPECIALS, WordPiece
from core_flax.types import UserError

MODEL = BertConfig(vocab_size=8, num_layers=1, width=4, num_heads=2, mlp_width=4, max_length=128)
VOCABULARY = WordPiece([*SPECIALS, "a", "b"])
ORIGIN = Origin("data", "0", "init", "1")


def resolved(spec, num_units, **changes):
    return resolve(dataclasses.replace(settings_of(spec), **changes), MODEL, num_units)


# Settings


def test_the_papers_recipe_for_mrpc():
    """3,668 pairs in batches of 32, three epochs, a tenth of them warmup; the rates fall to nothing."""
    config = resolved(TASKS["mrpc"], 3668)
    assert (config.train.num_steps, config.schedule.warmup_steps, config.train.batch_size) == (344, 34, 32)
    assert config.optimizer.learning_rate == 5e-5 and config.optimizer.weight_decay == 0.01
    assert config.schedule.name == "linear" and config.schedule.final_fraction == 0
    assert config.model == MODEL


@pytest.mark.parametrize("num_units", [3640, 3648, 3660, 3668, 33])
@pytest.mark.parametrize("times", [1, 3])
def test_an_epoch_has_as_many_evaluations_as_were_asked_for(num_units, times):
    train = resolved(TASKS["mrpc"], num_units, evaluations_per_epoch=times).train
    steps = {*range(train.eval_every_steps, train.num_steps, train.eval_every_steps), train.num_steps}
    assert len(steps) == min(3 * times, train.num_steps)
    gaps = np.diff([0, *sorted(steps)])
    assert gaps[:-1].max() - gaps[-1] <= 3 * times


def test_what_is_given_instead_is_taken():
    train = TrainConfig(num_steps=1000, eval_every_steps=0, batch_size=8)
    config = resolved(TASKS["rte"], 50, epochs=None, warmup_share=None, evaluations_per_epoch=None, train=train)
    assert (config.train, config.schedule.warmup_steps) == (train, 0)
    config = resolved(TASKS["rte"], 50, dropout=0.3, attention_dropout=0.0, epochs=0.01)
    assert (config.model.dropout, config.model.attention_dropout, config.train.num_steps) == (0.3, 0.0, 1)


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match=r"--inputs.max-length 384 exceeds the 128 positions"):
        resolved(TASKS["squad"], 50)
    with pytest.raises(UserError, match=r"--train.eval-batches 2: a task is measured on its whole dev set"):
        FinetuneSettings(train=TrainConfig(eval_batches=2))
    with pytest.raises(UserError, match=r"--checkpoint.keep-best 0: the best checkpoint is what predict"):
        FinetuneSettings(checkpoint=CheckpointConfig(keep_best=0))


# What came of a run


def make_run(folder, task, evaluations, saved, seed=0):
    """A folder as training leaves it: ``evaluations`` by step, of which some steps were saved."""
    settings = {"epochs": None, "train": TrainConfig(batch_size=8, num_steps=max(saved)), "inputs": FinetuneInputs()}
    config = resolved(TASKS[task], 64, seed=seed, **settings)
    run = FinetuneRun(folder, config, TaskChoice(task), VOCABULARY, ORIGIN)
    run.save()
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(keep_last=9))
    for step in saved:
        loss = -evaluations[step][f"dev/{TASKS[task].primary}"]
        state = TrainState(jnp.int32(step), {"encoder": {"x": jnp.full(2, step)}, "head": {"x": jnp.zeros(1)}}, {})
        checkpoints.save(state, {"loss": loss})
    checkpoints.close()
    records = [{"step": step, "loss": 1.0} for step in range(1, max(saved) + 1)]
    records += [{"step": step, **figures, "time": 1.5} for step, figures in evaluations.items()]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return run


def test_the_best_figures_are_those_of_the_checkpoint_that_was_kept(tmp_path):
    """Step 4 is as good as step 2, so it was not saved: its threshold is not that of the parameters that are there."""
    figures = {2: (50.0, 1.5), 4: (50.0, -3.0), 6: (40.0, 0.5)}
    evaluations = {step: {"dev/f1": f1, "dev/null_threshold": odds} for step, (f1, odds) in figures.items()}
    run = make_run(tmp_path, "squad2", evaluations, saved=[2, 6])
    result = _result(run, 2.04, resumed=True)
    assert result == Result("squad2", 0, evaluations[6], evaluations[2], 2, 6, 2.0, True)
    params, step = run.params()
    assert step == 2 and params["encoder"]["x"].tolist() == [2, 2]
    result.save(tmp_path)
    assert Result.load(tmp_path) == result


def test_figures_of_a_run_that_was_killed(tmp_path):
    make_run(tmp_path, "rte", {2: {"dev/accuracy": 50.0}}, saved=[2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "dev/accu')
    assert figures_by_step(tmp_path) == {2: {"dev/accuracy": 50.0}}
    assert figures_by_step(tmp_path / "elsewhere") == {}


def test_of_several_seeds_the_best_one(tmp_path):
    for seed, (last, best) in enumerate([(60.0, 70.0), (50.0, 80.0), (75.0, 75.0)]):
        folder = tmp_path / "rte" / f"seed-{seed}"
        make_run(folder, "rte", {2: {"dev/accuracy": best}, 4: {"dev/accuracy": last}}, saved=[2, 4], seed=seed)
        if seed < 2:
            _result(FinetuneRun.load(folder), 1.0, False).save(folder)
    assert best_run(str(tmp_path / "rte")).workdir.name == "seed-1"  # the last one has not ended
    assert best_run(str(tmp_path / "rte" / "seed-2")).config.seed == 2
    with pytest.raises(UserError, match=r"holds no complete run of kind .*; give one of its folders rte"):
        best_run(str(tmp_path))
    result = tmp_path / "rte" / "seed-1" / "result.json"
    for damaged in ("{", "[]", json.dumps(json.loads(result.read_text()) | {"best": 5})):
        result.write_text(damaged)
        with pytest.raises(UserError, match=r"seed-1/result\.json is damaged; delete it"):
            best_run(str(tmp_path / "rte"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": {}}, "task.name is missing"),
        ({"task": {"name": ["rte"]}}, "task.name is ['rte'], where str is wanted"),
        ({"task": {"name": "mine"}}, "there is no task mine here; add it to bert_flax/finetune/tasks.py again"),
        ({"task": {"name": "mine", "columns": 5}}, "task.columns is 5, where str is wanted"),
        ({"task": {"name": "mine", "labels": "ab"}}, "task.labels is 'ab'"),
        ({"origin": {"data": "x"}}, "origin.data_content is missing"),
        ({"origin": {"data": {}}}, "origin.data is {}, where str is wanted"),
        ({"origin": "x"}, "origin is 'x', where dict is wanted"),
        ({"config": {"inputs": {"max_length": 8}}}, "--inputs.max-length 8: must be 16 or more"),
        ({"tokenizer": "x"}, "is not the vocabulary that this run was started with"),
    ],
    ids=str,
)
def test_a_damaged_config(tmp_path, change, message):
    make_run(tmp_path, "rte", {2: {"dev/accuracy": 50.0}}, saved=[2])
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(UserError) as error:
        best_run(str(tmp_path))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_means_over_seeds():
    """A type of entity that only one seed predicts, and the data does not have, is a figure of that seed's."""
    last = [{"dev/f1": 70.0}, {"dev/f1": 74.0, "dev/f1_LOC": 0.0}]
    best = [{"dev/f1": 80.0}, {"dev/f1": 80.0}]
    results = [Result("ner", n, last[n], best[n], 2, 4, 3.0 + n, False) for n in range(2)]
    summary = summarize(TASKS["ner"], results, {})
    assert summary["figures"] == {
        "dev/f1": {"last": {"mean": 72.0, "deviation": 8**0.5}, "best": {"mean": 80.0, "deviation": 0.0}},
        "dev/f1_LOC": {"last": {"mean": 0.0, "deviation": None}, "best": {"mean": None, "deviation": None}},
    }
    assert json.loads(json.dumps(summary)) == summary and summary["seconds"] == [3.0, 4.0]
    head, first, second, _ = table(summary).splitlines()
    assert head.split() == ["ner,", "2", "seeds,", "4", "s", "each", "last", "epoch", "best", "epoch"]
    assert first.split() == ["dev/f1", "72.00", "±", "2.83", "80.00", "±", "0.00", "*"]
    assert second.split() == ["dev/f1_LOC", "0.00", "-"]


def test_a_run_goes_on_with_the_data_that_it_was_measured_on(tmp_path):
    """The training data may be the same; runs of before this was noted are not asked."""
    examples = [TextExample("0", "a", None, 1), TextExample("1", "b", None, 0)]
    vocabulary, settings = VOCABULARY, FinetuneInputs()
    units = encode(TASKS["sst2"], examples, vocabulary, settings, labelled=True)

    def origin(*dev):
        data = TaskData(units, {"dev": Labelled(dev, units)}, ())
        return Origin("data", "0", "init", "1", data.held_out_content)

    first = make_run(tmp_path, "sst2", {2: {"dev/accuracy": 50.0}}, saved=[2])
    for noted, now, is_refused in (
        (origin(*examples), origin(*examples), False),
        (origin(*examples), origin(*examples[::-1]), True),
        (origin(*examples), origin(examples[0], dataclasses.replace(examples[1], label=1)), True),
        (Origin("data", "0", "init", "1"), origin(*examples), False),
    ):
        dataclasses.replace(first, origin=noted).save()
        new = dataclasses.replace(first, origin=now)
        if not is_refused:
            _check_resumable(FinetuneRun.load(tmp_path), new)
            continue
        with pytest.raises(UserError, match=r"which these cannot continue: dev data: .*data has changed; give"):
            _check_resumable(FinetuneRun.load(tmp_path), new)


def test_labels_of_a_task_that_were_changed_since(tmp_path, monkeypatch):
    """What the outputs of a model stand for is noted; in runs of before it was, it is what it is now."""
    make_run(tmp_path, "rte", {2: {"dev/accuracy": 50.0}}, saved=[2])
    for labels in (TASKS["rte"].labels[::-1], (*TASKS["rte"].labels, "maybe")):
        monkeypatch.setitem(TASKS, "rte", dataclasses.replace(TASKS["rte"], labels=labels))
        with pytest.raises(UserError, match=rf"the run has the labels .*, and task rte in .* has {', '.join(labels)};"):
            FinetuneRun.load(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["meaning"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert FinetuneRun.load(tmp_path).task.spec.labels == labels


def test_a_run_that_has_gone_further(tmp_path):
    make_run(tmp_path, "rte", {2: {"dev/accuracy": 50.0}, 4: {"dev/accuracy": 40.0}}, saved=[2, 4])
    _check_not_behind(tmp_path, 4)
    with pytest.raises(UserError, match=r"has a checkpoint of step 4 already; 3 steps are fewer"):
        _check_not_behind(tmp_path, 3)


def test_figures_that_were_deleted(tmp_path):
    run = make_run(tmp_path, "rte", {2: {"dev/accuracy": 50.0}, 4: {"dev/accuracy": 40.0}}, saved=[2, 4])
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl lacks the figures of step 2; put it back, or delete"):
        _result(run, 1.0, resumed=True)


def test_pairs_need_two_segments():
    inputs, one = FinetuneInputs(), Pretrained(dataclasses.replace(MODEL, num_segments=1), {}, VOCABULARY, Report(()))
    for task, pair, is_refused in (("sst2", None, False), ("rte", "b", True), ("rte", "", True)):
        units = encode(TASKS[task], [TextExample("0", "a", pair, 0)], VOCABULARY, inputs, labelled=True)
        _check_segments(dataclasses.replace(one, config=MODEL), units, "model")
        if not is_refused:
            _check_segments(one, units, "model")
            continue
        with pytest.raises(UserError, match=r"model has one segment .*, and the task's texts are pairs"):
            _check_segments(one, units, "model")


# Heads


def with_head(architecture, labels, num_outputs=3):
    kernel = np.arange(4 * num_outputs, dtype=np.float32).reshape(4, num_outputs)
    head = TaskHead(architecture, kernel, kernel[0], labels)
    return Pretrained(MODEL, {}, VOCABULARY, Report(()), head)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (("contradiction", "entailment", "neutral"), [1, 2, 0]),
        (("NEUTRAL", "CONTRADICTION", "ENTAILMENT"), [2, 0, 1]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_a_head_follows_the_labels_of_the_task(labels, order):
    found = with_head("BertForSequenceClassification", labels)
    kept = _head(TASKS["mnli"], found, "folder")
    np.testing.assert_array_equal(kept["kernel"], found.head.kernel[:, order])
    np.testing.assert_array_equal(kept["bias"], found.head.bias[order])


@pytest.mark.parametrize(
    ("task", "found", "message"),
    [
        ("mnli", with_head("BertForSequenceClassification", ("a", "b", "c")), "has the labels a, b, c; task mnli has"),
        ("rte", with_head("BertForSequenceClassification", None), "with 3 outputs; task rte needs that of a .* with 2"),
        (
            "squad",
            with_head("BertForSequenceClassification", None, 2),
            "needs that of a BertForQuestionAnswering with 2",
        ),
        ("swag", with_head("BertForSequenceClassification", None, 1), "needs that of a BertForMultipleChoice with 1"),
        ("rte", Pretrained(MODEL, {}, VOCABULARY, Report(())), "folder has no head of a task"),
    ],
)
def test_a_head_of_something_else_is_refused(task, found, message):
    with pytest.raises(UserError, match=message):
        _head(TASKS[task], found, "folder")


def test_labels_that_are_numbers_have_no_other_names():
    labels = ("not_equivalent", "equivalent")
    found = with_head("BertForSequenceClassification", labels, 2)
    np.testing.assert_array_equal(_head(TASKS["mrpc"], found, "folder")["bias"], found.head.bias)


def test_labels_that_differ_in_capitals_alone():
    spec = dataclasses.replace(TASKS["rte"], labels=("us", "US"))
    assert _places(spec, ("US", "us"), "folder") == [1, 0]
    with pytest.raises(UserError, match=r"has the labels Us, uS; task rte has us, US"):
        _places(spec, ("Us", "uS"), "folder")


def test_labels_that_are_numbers_are_in_the_order_of_numbers():
    """Not in that of texts, in which those of a table are: 0, 1, 10, 11, 2, ..."""
    numbers = tuple(sorted(map(str, range(12))))
    spec = dataclasses.replace(TASKS["rte"], labels=numbers)
    assert _places(spec, tuple(f"LABEL_{number}" for number in range(12)), "folder") == [*map(int, numbers)]


def test_recipes_are_told_apart_by_their_optimizer():
    assert settings_of(TASKS["mnli"]).optimizer == OptimizerConfig(learning_rate=2e-5)


def test_a_threshold_lies_between_two_questions():
    """So that another program, which rounds otherwise, parts them alike."""
    odds = {"sure": -2.0, "not": 1.5, "hardly": 2.5}
    for threshold, answered in ((-3.0, []), (-2.0, ["sure"]), (1.5, ["sure", "not"]), (2.5, list(odds))):
        between = _between(threshold, odds.values())
        assert [key for key, each in odds.items() if each <= between] == answered
        assert min(abs(each - between) for each in odds.values()) >= 0.5
