"""What multi30k.py and zero_shot.py share: commands of seq2seq-flax run to their end, one run's way to its score."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
VERSIONS = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "sacrebleu")}
TICK_SECONDS = 60.0
STOPPED = 75, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit statuses of a command that a signal has stopped, saved or at once."""


def call(log: Path, *words: object, tick: Callable[[], object] = lambda: None) -> str:
    """Runs a command of seq2seq-flax; returns what it printed, which the log gets as well.

    A signal meanwhile is passed on; if the command failed or was stopped, this program ends likewise.

    Args:
      log: the file.
      words: the command's.
      tick: called once a minute while it runs.
    """
    command = [sys.executable, "-m", "seq2seq_flax.cli", *map(str, words)]
    print(shown(words), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+", encoding="utf-8") as file:
        begin = file.seek(0, os.SEEK_END)
        # Of this checkout, wherever one is: paths are those that were given.
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        signal.signal(signal.SIGINT, lambda *_: None)  # a terminal tells the child, too
        while (status := _status(process)) is None:
            tick()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file.seek(begin)
        told = file.read()
    if status in STOPPED:
        sys.exit(75)
    if status:
        sys.exit(f"status {status}: {shown(words)}\n{told[-2000:]}")
    return told


def _status(process: subprocess.Popen) -> int | None:
    """Its exit status, waited for a minute; None: it runs."""
    try:
        return process.wait(TICK_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def shown(words: Sequence[object]) -> str:
    """The command as one types it in the same folder."""
    return shlex.join(["seq2seq-flax", *map(str, words)])


def prepared(folder: Path, *words: object) -> tuple[Path, str]:
    """(The data folder, the command that makes it), prepared unless it is complete."""
    words = ("prepare", "--output", folder, *words)
    if not (folder / "manifest.json").exists():
        call(folder.with_suffix(".log"), *words)
    return folder, shown(words)


def trained(workdir: Path, preset: str, data: Path, options: Sequence[str], last: int) -> dict[str, Any]:
    """Trains to the end, resuming what is there, and averages the last checkpoints. Returns the facts of the run.

    Their seconds are those of all attempts, with whatever else the machine did. Their commits are those of all
    attempts as well. A workdir that was trained by another command is refused.
    """
    words = ["train", preset, "--workdir", workdir, "--data", data, *options]
    log, facts, averaged = workdir.with_suffix(".log"), workdir / "facts.json", workdir / f"averaged-{last}"
    if not facts.exists():
        attempts = _attempt(workdir, log, words)
        commits = dict.fromkeys((each["commit"], bool(each["changed_files"])) for each in attempts)
        told = {"command": shown(words), "commits": list(commits), "seconds": sum(each["seconds"] for each in attempts)}
        write(facts, attempts[-1] | told)
    found = json.loads(facts.read_text(encoding="utf-8"))
    if found["command"] != shown(words):
        sys.exit(f"{workdir} was trained by another command, {found['command']}; give another --workdir")
    if not (about := averaged.with_suffix(".json")).exists():
        shutil.rmtree(averaged, ignore_errors=True)  # what an attempt that was stopped has left
        write(about, call(log, "average", "--workdir", workdir, "--last", last).splitlines()[-1].rpartition(": ")[2])
    return found | {"average": json.loads(about.read_text(encoding="utf-8"))}


def _attempt(workdir: Path, log: Path, words: Sequence[object]) -> list[dict[str, Any]]:
    """Trains on; returns where each attempt comes from, and its seconds, of one that was killed to the minute."""
    path = workdir / "attempts.json"
    workdir.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    origin, began = contest.origin() | {"versions": VERSIONS}, time.perf_counter()

    def attempts() -> list[dict[str, Any]]:
        return [*before, origin | {"seconds": round(time.perf_counter() - began)}]

    write(path, attempts())
    try:
        call(log, *words, tick=lambda: write(path, attempts()))
    finally:
        write(path, attempts())
    return attempts()


def write(path: Path, value: Any) -> None:
    """Writes JSON, as a whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def translated(model: Path, source: Path, reference: Path, output: Path, *options: object) -> tuple[list[str], str]:
    """(Translations of a file's lines, the command that made them), made unless they are there."""
    words = ["evaluate", "--workdir", model, "--input", source, "--reference", reference, "--output", output, *options]
    if not output.exists():
        call(output.with_suffix(".log"), *words)
    return output.read_text(encoding="utf-8").split("\n")[:-1], shown(words)


def records(workdir: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def where_from(facts: dict[str, Any]) -> str:
    """Commits, date, versions and machine of a run."""
    commits = " and ".join(f"{commit[:12]}{' with changes' if changed else ''}" for commit, changed in facts["commits"])
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    machine = f"{contest.machine(facts['hardware'])}, float32"
    python = f"Python {facts['python']}"
    return f"commit {commits}, {facts['date'][:10]}, {python}, {versions}, {machine}"
