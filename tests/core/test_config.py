"""Settings out of range, and config.json as others may have left it: one clear line for each."""

import dataclasses
import io
import json
import math
import os
import select
import sys
import typing
from collections.abc import Mapping

import pytest

from bert_flax.config import BertConfig, InputsConfig, PretrainConfig
from core_flax import cli, storage
from core_flax import config as configs
from core_flax.config import (
    CheckpointConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from core_flax.types import UserError

BOUNDS = [
    (OptimizerConfig, "learning_rate", [1e-9, 10.0], [0.0, -1.0], "more than 0"),
    (OptimizerConfig, "weight_decay", [0.0, 2.0], [-0.1], "0 or more"),
    (OptimizerConfig, "clip_norm", [1e-9, None], [0.0, -1.0], "more than 0, or None"),
    (OptimizerConfig, "beta1", [0.0, 0.999, None], [-0.1, 1.0], "0 or more and less than 1, or None"),
    (OptimizerConfig, "beta2", [0.0, 0.999, None], [-0.1, 1.0], "0 or more and less than 1, or None"),
    (OptimizerConfig, "epsilon", [1e-30, None], [0.0, -1e-8], "more than 0, or None"),
    (ScheduleConfig, "warmup_steps", [0, 9], [-1], "0 or more"),
    (ScheduleConfig, "total_steps", [1, None], [0], "1 or more, or None"),
    (ScheduleConfig, "decay_steps", [1, None], [0], "1 or more, or None"),
    (ScheduleConfig, "final_fraction", [0.0, 1.0], [-0.1, 1.1], "0 or more and at most 1"),
    (TrainConfig, "num_steps", [1], [0], "1 or more"),
    (TrainConfig, "num_steps", [2**31 - 1], [2**31], "less than 2147483648"),
    (TrainConfig, "ema_decay", [0.999, None], [0.0, 1.0], "more than 0 and less than 1, or None"),
    (TrainConfig, "batch_size", [1], [0], "1 or more"),
    (TrainConfig, "num_microbatches", [1], [0], "1 or more"),
    (TrainConfig, "eval_every_steps", [0], [-1], "0 or more"),
    (TrainConfig, "eval_batches", [0], [-1], "0 or more"),
    (MeshConfig, "data", [1, -1], [0, -2], "1 or more"),
    (MeshConfig, "fsdp", [1], [0, -1], "1 or more"),
    (MeshConfig, "tensor", [1], [0, -1], "1 or more"),
    (MeshConfig, "sequence", [1], [0, -1], "1 or more"),
    (MeshConfig, "dcn_data", [1], [0, -1], "1 or more"),
    (MeshConfig, "dcn_fsdp", [1], [0, -1], "1 or more"),
    (CheckpointConfig, "every_steps", [0], [-1], "0 or more"),
    (CheckpointConfig, "every_minutes", [0.0], [-0.5], "0 or more"),
    (CheckpointConfig, "keep_last", [1], [0], "1 or more"),
    (CheckpointConfig, "keep_best", [0], [-1], "0 or more"),
    (LogConfig, "every_steps", [1], [0], "1 or more"),
    (LogConfig, "stall_seconds", [0.0], [-1.0], "0 or more"),
    (PretrainConfig, "seed", [0, 2**31 - 1], [-1, 2**31], "0 or more and less than 2147483648"),
    *[
        (BertConfig, name, [1], [0, -1], "1 or more")
        for name in ("vocab_size", "num_layers", "mlp_width", "max_length", "num_segments")
    ],
    (BertConfig, "unroll", [1, None], [0], "1 or more, or None"),
    (BertConfig, "width", [12], [0], "1 or more"),
    (BertConfig, "num_heads", [1], [0], "1 or more"),
    (BertConfig, "dropout", [0.0, 0.9], [-0.1, 1.0], "0 or more and less than 1"),
    (BertConfig, "attention_dropout", [0.0, 0.9], [-0.1, 1.0], "0 or more and less than 1"),
    (BertConfig, "init_stddev", [1e-9], [0.0, -0.02], "more than 0"),
    (BertConfig, "norm_epsilon", [1e-12], [0.0, -1e-12], "more than 0"),
    (InputsConfig, "length", [23, 512], [7], "8 or more"),
    (InputsConfig, "max_predictions", [1, 125], [0, 126], "1 or more and at most 125"),
    (InputsConfig, "long_from_step", [0, None], [-1], "0 or more, or None"),
    (InputsConfig, "mask_rate", [0.01, 0.99], [0.0, 1.0], "more than 0 and less than 1"),
    (InputsConfig, "short_rate", [0.0, 1.0], [-0.1, 1.1], "0 or more and at most 1"),
    (InputsConfig, "random_next_rate", [0.0, 1.0], [-0.1, 1.1], "0 or more and at most 1"),
    (InputsConfig, "num_workers", [0], [-1], "0 or more"),
]
SECTIONS = {field.type: f"{field.name}." for field in dataclasses.fields(PretrainConfig)} | {PretrainConfig: ""}


@pytest.mark.parametrize(("cls", "name", "good", "bad", "words"), BOUNDS, ids=lambda each: str(each)[:30])
def test_ranges(cls, name, good, bad, words):
    for value in good:
        assert getattr(cls(**{name: value}), name) == value
    is_float = float in (typing.get_type_hints(cls)[name], *typing.get_args(typing.get_type_hints(cls)[name]))
    for value in [*bad, *([math.nan, math.inf, -math.inf] if is_float else [])]:
        with pytest.raises(UserError) as caught:
            cls(**{name: value})
        assert str(caught.value) == f"--{SECTIONS[cls]}{name}".replace("_", "-") + f" {value}: must be {words}"


def test_every_number_has_a_range():
    numbers = set()
    for cls in SECTIONS:
        if dataclasses.is_dataclass(cls):
            for name, hint in typing.get_type_hints(cls).items():
                if {int, float} & {hint, *typing.get_args(hint)}:
                    numbers.add((cls, name))
    assert numbers == {(cls, name) for cls, name, *_ in BOUNDS}


# config.json

CONFIG = RunConfig(seed=3, optimizer=OptimizerConfig(name="lion", clip_norm=None), schedule=ScheduleConfig("cosine"))


def test_a_config_survives_json():
    assert configs.from_dict(RunConfig, json.loads(json.dumps(configs.to_dict(CONFIG)))) == CONFIG


def test_a_whole_number_is_a_float():
    assert configs.from_dict(RunConfig, {"optimizer": {"weight_decay": 0}}).optimizer.weight_decay == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "unknown setting sed; did you mean seed?"),
        ({"train": {"num_step": 1}}, "unknown setting train.num_step; did you mean train.num_steps?"),
        ({"train": 7}, "train is 7, no object with settings"),
        ([], "config is [], no object with settings"),
        ({"seed": "0"}, "seed is '0', where int is wanted"),
        ({"seed": 1.5}, "seed is 1.5, where int is wanted"),
        ({"seed": True}, "seed is True, where int is wanted"),
        ({"seed": None}, "seed is None, where int is wanted"),
        ({"log": {"tensorboard": 1}}, "log.tensorboard is 1, where bool is wanted"),
        ({"optimizer": {"beta1": "0.9"}}, "optimizer.beta1 is '0.9', where float | None is wanted"),
        (
            {"optimizer": {"name": "adam"}},
            "optimizer.name is 'adam', where one of adamw, lamb, adafactor, lion, muon, sgd",
        ),
        ({"optimizer": {"name": ["muon"]}}, "optimizer.name is ['muon'], where one of"),
        ({"optimizer": {"beta1": 2}}, "--optimizer.beta1 2: must be 0 or more and less than 1, or None"),
    ],
    ids=str,
)
def test_settings_of_another_kind_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        configs.from_dict(RunConfig, values)
    assert str(caught.value).startswith(message)


