"""What a user does, from text to filled masks."""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import shutil
import textwrap

import pytest

from bert_flax.cli import EvaluateCommand, FillMaskCommand
from bert_flax.prepare import PrepareConfig
from bert_flax.presets import PRESETS
from bert_flax.runs import PretrainCommand
from core_flax.checkpoint import list_steps
from core_flax.data.records import PassageStore
from core_flax.text.wordpiece import SPECIALS

COMMANDS = {
    "prepare": PrepareConfig,
    "pretrain": PretrainCommand,
    "evaluate": EvaluateCommand,
    "fill-mask": FillMaskCommand,
    "presets": None,
}
SIZES = {
    "bert_tiny": "4,433,468",
    "bert_mini": "11,267,900",
    "bert_small": "29,058,876",
    "bert_medium": "41,668,412",
    "bert_base": "110,106,428",
    "bert_large": "336,226,108",
}


def test_from_text_to_filled_masks(bert_flax, corpus, tmp_path):
    """Nothing but our own lines appears, on either stream."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    done = bert_flax.run("prepare", "--input", corpus, "--output", data, "--vocab-size", 160, "--valid-fraction", 0.1)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{data}: vocabulary of ")

    done = bert_flax.run(*bert_flax.pretrain(workdir, data=data, train__eval_every_steps=4))
    assert (done.returncode, done.stderr) == (0, "")
    number = r"[-+.\w]+"
    shape = [
        r"starts: 25,\d+ parameters, 1 device \(cpu\), batch of 8, 6 steps",
        *[rf"step {step}/6  loss {number}  mlm_accuracy .*" for step in (1, 2, 3, 4)],
        rf"step 4 held_out: .*mlm_loss {number}  .*",
        *[rf"step {step}/6  loss {number}  mlm_accuracy .* tokens/s .*" for step in (5, 6)],
        rf"step 6 held_out: .*mlm_loss {number}  .*",
        r"6 steps in \d+s, 1.54k tokens, .*",
        rf"training, last: loss {number}  .*",
        f"checkpoints: {workdir}/checkpoints",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == len(shape)
    for line, pattern in zip(lines, shape, strict=True):
        assert re.fullmatch(pattern, line), line
    assert list_steps(workdir / "checkpoints") == [4, 6]

    done = bert_flax.run("evaluate", "--workdir", workdir)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == [
        "held out, step 6",
        "masked tokens",
        "",
        "next sentence",
    ]
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['held_out/mlm_loss']:.4f}" in done.stdout and f"{last['held_out/unigram_loss']:.4f}" in done.stdout

    text = "The old [MASK] sees the [MASK]."
    done = bert_flax.run("fill-mask", "--workdir", workdir, text, "--top", 3)
    assert (done.returncode, done.stderr) == (0, "")
    asked, *filled = done.stdout.splitlines()
    assert asked == text and len(filled) == 2
    for line in filled:
        shares = [float(share) for share in re.findall(r"\S+ (\d+\.\d)%", line)]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)


def test_prepare_says_what_a_vocabulary_lacks(call, corpus, tmp_path):
    learned = call("prepare", "--input", corpus, "--output", tmp_path / "own", "--vocab-size", "30000")
    assert learned.returncode == 0 and "pieces, not 30,000: the text has no more to learn" in learned.stdout
    assert "[UNK]" not in learned.stdout and "capitals" not in learned.stdout
    cased = tmp_path / "vocab.txt"
    cased.write_text("".join(f"{piece}\n" for piece in (*SPECIALS, "The", "the", "##s", ".")))
    given = call("prepare", "--input", corpus, "--output", tmp_path / "given", "--vocab", cased)
    assert given.returncode == 0 and "1 pieces have capitals, such as 'The'" in given.stdout
    store = PassageStore(tmp_path / "given", "train")
    unknown, tokens = int(store.unigram[1]), store.manifest.splits["train"].tokens
    assert f"    {unknown:,} of them ({unknown / tokens:.2%}) are [UNK]" in given.stdout and 0 < unknown < tokens


def test_evaluate_here_and_there(call, finished_run, tmp_path):
    """On four devices, on another step, and from a folder that was moved, without a line on stderr."""
    moved = shutil.copytree(finished_run, tmp_path / "moved")
    here = call("evaluate", "--workdir", finished_run)
    assert (here.returncode, here.stderr) == (0, "")
    assert call("evaluate", "--workdir", moved).stdout == here.stdout
    assert "step 4" in call("evaluate", "--workdir", moved, "--step", 4).stdout
    stored = json.loads((moved / "config.json").read_text())
    stored["config"]["train"] |= {"num_microbatches": 4}  # portions of two rows, for four devices
    (moved / "config.json").write_text(json.dumps(stored))
    assert call("evaluate", "--workdir", moved).stdout == here.stdout
    last = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    shown = float(re.search(r"masked tokens +([\d.]+)", here.stdout)[1])
    assert shown == pytest.approx(last["held_out/mlm_loss"], abs=1e-4)


def test_own_text_moves_with_the_run(call, finished_run, data, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    shutil.copytree(data, workdir / "data")
    stored = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(stored | {"data": "data"}))
    assert call("evaluate", "--workdir", workdir.rename(tmp_path / "moved")).returncode == 0


def test_presets(call):
    done = call("presets")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:]}
    assert set(listed) == set(PRESETS) == {"bert_demo", *SIZES}
    assert {name: listed[name] for name in SIZES} == SIZES


def test_the_listed_size_of_the_demo_is_that_of_its_run(call, tmp_path):
    listed = next(line for line in call("presets").stdout.splitlines() if line.startswith("bert_demo"))
    small = ["--schedule.warmup-steps=0", "--train.num-steps=1", "--train.eval-batches=1"]
    done = call("pretrain", "--workdir", tmp_path, *small)
    assert done.returncode == 0, done.stderr
    assert f"starts: {listed.split()[1]} parameters" in done.stdout


def test_a_preset_may_stand_anywhere(call, bert_flax, tmp_path):
    """And an option's value is no preset, even if it has the name of one."""
    command = bert_flax.pretrain(tmp_path / "bert_base", train__num_steps=1)
    command.remove("bert_tiny")
    for argv in ([*command, "bert_tiny"], [command[0], "--log.no-tensorboard", "bert_tiny", *command[1:]]):
        done = call(*argv, "--log.every_steps", "1")
        assert done.returncode == 0, done.stderr


