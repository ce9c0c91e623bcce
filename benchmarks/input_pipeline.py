"""Time the input pipeline alone: pretraining batches from a prepared folder, no model.

    python benchmarks/input_pipeline.py DATA [--output JSON]

DATA is a folder that ``bert-flax prepare`` wrote. Every figure is of batches that come out of ``prefetch`` in order.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from bert_flax.examples import InputsConfig, PairExamples
from core_flax.data.feed import prefetch
from core_flax.data.records import VOCAB, PassageStore
from core_flax.text.wordpiece import WordPiece

CASES = [  # length, predictions, batch size, whole words, threads
    (128, 20, 16, False, 1),
    (128, 20, 256, False, 1),
    (128, 20, 256, False, 2),
    (128, 20, 256, True, 1),
    (512, 77, 64, False, 1),
]


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    report = {
        "what": "pretraining batches a second, no model",
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{cpu[1] if cpu else platform.processor()}, {len(os.sched_getaffinity(0))} cores",
        "load_before": round(load_before, 2),
        "versions": {name: version(name) for name in ("numpy", "array-record")} | {"python": platform.python_version()},
        "figures": [measure(options.data, *case) for case in CASES],
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def measure(data: Path, length: int, predictions: int, batch_size: int, whole_word: bool, threads: int) -> dict:
    """Examples and tokens (padding included) a second over some seconds."""
    store = PassageStore(data, "train")
    vocabulary = WordPiece.load(data / VOCAB, store.manifest.lowercase)
    config = InputsConfig(length=length, max_predictions=predictions, whole_word=whole_word)
    examples = PairExamples(store, vocabulary, config, seed=0, batch_size=batch_size)
    batches = prefetch(examples.make_batch, 0, None, num_threads=threads)
    for _ in range(8):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 4:
        next(batches)
        count += 1
    rate = count * batch_size / (time.perf_counter() - start)
    batches.close()
    return {
        "length": length,
        "batch_size": batch_size,
        "whole_word": whole_word,
        "threads": threads,
        "examples_per_second": round(rate),
        "tokens_per_second": round(rate * length),
    }


if __name__ == "__main__":
    main()