@dataclasses.dataclass(frozen=True)
class Parts:
    name: str
    labels: tuple[str, ...] = ()
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


def test_lists_and_objects():
    whole = Parts("x", ("a", "b"), {"f1": 1})
    assert configs.from_dict(Parts, json.loads(json.dumps(configs.to_dict(whole)))) == whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name is missing"),
        ({"name": ["x"]}, "name is ['x'], where str is wanted"),
        ({"name": "x", "labels": "ab"}, "labels is 'ab', where tuple is wanted"),
        ({"name": "x", "labels": ["a", 1]}, "labels is ['a', 1]"),
        ({"name": "x", "figures": {"f1": "1"}}, "figures is {'f1': '1'}, where "),
        ({"name": "x", "figures": [1]}, "figures is [1]"),
    ],
    ids=str,
)
def test_lists_and_objects_of_another_kind_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        configs.from_dict(Parts, values)
    assert str(caught.value).startswith(message)


# Files that take the place of others


def test_a_file_is_replaced_and_nothing_beside_it(tmp_path):
    """Whatever the names: neither a file that is called like a temporary one, nor the way to a linked file."""
    (tmp_path / "out.tmp").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "out.de")
    for name in ("link", "out.tmp"):
        with storage.replacing(tmp_path / name) as partial:
            partial.write_text(f"new {name}")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out.de").read_text() == "new link"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out.de", "out.tmp"]
    assert (tmp_path / "out.tmp").read_text() == "new out.tmp"
    with pytest.raises(RuntimeError), storage.replacing(tmp_path / "out.de") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "out.de").read_text() == "new link" and len(list(tmp_path.iterdir())) == 3


