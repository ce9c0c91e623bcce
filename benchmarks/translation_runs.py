"""What multi30k.py and zero_shot.py share: commands of seq2seq-flax run to their end, one run's way to its score."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
VERSIONS = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "sacrebleu")}


def call(log: Path, *words: object) -> str:
    """Runs a command of seq2seq-flax; returns what it printed, which the log gets as well.

    A signal meanwhile is passed on; if the command failed or was stopped, this program ends likewise.
    """
    command = [sys.executable, "-m", "seq2seq_flax.cli", *map(str, words)]
    print(shown(words), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+", encoding="utf-8") as file:
        begin = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        signal.signal(signal.SIGINT, lambda *_: None)  # a terminal tells the child, too
        status = process.wait()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        file.seek(begin)
        told = file.read()
    if status in (75, -signal.SIGINT, -signal.SIGTERM):
        sys.exit(75)
    if status:
        sys.exit(f"status {status}: {shown(words)}\n{told[-2000:]}")
    return told


def shown(words: Sequence[object]) -> str:
    """The command as one would type it; of paths the last two parts."""
    return shlex.join(["seq2seq-flax", *("/".join(Path(w).parts[-2:]) if w[0] == "/" else w for w in map(str, words))])


def prepared(folder: Path, *words: object) -> Path:
    """The data folder, prepared unless it is complete."""
    if not (folder / "manifest.json").exists():
        call(folder.with_suffix(".log"), "prepare", "--output", folder, *words)
    return folder


def trained(workdir: Path, preset: str, data: Path, options: Sequence[str], last: int) -> dict[str, Any]:
    """Trains to the end, resuming what is there, and averages the last checkpoints. Returns the facts of the run.

    Their seconds are those of all attempts, with whatever else the machine did.
    """
    words = ["train", preset, "--workdir", workdir, "--data", data, *options]
    averaged, facts, spent = (workdir / name for name in (f"averaged-{last}", "facts.json", "seconds.jsonl"))
    if not facts.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        if not (begun := workdir / "origin.json").exists():  # of the first attempt: what was run, not what is there now
            begun.write_text(json.dumps(contest.origin()) + "\n", encoding="utf-8")
        began = time.perf_counter()
        try:
            call(workdir.with_suffix(".log"), *words)
        finally:
            with spent.open("a", encoding="utf-8") as file:
                file.write(f"{time.perf_counter() - began:.0f}\n")
        seconds = sum(map(int, spent.read_text(encoding="utf-8").split()))
        origin = json.loads(begun.read_text(encoding="utf-8"))
        origin |= {"command": shown(words), "versions": VERSIONS, "seconds": seconds}
        facts.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    if not (averaged / "config.json").exists():
        call(workdir.with_suffix(".log"), "average", "--workdir", workdir, "--last", last)
    return json.loads(facts.read_text(encoding="utf-8"))


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
    """Commit, date, versions and machine of a run."""
    changed = " with changes" if facts["changed_files"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    machine = f"{facts['hardware']['cores']} cores of {facts['hardware']['cpu']}, float32"
    python = f"Python {facts['python']}"
    return f"commit {facts['commit'][:12]}{changed}, {facts['date'][:10]}, {python}, {versions}, {machine}"
