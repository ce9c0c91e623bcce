"""Time ``bert-flax prepare``, vocabulary training included, and measure the memory of all its processes together.

    python benchmarks/prepare.py FILE --size-mb 1000 --scratch DIR [--num-workers 2] [--output JSON]

Makes a text file of the size asked for out of FILE's documents, which follow each other in a new random order each time
round, with made-up words among them so that the vocabulary does not stop growing as it would with mere repetition. FILE
is cut into documents at lines like " = Title = " (WikiText).
"""

import argparse
import gzip
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

TITLE = r" = [^=]+ = $"
NEW_WORD_EVERY = 400
"""About one word in so many is new: in 1 GB, some 400,000 different words besides those of FILE."""


def main() -> None:
    """Make the file, run the command, print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--size-mb", type=float, default=1000)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    text = options.scratch / "text.txt"
    make_text(options.file, text, int(options.size_mb * 1e6))
    load_before = os.getloadavg()[0]
    figures = run(text, options.scratch / "prepared", options.num_workers)
    report = {
        "what": "bert-flax prepare: text to shards, training a vocabulary of 30522 pieces",
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "load_before": round(load_before, 2),
        "versions": {name: version(name) for name in ("numpy", "tokenizers", "array-record")}
        | {"python": platform.python_version()},
        **figures,
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def make_text(source: Path, target: Path, size: int) -> None:
    """Shuffled copies of the documents of ``source``, with new words, up to ``size`` bytes."""
    content = (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8").read()
    starts = [match.start() for match in re.finditer(TITLE, content, re.MULTILINE)]
    documents = [content[begin:end] for begin, end in zip(starts, [*starts[1:], len(content)], strict=True)]
    documents = [document for document in documents if len(document) > 2000]
    rng = random.Random(0)
    written = 0
    with target.open("w", encoding="utf-8") as file:
        while written < size:
            rng.shuffle(documents)
            for document in documents:
                words = document.split(" ")
                for place in range(rng.randrange(NEW_WORD_EVERY), len(words), NEW_WORD_EVERY):
                    if words[place].isalpha():
                        words[place] += "".join(rng.choices("aeioulnrst", k=4))
                written += file.write(" ".join(words))
                if written >= size:
                    break


def run(text: Path, output: Path, num_workers: int) -> dict[str, float | int]:
    """Run the command to its end. Memory is the sum of the proportional set sizes of its processes."""
    shutil.rmtree(output, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "bert_flax.cli", "prepare", "--input", str(text), "--output", str(output)),
        *("--document-start", TITLE, "--num-workers", str(num_workers), "--single-sentence-documents", "drop"),
    ]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
    if status:
        sys.exit(f"prepare ended with status {status}")
    manifest = json.loads((output / "manifest.json").read_text())
    size = text.stat().st_size
    return {
        "text_mb": round(size / 1e6, 1),
        "tokens": sum(split["tokens"] for split in manifest["splits"].values()),
        "num_workers": num_workers,
        "seconds": round(seconds, 1),
        "mb_per_second": round(size / 1e6 / seconds, 2),
        "peak_memory_mb": round(peak[0] / 1e6),
        "output_mb": round(sum(path.stat().st_size for path in output.iterdir()) / 1e6, 1),
    }


def watch(process: subprocess.Popen, peak: list[int]) -> None:
    """Keep in ``peak`` the largest memory seen, in bytes; pages that processes share count once."""
    while process.poll() is None:
        total = 0
        try:
            parent = psutil.Process(process.pid)
            for member in [parent, *parent.children(recursive=True)]:
                total += member.memory_full_info().pss
        except psutil.Error:
            pass
        peak[0] = max(peak[0], total)
        time.sleep(0.25)


def cpu_name() -> str:
    """Model of the processor, as the kernel names it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