def test_what_is_no_file_is_written_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with storage.replacing(pipe) as partial:
        partial.write_text("through")
    assert os.read(reader, 99) == b"through" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(UserError, match="could not be written: Is a directory"), storage.replacing(tmp_path) as partial:
        partial.write_text("x")


def test_whether_a_file_can_be_written_is_found_out_without_a_trace(tmp_path):
    """And a pipe's reader is not told that this was all."""
    storage.check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "there").write_text("text")
    storage.check_writable(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "text"
    with pytest.raises(UserError, match="could not be written: Is a directory"):
        storage.check_writable(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    storage.check_writable(tmp_path / "pipe")
    heard = select.poll()
    heard.register(reader)
    assert heard.poll(0) == []  # nor hung up
    os.close(reader)


# Options that were given


@pytest.mark.parametrize("argv", [["--optimizer.beta2=0.98"], ["--optimizer.beta2", "0.98"], ["--log.no-tensorboard"]])
def test_a_value_that_was_given_stays(argv):
    """The preset's 0.98 is Muon's, and goes with it unless 0.98 was asked for."""
    preset = OptimizerConfig(name="muon", beta2=0.98)
    given = cli.options_given(PretrainConfig, [*argv, "--optimizer.name", "adamw"])
    got = configs.with_optimizer_of(dataclasses.replace(preset, name="adamw"), preset, given)
    assert got.beta2 == (None if "tensorboard" in argv[0] else 0.98)
    assert configs.with_optimizer_of(preset, preset, given) == preset


def test_sgd_does_not_hand_on_its_learning_rate():
    """35 would be the end of an Adam, and 1e-3 no beginning for SGD."""
    for theirs, ours in (("sgd", "adamw"), ("muon", "sgd")):
        preset = OptimizerConfig(name=theirs, learning_rate=35.0)
        asked = dataclasses.replace(preset, name=ours)
        with pytest.raises(UserError, match=f"learning rate of 35 is for {theirs}; give --optimizer.learning-rate too"):
            configs.with_optimizer_of(asked, preset, {"--optimizer.name"})
        given = {"--optimizer.name", "--optimizer.learning-rate"}  # and be it the same
        assert configs.with_optimizer_of(asked, preset, given).learning_rate == 35


def test_a_schedule_of_another_shape_is_without_what_the_preset_chose_for_its_own():
    preset = ScheduleConfig("wsd", warmup_steps=10, total_steps=100, decay_steps=20, final_fraction=0.1)
    cosine = configs.with_schedule_of(dataclasses.replace(preset, name="cosine"), preset, {"--schedule.name"})
    assert cosine == ScheduleConfig("cosine", warmup_steps=10, total_steps=100)
    given = {"--schedule.final-fraction", "--schedule.decay-steps"}
    assert configs.with_schedule_of(dataclasses.replace(preset, name="cosine"), preset, given).final_fraction == 0.1
    constant = configs.with_schedule_of(dataclasses.replace(preset, name="constant"), preset, set())
    assert constant == ScheduleConfig("constant", warmup_steps=10)
    assert configs.with_schedule_of(preset, preset, set()) == preset


def test_given_options_are_no_values():
    argv = ["--optimizer.beta1", "-1", "--log.tensorboard", "--train.num_steps=5", "--mesh.data", "--seed"]
    names = {"--optimizer.beta1", "--log.tensorboard", "--train.num-steps", "--mesh.data"}
    assert cli.options_given(PretrainConfig, argv) == names


def test_what_is_printed_where_the_terminal_lacks_its_letters(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        cli.main("program", {"say": ("says it", lambda argv: print("zwölf"))}, ["say"])
    assert (stop.value.code, raw.getvalue()) == (0, rb"zw\xf6lf" + b"\n")


def test_without_a_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as stop:
        cli.main("program", {"say": ("says it", lambda argv: print("it"))}, ["say"])
    assert stop.value.code == 0
