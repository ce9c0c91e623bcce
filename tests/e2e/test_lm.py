"""What a user does with a language model: prepare, train, stop and go on, evaluate, generate, score, export, import."""

import contextlib
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import write_corpus
from flax import traverse_util
from small_tasks import in_a_hurry

from core_flax.checkpoint import list_steps, load_params
from lm_flax.cli import main
from lm_flax.config import kind_of
from lm_flax.presets import PRESETS
from lm_flax.runs import COMMANDS

SMALL = {
    "model.num-layers": 1,
    "model.width": 32,
    "model.num-heads": 2,
    "model.mlp-width": 64,
    "train.batch-size": 8,
    "train.eval-every-steps": 0,
    "checkpoint.every-steps": 3,
    "schedule.warmup-steps": 2,
    "log.every-steps": 1,
}


@pytest.fixture(scope="module", autouse=True)
def hurry():
    with in_a_hurry():
        yield


def lm(*argv):
    """``lm-flax`` in this process, on four devices."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    return subprocess.CompletedProcess(argv, stop.value.code, out.getvalue(), err.getvalue())


def right(*argv):
    """What a command prints that ends well."""
    done = lm(*argv)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(*argv):
    """The one line of a command that is refused."""
    done = lm(*argv)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert done.stderr.startswith("lm-flax: error: ")
    return done.stderr


def train(workdir, data, preset="char_small", **changes):
    """Arguments that train a small model for six steps."""
    options = SMALL | {"train.num-steps": 6, "sample-tokens": 8, "schedule.total-steps": 6}
    options |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["train", preset, "--workdir", workdir, "--data", data, "--log.no-tensorboard", *flags]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The corpus by characters, by words and by byte pairs, and a run of six steps on the characters."""
    home = tmp_path_factory.mktemp("lm")
    text = write_corpus(home / "text.txt", num_documents=24)
    blank = ("--documents", "blank-line", "--num-workers", "1")
    right("prepare", "--input", text, "--output", home / "char", "--tokenizer", "char", *blank)
    right("prepare", "--input", text, "--output", home / "word", "--tokenizer", "word", *blank)
    right("prepare", "--input", text, "--output", home / "bpe", "--vocab-size", 300, *blank)
    (home / "printed.txt").write_text(right(*train(home / "run", home / "char")))
    return home


def params(workdir):
    tree, _ = load_params(workdir / "checkpoints", max(list_steps(workdir / "checkpoints")))
    return {path: np.asarray(x).tobytes() for path, x in traverse_util.flatten_dict(tree, sep="/").items()}


