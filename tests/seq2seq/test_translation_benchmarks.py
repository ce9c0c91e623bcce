"""The long benchmarks: what was stopped half-way, or made by another command, is taken for no result."""

import importlib
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

AVERAGE = "the mean of 3 checkpoints, steps 4, 5, 6"


@pytest.fixture
def benchmark(monkeypatch):
    """A module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


class Commands:
    """In place of seq2seq-flax: leaves what its commands leave, and keeps their words."""

    def __init__(self):
        self.words = []

    def call(self, log, command, *words, tick=lambda: None):
        self.words.append((command, *map(str, words)))
        option = dict(itertools.pairwise(words))
        if command == "prepare":
            option["--output"].mkdir(parents=True)
            (option["--output"] / "manifest.json").write_text("{}")
        elif command == "train":
            tick()
        elif command == "average":
            folder = option["--workdir"] / f"averaged-{option['--last']}"
            folder.mkdir()  # refuses one that is there, as the command does
            return f"a warning\n{folder}: {AVERAGE}\n"
        elif command == "translate":
            shutil.copy(option["--input"], option["--output"])
        return ""


@pytest.fixture
def runs(benchmark, monkeypatch):
    """translation_runs with such commands: (the module, the commands)."""
    module, commands = benchmark("translation_runs"), Commands()
    monkeypatch.setattr(module, "call", commands.call)
    return module, commands


def train(runs, home, *options):
    return runs.trained(home / "run", "transformer_tiny", home / "data", options, last=3)


def test_an_average_that_was_stopped_is_made_anew(runs, tmp_path):
    runs, commands = runs
    half = tmp_path / "run" / "averaged-3" / "checkpoints"
    half.mkdir(parents=True)
    assert train(runs, tmp_path)["average"] == AVERAGE and not half.exists()
    assert train(runs, tmp_path)["average"] == AVERAGE
    assert [command for command, *_ in commands.words] == ["train", "average"]


def test_what_another_command_has_trained_is_no_result_of_this_one(runs, tmp_path):
    runs, _ = runs
    train(runs, tmp_path, "--train.num-steps", "10")
    with pytest.raises(
        SystemExit, match=r"was trained by another command, .*--train.num-steps 10; give another --workdir"
    ):
        train(runs, tmp_path, "--train.num-steps", "8000")


def test_time_and_commit_of_an_attempt_that_was_killed_are_kept(runs, tmp_path, monkeypatch):
    runs, _ = runs
    clock = iter([0.0, 0.0, 100.0, 130.0, 1000.0, 1000.0, 1010.0, 1020.0, 1020.0])
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    origin = dict.fromkeys(("date", "python", "hardware"), "")
    monkeypatch.setattr(runs.contest, "origin", lambda: origin | {"commit": "a" * 40, "changed_files": []})

    def killed(*words, tick):
        tick()
        shutil.copytree(tmp_path / "run", tmp_path / "left")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "call", killed)
        train(runs, tmp_path)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "left").rename(tmp_path / "run")
    monkeypatch.setattr(runs.contest, "origin", lambda: origin | {"commit": "b" * 40, "changed_files": ["x"]})
    facts = train(runs, tmp_path)
    assert facts["seconds"] == 100 + 20
    assert facts["commits"] == [["a" * 40, False], ["b" * 40, True]]
    facts |= {"hardware": {"cores": 2, "cpu": "one"}}
    assert runs.where_from(facts).startswith(f"commit {'a' * 12} and {'b' * 12} with changes, ")


def test_a_command_ticks_while_it_runs(benchmark, tmp_path, monkeypatch):
    module, ticks = benchmark("translation_runs"), []
    monkeypatch.setattr(module, "TICK_SECONDS", 0.01)
    assert "usage: seq2seq-flax" in module.call(tmp_path / "log", "--help", tick=lambda: ticks.append(1))
    assert ticks
    with pytest.raises(SystemExit, match="unknown command 'sing'"):
        module.call(tmp_path / "log", "sing")


def test_both_studies_in_one_folder(benchmark, runs, tmp_path, monkeypatch):
    """Each asks for its own models, and its page tells of them."""
    zero_shot, (_, commands) = benchmark("zero_shot"), runs
    monkeypatch.setattr(zero_shot, "NUM_TRAINED", 20)
    monkeypatch.setattr(zero_shot, "NUM_HELD_OUT", 4)
    (tmp_path / "text").mkdir()
    for language in ("en", "de", "fr", "cs"):
        for name in ("train", "test_2016_flickr"):
            with zero_shot.gzip.open(tmp_path / "text" / f"{name}.{language}.gz", "wt") as file:
                file.write("a line of four\nand another one\n")
    where = ["--workdir", str(tmp_path / "work"), "--output", str(tmp_path / "page")]
    for study in (["numbers"], ["multi30k", "--data", str(tmp_path / "text")]):
        monkeypatch.setattr(sys, "argv", ["zero_shot.py", *study, *where])
        zero_shot.main()
    figures = json.loads((tmp_path / "page.json").read_text())
    assert figures["numbers"]["title"] != figures["multi30k"]["title"]
    # The commands copy, so what is copied is right where the languages are one, as these are in the second study.
    assert {round(each["figure"]) for each in figures["multi30k"]["figures"].values()} == {100}
    assert {each["figure"] for each in figures["numbers"]["figures"].values()} == {0}
    page = (tmp_path / "page.md").read_text()
    assert page.count(AVERAGE) == 6 and page.count("without copies |") == 2
    assert all(f"Scored are {count} that" in " ".join(page.split()) for count in (4, 2))
    trained = [words for words in commands.words if words[0] == "train"]
    assert len(trained) == 6 and all("--checkpoint.every-minutes" in words for words in trained)
    assert sum("--copies" in words for words in commands.words) == 4
    assert sum(words[0] == "translate" for words in commands.words) == 2 * 8


def test_a_study_without_its_baseline(benchmark, runs, tmp_path, monkeypatch):
    zero_shot, (_, commands) = benchmark("zero_shot"), runs
    monkeypatch.setattr(zero_shot, "NUM_TRAINED", 20)
    monkeypatch.setattr(zero_shot, "NUM_HELD_OUT", 4)
    where = ["--workdir", str(tmp_path / "work"), "--output", str(tmp_path / "page")]
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", "numbers", "--no-baseline", *where])
    zero_shot.main()
    page = (tmp_path / "page.md").read_text()
    assert page.count(AVERAGE) == 2 and "ithout a bridge" not in page and "de-ja" not in page
    assert sum(words[0] == "train" for words in commands.words) == 2