# Help


def settings(cls, prefix="--"):
    """(option, class, field) of every setting in a dataclass."""
    for field in dataclasses.fields(cls):
        option = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from settings(field.type, option + ".")
        else:
            yield option, cls, field


def documentation(cls):
    """The string under each field, by the field's name, of a class and those it inherits from."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in itertools.pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_documents_every_setting_and_its_default(call, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    done = call(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert command in call("--help").stdout
    assert "``" not in done.stdout and "\n\n\n" not in done.stdout
    shown = " ".join(done.stdout.replace("│", " ").split())
    default = PretrainCommand(workdir="", **vars(PRESETS["bert_demo"]()))
    for option, cls, field in settings(COMMANDS[command]) if COMMANDS[command] else ():
        text = documentation(cls).get(field.name, "")
        assert len(text.split()) >= 2 and text[-1] in ".)", f"{option} says too little of what it is: {text!r}"
        assert text in shown and (option in shown or field.name == "text"), option
        if command == "pretrain" and option not in ("--workdir", "--data"):
            value = functools.reduce(getattr, option[2:].replace("-", "_").split("."), default)
            assert f"{text} (default: {value})" in shown, option


# Again with the same workdir


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate: 0.003 -> 0.001"),
        ({"train__batch_size": 16}, "train.batch_size: 8 -> 16"),
        ({"schedule__total_steps": 30}, "schedule.total_steps: 20 -> 30"),
        ({"model__width": 64, "inputs__length": 16}, "model.width: 32 -> 64; inputs.length: 32 -> 16"),
    ],
    ids=str,
)
def test_another_run_is_refused_with_the_difference(call, bert_flax, run, finished_run, changes, difference):
    done = call(*bert_flax.pretrain(run, **changes))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"holds a run with other settings, which these cannot continue: {difference};" in done.stderr
    assert contents(run) == contents(finished_run)


def test_what_may_change(bert_flax, run):
    """A run goes on longer since its schedule does not depend on how long; --data is that of the run."""
    command = [
        argument for argument in bert_flax.pretrain(run, train__num_steps=8) if not argument.startswith("--data")
    ]
    done = bert_flax.run(*command, "--log.no-tensorboard", "--checkpoint.keep-best", "2", "--train.eval-batches", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "resumes at step 6" in done.stdout and "step 8/8" in done.stdout
    assert json.loads((run / "config.json").read_text())["config"]["train"]["num_steps"] == 8


def test_evaluate_reads_all_that_is_held_out(call, run):
    """However little of it training looked at."""
    expected = call("evaluate", "--workdir", run)
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["train"]["eval_batches"] = 1
    (run / "config.json").write_text(json.dumps(stored))
    done = call("evaluate", "--workdir", run)
    assert (done.returncode, done.stdout) == (0, expected.stdout) and "masked tokens" in done.stdout


def test_a_schedule_laid_out_over_the_run_fixes_its_length(call, bert_flax, run):
    """Without schedule.total_steps a linear schedule ends where the run ends."""
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["schedule"] |= {"total_steps": None}
    (run / "config.json").write_text(json.dumps(stored))
    command = [argument for argument in bert_flax.pretrain(run, train__num_steps=8) if "total-steps" not in argument]
    done = call(*command)
    assert done.returncode == 2 and "schedule.total_steps: 6 -> 8" in done.stderr
    stored["config"]["schedule"] |= {"name": "constant", "final_fraction": 0.0}
    (run / "config.json").write_text(json.dumps(stored))
    options = ["--schedule.name=constant", "--schedule.final-fraction=0", "--train.batch-size=16"]
    done = call(*[a for a in command if a.split("=")[0] not in {o.split("=")[0] for o in options}], *options)
    assert done.returncode == 2 and "cannot continue: train.batch_size: 8 -> 16;" in done.stderr


def test_a_finished_run_has_nothing_to_do(bert_flax, run, finished_run):
    done = bert_flax.run(*bert_flax.pretrain(run))
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to train: step 6 of 6 was reached before" in done.stdout
    assert (run / "metrics.jsonl").read_text() == (finished_run / "metrics.jsonl").read_text()
    assert contents(run / "checkpoints") == contents(finished_run / "checkpoints")