def test_a_run_ends_with_figures_and_a_sample(home):
    printed = (home / "printed.txt").read_text()
    number = r"[\d.,]+"
    table = rf"held out, step 6 +model +unigram\nloss, nats per token +({number}) +({number})\n"
    told = re.search(table, printed)
    assert told, printed
    assert re.search(r"a sample, temperature 0\.8:\n", printed)
    last = json.loads((home / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert told[1] == f"{last['held_out/loss']:.4f}"
    for name in ("perplexity per token", "bits per byte", "perplexity per word", "accuracy"):
        assert re.search(rf"^{name} +{number}", printed, re.MULTILINE), name


def test_evaluate_is_what_training_told(home):
    printed = right("evaluate", "--workdir", home / "run")
    assert printed in (home / "printed.txt").read_text()
    loss = {}
    for stride in (64, 16):
        told = right("evaluate", "--workdir", home / "run", "--stride", stride)
        loss[stride] = float(re.search(r"nats per token +([\d.]+)", told)[1])
    assert f"{loss[64]:.4f}" in printed and loss[16] != loss[64]
    of_train = right("evaluate", "--workdir", home / "run", "--step", 3, "--split", "train")
    assert of_train.startswith("training text, step 3 ")
    others = right("evaluate", "--workdir", home / "run", "--batch-size", 3)  # but for rounding
    assert others.splitlines()[:2] == printed.splitlines()[:2]
    part = right(*train(home / "run", home / "char", train__eval_batches=1))
    assert "(the model's of the first 1 batches; lm-flax evaluate --workdir" in part


@pytest.mark.parametrize("preset", ["gpt_speedrun", "lstm_small", "word2vec"])
def test_a_stopped_run_goes_on_as_if_it_had_not(home, tmp_path, preset):
    """On words; what was stopped at step 3 ends bit for bit where the other does."""
    changes = {"inputs__length": 16, "schedule__decay_steps": None}
    if preset != "gpt_speedrun":
        changes |= {"model__num_heads": None, "model__mlp_width": None}
    if preset == "word2vec":
        changes |= {"model__num_layers": None, "sample_tokens": None}
    else:
        changes |= {"schedule__decay_steps": 2}
    command = train(tmp_path / "whole", home / "word", preset, **changes)
    right(*command)
    stopped = train(tmp_path / "parts", home / "word", preset, **changes | {"train__num_steps": 3})
    right(*stopped)
    again = right(*train(tmp_path / "parts", home / "word", preset, **changes))
    assert "resumes at step 3" in again
    assert params(tmp_path / "whole") == params(tmp_path / "parts")
    if preset != "word2vec":
        assert "perplexity per word" in again
        right("generate", "--workdir", tmp_path / "parts", "--max-new-tokens", 4, "--prompt", "the old")
    else:
        assert right("neighbours", "dog", "--workdir", tmp_path / "parts").startswith("dog\n")


def test_generate(home, tmp_path):
    run = ("--workdir", home / "run")
    said = right("generate", *run, "--prompt", "The old", "--max-new-tokens", 12, "--temperature", 0)
    assert said.startswith("The old") and said == right(
        "generate", *run, "--prompt", "The old", "--max-new-tokens", 12, "--temperature", 0, "--seed", 5
    )
    drawn = ["generate", *run, "--max-new-tokens", 12, "--top-k", 5, "--top-p", 0.9, "--min-p", 0.01]
    assert right(*drawn) == right(*drawn) != right(*drawn, "--seed", 1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The\nthe dog\n")
    many = right(*drawn, "--prompts", prompts, "--num-samples", 2, "--batch-size", 3)
    found = re.findall(r"^--- prompt (\d), sample (\d)\n(The|the dog)", many, re.MULTILINE)
    assert found == [("1", "1", "The"), ("1", "2", "The"), ("2", "1", "the dog"), ("2", "2", "the dog")]


def test_a_text_is_as_long_as_the_context_lets_it_be(home):
    said = right("generate", "--workdir", home / "run", "--prompt", "The old", "--temperature", 0)
    # Of 64 tokens read the first stands before the text; the last one generated is not read; the line ends.
    assert len(said) == 63 + 1 + 1
    asked = ("generate", "--workdir", home / "run", "--temperature", 0, "--long", "slide")
    assert right(*asked) == right(*asked, "--max-new-tokens", 256)


def test_score(home, tmp_path, monkeypatch):
    lines = tmp_path / "lines.txt"
    lines.write_text("The dog\n\nThe old farmer\n")
    told = [line.split("\t") for line in right("score", lines, "--workdir", home / "run").splitlines()]
    assert [(count, text) for _, count, text in told] == [("7", "The dog"), ("0", ""), ("14", "The old farmer")]
    assert float(told[0][0]) < 0 == float(told[1][0]) and float(told[2][0]) < float(told[0][0])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.read_bytes())))
    assert [line.split("\t") for line in right("score", "-", "--workdir", home / "run").splitlines()] == told


