"""Word vectors of WikiText-2 beside people's judgements of likeness and analogies: skip-gram and CBOW, several seeds.

    python benchmarks/word2vec_quality.py --data wikitext-2 --wordsim wordsim --workdir runs/word2vec

``--data`` holds train.txt(.gz) and valid.txt(.gz), ``--wordsim`` wordsim353.tsv, simlex999.txt, questions-words.txt.
Every run is the preset word2vec of ``lm-flax train``, its last step is measured, and nothing is picked here; but the
preset's learning rate was chosen by wordsim353, of two values, with skip-gram and seed 0. Beside each figure stands
what chance gives, and of wordsim353 the margin: how many standard deviations of chance the worst seed lies above it.
Started again, this goes on where it was stopped. Writes docs/results/word2vec.md and .json.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import contest

DOCS = Path(__file__).parent.parent / "docs" / "results"
METHODS = ("skip_gram", "cbow")
JUDGEMENTS = {"wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt(.gz) and valid.txt(.gz)")
    parser.add_argument("--wordsim", type=Path, required=True, help="folder with the files of judgements and analogies")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the prepared text and the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1280, help="of each run; the result is of the default, 5 epochs")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the result")
    return parser.parse_args()


def lm_flax(*words: Any) -> None:
    """Runs the command line. Ends this program with its status if that is not 0."""
    done = subprocess.run([sys.executable, "-m", "lm_flax.cli", *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)


def prepare(source: Path, folder: Path) -> Path:
    """The prepared words; line ends are words, a split is one document, as the text is published."""
    if not (folder / "manifest.json").exists():
        train, valid = (next(iter(sorted(source.glob(f"{split}.txt*")))) for split in ("train", "valid"))
        lm_flax("prepare", "--input", train, "--valid", valid, "--tokenizer", "word", "--output", folder)
    return folder


def train(options: argparse.Namespace, data: Path, method: str, seed: int) -> dict[str, Any]:
    """A run, made or gone on with, and what its vectors know."""
    home = options.workdir / f"{method}-{seed}"
    settings = [f"--model.method={method}", f"--seed={seed}", f"--train.num-steps={options.steps}"]
    origin = home / "origin.json"
    if not origin.exists():
        home.mkdir(parents=True, exist_ok=True)
        origin.write_text(json.dumps({**contest.origin(), "load": contest.load()}), encoding="utf-8")
    lm_flax("train", "word2vec", "--workdir", home, "--data", data, *settings, "--log.no-tensorboard")
    lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return {
        "method": method,
        "seed": seed,
        "steps": options.steps,
        "settings": settings,
        "tokens_per_second": statistics.median(rates),
        "origin": json.loads(origin.read_text(encoding="utf-8")),
        **measure(home, options.wordsim),
    }


def measure(home: Path, wordsim: Path) -> dict[str, dict[str, float]]:
    """Spearman's correlation with judgements, the share of analogies answered, and what chance gives of each."""
    from lm_flax import similarity
    from lm_flax.runs import load_run
    from lm_flax.vectors import vectors_of

    vectors, _ = vectors_of(*load_run(home), None)
    found = {}
    for name, file in JUDGEMENTS.items():
        score = similarity.judgements(vectors, similarity.read_judgements(wordsim / file))
        # Of unrelated rankings the correlation has the mean 0 and this standard deviation.
        found[name] = {"value": score.value, "chance_sd": (score.num_known - 1) ** -0.5, "known": score.num_known}
    sections = similarity.read_questions(wordsim / "questions-words.txt")
    score = similarity.analogies(vectors, [question for each in sections.values() for question in each])
    found["analogies"] = {"value": score.value, "chance": 1 / len(vectors.words), "known": score.num_known}
    return found


def page(report: dict[str, Any]) -> str:
    """The result as Markdown."""
    runs, rows = report["runs"], []
    for run in runs:
        cells = [f"{run[name]['value']:.3f}" for name in JUDGEMENTS]
        cells += [f"{run['analogies']['value']:.1%}", f"{run['tokens_per_second']:,.0f}"]
        rows.append(f"| {run['method']} | {run['seed']} | {' | '.join(cells)} |")
    first = runs[0]
    known = "; ".join(f"{name} {first[name]['known']:,}" for name in (*JUDGEMENTS, "analogies"))
    chance = ", ".join(f"0 ± {first[name]['chance_sd']:.3f}" for name in JUDGEMENTS)
    margins = [
        f"{method}: {worst(runs, method):.1f}" for method in METHODS if any(run["method"] == method for run in runs)
    ]
    origin = first["origin"]
    versions = ", ".join(f"{name} {number}" for name, number in origin["versions"].items())
    return "\n".join(
        [
            "# Word vectors of WikiText-2",
            "",
            f"Preset `word2vec`, {first['steps']:,} steps, its last step. Spearman's rank correlation of cosines with "
            "people's judgements, and analogies answered right, over the pairs and questions whose words are all in "
            f"the vocabulary ({known}).",
            "",
            "| method | seed | wordsim353 | simlex999 | analogies | words/s |",
            "|---|---|---|---|---|---|",
            *rows,
            f"| chance | | {chance.replace(', ', ' | ')} | {first['analogies']['chance']:.3%} | |",
            "",
            "Above chance on wordsim353, the worst seed, in standard deviations of chance: " + "; ".join(margins) + ".",
            "The preset's learning rate was chosen by wordsim353, of 0.002 and 0.01, with skip-gram and seed 0; "
            "nothing was chosen by simlex999 or the analogies.",
            "",
            f"`{report['command']}`, commit {origin['commit'][:12]}, {origin['date'][:10]}, {versions}, "
            f"{contest.machine(origin['hardware'])}, load {origin['load']:.1f} at the start. "
            "Every run: [word2vec.json](word2vec.json).",
            "",
        ]
    )


def worst(runs: list[dict[str, Any]], method: str) -> float:
    """The least margin of a method's seeds on wordsim353."""
    found = [run["wordsim353"] for run in runs if run["method"] == method]
    return min(each["value"] / each["chance_sd"] for each in found)


def main() -> None:
    """Prepare, train what is not trained yet, report."""
    options = parse()
    data = prepare(options.data, options.workdir / "data")
    runs = [train(options, data, method, seed) for method in METHODS for seed in options.seeds]
    report = {"what": "what word vectors know", **contest.origin(), "runs": runs}
    contest.write(report, options.output / "word2vec.json")
    (options.output / "word2vec.md").write_text(page(report), encoding="utf-8")
    print(page(report))


if __name__ == "__main__":
    main()
