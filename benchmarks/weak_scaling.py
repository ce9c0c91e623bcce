"""Time what a training step costs each host besides the model: input, dispatch, logging, agreement among hosts.

    python benchmarks/weak_scaling.py DATA [--output JSON]

DATA is a folder that ``bert-flax prepare`` wrote. ``bert_tiny`` trains, with the same number of rows on each device, on
1 to 4 fake devices of 1 to 2 processes (``flax-launch local``). All processes share this machine's cores, so a clock on
the wall says nothing; what is taken is processor time: of the main thread, which runs the training loop, the median
over steps; and of the whole process to make its rows, with nothing else under way. What is a host's must not grow with
the number of hosts.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contest

CASES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)]
"""Processes, and devices of each."""
ROWS, WARMUP, STEPS = 8, 30, 150
"""Rows of a device; steps that do not count, and that do."""
PARTS = ("input", "dispatch", "logging", "agreement")


def main() -> None:
    """Runs every case, prints the figures and writes them down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "weak_scaling_cpu.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.data, options.worker)
    report = {"what": "processor milliseconds a step of each host, beside the model", "load_before": contest.load()}
    report |= contest.origin() | {"versions": {name: version(name) for name in ("jax", "numpy")}}
    report |= {"rows_per_device": ROWS, "steps": STEPS, "figures": [measure(options.data, *case) for case in CASES]}
    for figures in report["figures"]:
        print(json.dumps(figures))
    contest.write(report, options.output)
    return None


def measure(data: Path, processes: int, devices: int) -> dict[str, Any]:
    """The figures of a job: of its hosts, the one that takes longest."""
    with tempfile.TemporaryDirectory() as folder:
        job = [f"--processes={processes}", f"--devices={devices}", "--", sys.executable, __file__, str(data)]
        command = [sys.executable, "-m", "launch.cli", "local", *job, "--worker", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        hosts = [json.loads((Path(folder) / f"{number}.json").read_text()) for number in range(processes)]
    longest = {name: round(max(host[name] for host in hosts), 3) for name in hosts[0]}
    return {"processes": processes, "devices_each": devices, "rows_each": ROWS * devices} | longest


class Meter:
    """Adds up the main thread's processor time in some functions, step by step."""

    def __init__(self) -> None:
        self._now: dict[str, float] = defaultdict(float)
        self._steps: list[dict[str, float]] = []

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to a part's."""

        def timed(*args: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self._now[part] += time.thread_time() - began

        return timed

    def step(self) -> None:
        """Says that a step begins."""
        self._steps.append({"loop": time.thread_time(), **self._now})

    def medians(self) -> dict[str, float]:
        """Milliseconds a step of each part, and of the loop with all of them."""
        pairs = list(zip(self._steps, self._steps[1:], strict=False))[WARMUP:]
        names = ("loop", *PARTS)
        return {
            name: 1000 * statistics.median(after.get(name, 0) - before.get(name, 0) for before, after in pairs)
            for name in names
        }


def work(data: Path, folder: Path) -> None:
    """One process of a job: trains, and writes down what the steps took."""
    from core_flax import distributed, logs

    logs.quiet_libraries()
    distributed.join()
    import jax

    from bert_flax.presets import PRESETS
    from bert_flax.pretrain import make_task
    from core_flax import agreement, config, loop, program, recorder, sharding
    from core_flax.data.records import VOCAB, PassageStore
    from core_flax.text.wordpiece import WordPiece

    store = PassageStore(data, "train")
    vocabulary = WordPiece.load(data / VOCAB, store.manifest.lowercase)
    preset = PRESETS["bert_tiny"]()
    settings = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, vocab_size=vocabulary.num_tokens),
        train=config.TrainConfig(num_steps=WARMUP + STEPS + 1, batch_size=ROWS * jax.device_count()),
        checkpoint=config.CheckpointConfig(every_steps=0, every_minutes=0),
        log=config.LogConfig(every_steps=1, tensorboard=False),
        schedule=config.ScheduleConfig(),
    )
    task = make_task(settings, store, None, vocabulary)
    made, meter = program.make_program(task, settings), Meter()

    def batches(start: int, rows: Any) -> Generator[Any, None, None]:
        with contextlib.closing(task.batches(start, rows)) as found:
            take = meter.of("input", found.__next__)
            while True:
                yield take()

    def begin(self: Any, step: int) -> None:
        meter.step()

    recorder.Recorder.begin = begin
    recorder.Recorder.record = meter.of("logging", recorder.Recorder.record)
    agreement.Agreement.settle = meter.of("agreement", agreement.Agreement.settle)
    loop.sharding.place_batch = meter.of("input", sharding.place_batch)
    timed = dataclasses.replace(made, step=meter.of("dispatch", made.step))
    loop.train(dataclasses.replace(task, batches=batches), settings, timed, folder / "run")
    rows = sharding.host_rows(settings.train.batch_size, made.mesh)
    figures = meter.medians() | {"rows": rows_alone(task, rows)}
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(figures))


def rows_alone(task: Any, rows: Any) -> float:
    """Processor milliseconds of the whole process to make this host's rows of a batch."""
    with contextlib.closing(task.batches(0, rows)) as batches:
        for _ in range(10):
            next(batches)
        began = time.process_time()
        for _ in range(100):
            next(batches)
        return 10 * (time.process_time() - began)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
