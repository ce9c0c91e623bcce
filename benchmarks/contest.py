"""Contests of speed: programs in processes of their own, which take turns in blocks while the others wait.

So a machine that slows down slows all of them, and the medians over blocks can be compared. A benchmark starts itself
again with ``--worker NAME`` for each contestant and ends up in ``serve`` there.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

RESULTS = Path(__file__).with_name("results")
PAUSE_SECONDS = 0.5
"""Between turns: threads of the one before may wait for work by spinning, for 0.2 s in OpenMP's case."""


class Contestant(Protocol):
    """What competes.

    Attributes:
      facts: what there is to say about it, as JSON.
    """

    facts: dict[str, Any]

    def take(self, *work: Any) -> Any:
        """Does a turn's work to the end; what it returns goes into the report."""


def serve(make: Callable[[], Contestant]) -> None:
    """A worker: makes its contestant, reads a turn's work a line, answers with its seconds and what came of it."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    contestant = make()
    print(json.dumps(contestant.facts), file=answers)
    for line in sys.stdin:
        began = time.perf_counter()
        told = contestant.take(*json.loads(line))
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "told": told}), file=answers)


class Worker:
    """A contestant in a process of its own."""

    def __init__(self, name: str) -> None:
        env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, *sys.argv, "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        """What it says next."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended with status {self.process.wait()}; its message stands above")
        return json.loads(line)

    def take(self, *work: Any) -> dict[str, Any]:
        """Let it do a turn's work and wait for it: {"seconds", "told"}."""
        print(json.dumps(work), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait()


def take_turns(workers: Mapping[str, Worker], blocks: int, *work: Any) -> dict[str, list[dict[str, Any]]]:
    """Every worker's answers to the same work, taken ``blocks`` times; every other time in reverse order."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for block in range(blocks):
        for name in list(workers) if block % 2 == 0 else list(workers)[::-1]:
            time.sleep(PAUSE_SECONDS)
            answers[name].append(workers[name].take(*work))
    return answers


def load() -> float:
    """The machine's load, which it warns of if there is any."""
    found = os.getloadavg()[0]
    if found > 0.5:
        print(f"note: this machine is busy (load {found:.1f}); timings of a busy machine mean little", file=sys.stderr)
    return found


def origin() -> dict[str, Any]:
    """Where figures come from: command (of paths the last part), date, commit, machine, versions."""
    return {
        "command": " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--short", "--untracked-files=no").splitlines(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def hardware() -> dict[str, Any]:
    """What the machine is."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def machine(hardware: Mapping[str, Any]) -> str:
    """Cores and processor in words, of what ``hardware`` says."""
    cores = hardware["cores"]
    return f"{cores} core{'' if cores == 1 else 's'} of {hardware['cpu']}"


def git(*command: str) -> str:
    """What a git command prints about this repository."""
    run = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout.rstrip()


def write(report: Mapping[str, Any], path: Path) -> None:
    """Writes a report and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