@pytest.mark.parametrize("preset", ["gpt2", "llama_150m"])
def test_models_go_out_and_come_back(home, tmp_path, preset, monkeypatch):
    changes = {"inputs__length": 16, "model__max_length": 32, "train__num_steps": 3}
    changes |= {"model__num_kv_heads": 1} if preset == "llama_150m" else {}
    right(*train(tmp_path / "run", home / "bpe", preset, **changes))
    right("export-hf", "--workdir", tmp_path / "run", "--output", tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    assert right("import-hf", "hf", "--output", "back").startswith("back: ")
    assert params(tmp_path / "run") == params(tmp_path / "back")
    told = right("evaluate", "--workdir", tmp_path / "back", "--data", home / "bpe", "--length", 16)
    assert told.splitlines()[1:] == right("evaluate", "--workdir", tmp_path / "run").splitlines()[1:]
    assert "back holds an imported model, which has no data of its own" in refused("evaluate", "--workdir", "back")
    again = train(tmp_path / "back", home / "bpe", preset, **changes)
    assert "holds an imported model, which is not trained on" in refused(*again)
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(about | {"eos_token_id": [5, 7]}))
    right("import-hf", "hf", "--output", "other")
    right("export-hf", "--workdir", "other", "--output", "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "describes a model of type 'bert'" in refused("import-hf", tmp_path / "hf", "--output", tmp_path / "no")


def test_bad_input(home, tmp_path):
    run = ("--workdir", home / "run")
    assert "exceed the 64 tokens" in refused("generate", *run, "--max-new-tokens", 100)
    long = right("generate", *run, "--max-new-tokens", 70, "--long", "slide", "--prompt", "a" * 100)
    assert long.startswith("a" * 100)
    assert "'§' is not among" in refused("generate", *run, "--prompt", "§")
    assert "--prompt is not UTF-8" in refused("generate", *run, "--prompt", "\udcff")
    assert "as a value it is written --prompt=--the" in refused("generate", *run, "--prompt", "--the")
    assert "--stop is given twice; give all of its values after one" in refused(
        "generate", *run, "--stop", "a", "--stop=b"
    )
    assert "--max-new-tokens 3000000000" in refused("generate", *run, "--max-new-tokens", 3_000_000_000)
    assert "leave out --num-samples" in refused("generate", *run, "--temperature", 0, "--num-samples", 3)
    assert "--length 65: the model can take 64" in refused("evaluate", *run, "--length", 65)
    other = train(home / "run", home / "word")
    assert "was made with another tokenizer" in refused(*other)
    assert "was made with another tokenizer" in refused("evaluate", *run, "--data", home / "word")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "holds no text" in refused("prepare", "--input", tmp_path / "empty.txt", "--output", tmp_path / "data")
    assert "a row 5000: prepare more text" in refused(
        *train(
            tmp_path / "run",
            home / "word",
            "conv_lm",
            inputs__length=5000,
            model__num_heads=None,
            model__mlp_width=None,
        )
    )
    assert "--inputs.length 65 exceeds" in refused(*train(tmp_path / "run", home / "char", inputs__length=65))
    assert not (tmp_path / "run" / "config.json").exists()
    assert "seed: 0 -> 1" in refused(*train(home / "run", home / "char", seed=1))
    assert "leave out --top-k" in refused("generate", *run, "--temperature", 0, "--top-k", 3)
    assert "--stride 65 would leave tokens out" in refused("evaluate", *run, "--stride", 65)
    assert "unknown preset 'char_smal'; did you mean char_small?" in refused(
        "train", "char_smal", "--workdir", tmp_path
    )
    moved = shutil.copytree(home / "run", tmp_path / "moved")
    (moved / "tokenizer.json").write_text(json.dumps({"kind": "char", "characters": "ab", "has_end": False}))
    assert "is not the tokenizer that this run was started with" in refused("generate", "--workdir", moved)


def test_presets_have_commands_and_sizes():
    listed = {line.split()[0]: line.split()[1] for line in right("presets").splitlines()[1:]}
    assert set(listed) == set(PRESETS)
    sizes = {"gpt2": "124,439,808", "gpt2_medium": "354,823,168", "gpt2_large": "774,030,080"}
    sizes |= {"gpt2_xl": "1,557,611,200", "char_10m": "10,770,816"}
    assert {name: listed[name] for name in sizes} == sizes
    for name, preset in PRESETS.items():
        config = preset()
        assert type(config) in COMMANDS and kind_of(config).startswith("lm_flax.")
        told = re.search(r"([\d,]{7,}) parameters", preset.__doc__)
        assert told is None or told[1] == listed[name], name


@pytest.mark.parametrize(
    "command",
    ["prepare", "train", "evaluate", "generate", "score", "analogies", "neighbours", "import-hf", "export-hf"],
)
def test_help(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = right(command, "--help")
    assert "``" not in shown and command in shown
