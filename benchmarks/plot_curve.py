"""Draws a run's metrics.jsonl: masked-token loss in training and held out, beside the unigram baseline.

python benchmarks/plot_curve.py runs/demo/metrics.jsonl docs/results/bert_demo.png --title "bert_demo"
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Read the records, draw, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a run")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--title", default="", help="above the picture")
    options = parser.parse_args()
    records = [json.loads(line) for line in options.metrics.read_text(encoding="utf-8").splitlines()]

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(record["step"], record[name]) for record in records if name in record]
        return [step for step, _ in points], [value for _, value in points]

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    loss.plot(*curve("mlm_loss"), color="0.75", label="training batches")
    loss.plot(*curve("held_out/mlm_loss"), "o-", label="held out")
    loss.axhline(curve("held_out/unigram_loss")[1][-1], color="C3", linestyle="--", label="unigram, held out")
    loss.set(xlabel="step", ylabel="masked-token loss (nats)")
    accuracy.plot(*curve("held_out/mlm_accuracy"), "o-", label="masked tokens, held out")
    accuracy.plot(*curve("held_out/next_sentence_accuracy"), "s-", label="next sentence, held out")
    accuracy.axhline(curve("held_out/unigram_accuracy")[1][-1], color="C3", linestyle="--", label="most frequent token")
    accuracy.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
    for axes in (loss, accuracy):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(options.title)
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
