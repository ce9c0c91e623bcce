"""Score Google's own BERT predictions on the SQuAD dev sets and compare with what the official scripts give.

    python benchmarks/squad_scoring.py --data FOLDER [--output JSON]

FOLDER holds dev-v1.1.json and dev-v2.0.json (rajpurkar.github.io/SQuAD-explorer) and predictions/ with
bert_ensemble-v1.1.json and bert_single-v2.0.json (models/ of github.com/rajpurkar/SQuAD-explorer, renamed). Exits with
status 1 if a figure differs in its second decimal.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from bert_flax.finetune.score import score

PUBLISHED = {
    "squad": ("dev-v1.1.json", "bert_ensemble-v1.1.json", {"exact": 86.21, "f1": 92.20}),
    "squad2": ("dev-v2.0.json", "bert_single-v2.0.json", {"exact": 78.74, "f1": 81.78}),
}


def main() -> None:
    """Score, print, and write the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report = {
        "what": "Google's BERT predictions on the SQuAD dev sets, scored by bert-flax",
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "tasks": {task: compare(options.data, task, *what) for task, what in PUBLISHED.items()},
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if not all(task["equal_to_two_decimals"] for task in report["tasks"].values()):
        sys.exit(1)


def compare(folder: Path, task: str, data: str, predictions: str, published: dict[str, float]) -> dict[str, object]:
    """The figures of one file of predictions beside the published ones."""
    start = time.perf_counter()
    figures = score(task, folder / "predictions" / predictions, folder / data)
    return {
        "files": {name: sha256(folder / name) for name in (data, f"predictions/{predictions}")},
        "published": published,
        "figures": figures,
        "equal_to_two_decimals": all(f"{figures[name]:.2f}" == f"{value:.2f}" for name, value in published.items()),
        "seconds": round(time.perf_counter() - start, 2),
    }


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
