"""Four fake CPU devices for every test, set before anything imports jax; a tiny corpus, and ``bert-flax`` on it."""

import os
from importlib.metadata import version

# With fewer than the devices' threads, XLA's collectives on a small machine can miss their rendezvous and abort.
os.environ["NPROC"] = "16"
# Nearly all of the time goes into compiling: without LLVM's optimizations and, where there is still a choice, with the
# older way to emit code it takes a quarter. How XLA divides the work among devices is decided before, and stays.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
os.environ["JAX_PLATFORMS"] = "cpu"

import atexit
import gc
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ("finetuned_models",)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Most of the time goes into compiling the same tiny programs: all tests, and the processes they start, share them.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

gc.set_threshold(100_000)  # tracing makes many small objects: looking through them took a twelfth of the time

HURRY = os.environ["XLA_FLAGS"].split(maxsplit=1)[1]
"""Flags for a process with one device."""

TINY = {
    "model.num-layers": 2,
    "model.width": 32,
    "model.num-heads": 4,
    "model.mlp-width": 64,
    "model.max-length": 32,
    "inputs.length": 32,
    "inputs.max-predictions": 5,
    "optimizer.learning-rate": 3e-3,
    "schedule.warmup-steps": 2,
    "schedule.total-steps": 20,
    "schedule.final-fraction": 0.1,
    "train.num-steps": 6,
    "train.batch-size": 8,
    "train.eval-every-steps": 0,
    "checkpoint.every-steps": 2,
    "log.every-steps": 1,
}


NOUNS = "river farmer teacher garden window market letter winter engine village doctor bridge dog road song"
VERBS = "sees finds carries opens follows remembers paints sells builds watches likes crosses"
ADJECTIVES = "old quiet green heavy small bright cold honest long empty"


def write_corpus(path: Path, num_documents: int = 40, seed: int = 0) -> Path:
    """Short documents of English sentences from a small list of words, separated by blank lines."""
    draw = random.Random(seed)

    def word(words):
        return draw.choice(words.split())

    def thing():
        return f"the {word(ADJECTIVES)} {word(NOUNS)}" if draw.random() < 0.5 else f"the {word(NOUNS)}"

    def sentence():
        words = [thing(), word(VERBS), thing()]
        if draw.random() < 0.4:
            words += ["and", word(VERBS), thing()]
        return " ".join(words).capitalize() + "."

    documents = [" ".join(sentence() for _ in range(draw.randint(4, 12))) for _ in range(num_documents)]
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


class Process(subprocess.Popen):
    """A process that ends with its ``with`` at the latest: a test that fails leaves nothing running."""

    def __exit__(self, *error):
        self.kill()
        super().__exit__(*error)


@dataclass(frozen=True)
class BertFlax:
    """``bert-flax`` as a user runs it: another process, one CPU device, output into pipes."""

    data: Path

    def start(self, *argv, max_file_kb=None) -> Process:
        """Start a command; its output is text. ``max_file_kb``: how far a file may grow, as on a disk almost full."""
        env = {name: value for name, value in os.environ.items() if name != "NPROC"} | {"XLA_FLAGS": HURRY}
        command = [sys.executable, "-m", "bert_flax.cli", *map(str, argv)]
        if max_file_kb is not None:
            command = ["bash", "-c", 'ulimit -S -f "$0"; exec "$@"', str(max_file_kb), *command]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return Process(command, env=env, text=True, **pipes)

    def run(self, *argv, **options) -> subprocess.CompletedProcess:
        """Run a command to its end."""
        with self.start(*argv, **options) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def pretrain(self, workdir, **changes) -> list[str]:
        """Arguments that pretrain the tiny model; ``changes`` to its options are ``train__num_steps=8``."""
        defaults = {"workdir": workdir, "data": self.data} | TINY
        options = defaults | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
        flags = [f"--{name}={value}" for name, value in options.items()]
        return ["pretrain", "bert_tiny", *flags]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="session")
def data(tmp_path_factory, corpus) -> Path:
    """The corpus, prepared with a vocabulary of 160 pieces, so that some words are cut."""
    from bert_flax.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("data") / "data"
    prepare(PrepareConfig((str(corpus),), str(folder), vocab_size=160, valid_fraction=0.1, num_workers=1))
    return folder


@pytest.fixture(scope="session")
def bert_flax(data) -> BertFlax:
    return BertFlax(data)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, bert_flax) -> Path:
    """A workdir in which six steps were taken, with checkpoints at 4 and 6. For reading: copy it to change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = bert_flax.run(*bert_flax.pretrain(workdir))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def call(capsys):
    """``bert-flax`` in this process, on four devices and with warnings as errors, to its end."""

    def call(*argv) -> subprocess.CompletedProcess:
        from bert_flax.cli import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in argv])
        return subprocess.CompletedProcess(argv, stop.value.code, *capsys.readouterr())

    return call
