"""Translate a direction that no model was trained on, as Johnson et al. 2016 (arXiv 1611.04558, section 4.6) did.

    python benchmarks/zero_shot.py numbers --workdir DIR
    python benchmarks/zero_shot.py multi30k --data multi30k --workdir DIR

numbers: number words. The model learns English <-> Japanese and English <-> Korean; asked for is Japanese to Korean.
multi30k: raw text. It learns German <-> English and English <-> French; asked for is German to French.

Which language to write is told by a piece before the source, so the question can be asked. The models learn to copy
each language, too (prepare --copies). Beside the answer stand:

- *without copies*: a model that learns the same pairs and nothing else.
- *without a bridge*: a model of the same size, for as many steps, that has met both languages and both pieces too, and
  copies them, but never each other's pairs nor English: it learns Japanese <-> German and Korean <-> French (multi30k:
  German <-> Czech and French <-> English). What it knows of the direction it can only know from the pieces.
- *the source*: as it is. Digits do not occur, but names do.
- *by way of English*: the model itself, twice. It is what zero-shot saves, and mostly the better translation.
- *trained directions*: that the model has learned anything at all.

--no-baseline leaves the model without a bridge out, which costs as long as the model itself.

No number or sentence that is scored was trained on in any language. The pairs of both languages with English share
their English sides. Copies and the recipe of number words were chosen with 200 other numbers. Each study has a folder
of its own in DIR. Resumable like multi30k.py.
"""

import argparse
import dataclasses
import gzip
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import translation_runs as runs

from seq2seq_flax import numbers
from seq2seq_flax.evaluate import score


@dataclass(frozen=True)
class Study:
    """One table.

    Attributes:
      title: of its page.
      asked: the direction that was never trained on.
      bridge: the language in between.
      bridged: pairs of languages of the model that can, both directions of each trained on.
      bridgeless: those of the model that cannot.
      prepare: options of seq2seq-flax prepare.
      preset: what is trained.
      steps: of each model.
      train: options beside the preset's.
      metric: how a translation is scored.
    """

    title: str
    asked: tuple[str, str]
    bridge: str
    bridged: tuple[str, ...]
    bridgeless: tuple[str, ...]
    prepare: tuple[str, ...]
    preset: str
    steps: int
    train: tuple[str, ...]
    metric: str


STUDIES = {
    "numbers": Study(
        title="number words, Japanese to Korean",
        asked=("ja", "ko"),
        bridge="en",
        bridged=("en-ja", "en-ko"),
        bridgeless=("de-ja", "fr-ko"),
        prepare=("--vocab-size", "600", "--character-coverage", "1.0"),
        preset="numbers_demo",
        steps=3000,
        train=(
            *("--train.batch-size", "32", "--model.dropout", "0.2", "--model.attention-dropout", "0.1"),
            *("--inputs.label-smoothing", "0.1"),
            *("--checkpoint.every-minutes", "0"),  # what is averaged must not depend on the machine's speed
        ),
        metric="exact match",
    ),
    "multi30k": Study(
        title="Multi30k, German to French",
        asked=("de", "fr"),
        bridge="en",
        bridged=("en-de", "en-fr"),
        bridgeless=("cs-de", "en-fr"),
        prepare=("--vocab-size", "12000", "--character-coverage", "1.0"),
        preset="transformer_tiny",
        steps=6000,
        train=("--train.batch-size", "32", "--checkpoint.every-minutes", "0"),
        metric="BLEU",
    ),
}
SEARCH = ("--beam-size", "4")
NUM_TRAINED, NUM_HELD_OUT = 12_000, 500


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, help="folder of Multi30k's raw files, for multi30k")
    parser.add_argument("--workdir", type=Path, required=True, help="where data, models and translations stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps of each model; default: the study's")
    parser.add_argument("--no-baseline", action="store_true", help="without the model that has no bridge")
    parser.add_argument("--last", type=int, default=3, help="checkpoints that are averaged")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--output", type=Path, default=runs.RESULTS / "zero_shot", help="without an ending")
    options = parser.parse_args()
    if options.study == "multi30k" and not options.data and not options.report:
        parser.error("multi30k needs --data")
    options.workdir = options.workdir / options.study
    return options


def files(options: argparse.Namespace, language: str) -> tuple[Path, Path]:
    """(text to train on, held-out text) in a language; line n says the same in all of them."""
    if options.study == "multi30k":
        return options.data / f"train.{language}.gz", unpacked(options, language)
    home = options.workdir / "text"
    home.mkdir(parents=True, exist_ok=True)
    trained, held_out = numbers.draw(NUM_TRAINED, NUM_HELD_OUT)
    paths = home / f"train.{language}", home / f"test.{language}"
    for path, each in zip(paths, (trained, held_out), strict=True):
        if not path.exists():
            numbers.write(path, each, language)
    return paths


def unpacked(options: argparse.Namespace, language: str) -> Path:
    """Multi30k's test set of 2016 as plain text."""
    path = options.workdir / f"test.{language}"
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = options.data / f"test_2016_flickr.{language}.gz"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


def model(
    options: argparse.Namespace, study: Study, name: str, pairs: Sequence[str], *, copies: bool = True
) -> tuple[Path, dict[str, Any]]:
    """The averaged model that learns these pairs of languages in both directions, and the facts of its training."""
    words: list[object] = ["--both-directions", *["--copies"] * copies, *study.prepare]
    for pair in pairs:
        source, target = pair.split("-")
        words += ["--pair", pair, files(options, source)[0], files(options, target)[0]]
    data, preparation = runs.prepared(options.workdir / f"data_{name}", *words)
    workdir = options.workdir / f"{name}_{options.seed}"
    recipe = ["--train.num-steps", str(options.steps or study.steps), *study.train, "--seed", str(options.seed)]
    recipe += ["--checkpoint.keep-last", str(max(10, options.last))]
    facts = runs.trained(workdir, study.preset, data, recipe, options.last)
    return workdir / f"averaged-{options.last}", facts | {"preparation": preparation}


def scored(study: Study, texts: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """The figure of a set of translations."""
    if study.metric == "exact match":
        right = sum(text == reference for text, reference in zip(texts, references, strict=True))
        return {"figure": 100 * right / len(texts), "right": right, "of": len(texts)}
    found = score(texts, references)
    return {"figure": found.bleu, **dataclasses.asdict(found)}


def lines(path: Path) -> list[str]:
    """The lines of a text."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def result_of(options: argparse.Namespace) -> Path:
    """The file of a study's result."""
    return options.workdir / f"result_{options.seed}.json"


def run(options: argparse.Namespace, study: Study) -> None:
    """Trains the models, translates every direction, leaves DIR/result_SEED.json."""
    source, target = study.asked
    bridged, facts = model(options, study, "bridged", study.bridged)
    training = {"bridged": facts}

    def translate(which: Path, text: Path, into: str, name: str) -> Path:
        output = which / f"{name}.{into}"
        words = ["--workdir", which, "--input", text, "--output", output, "--target-lang", into, *SEARCH]
        words += ["--long", "split"]  # what a model has written, and is to read again, may be of any length
        if not output.exists():
            runs.call(output.with_suffix(".log"), "translate", *words)
        return output

    test = {language: files(options, language)[1] for language in (source, target, study.bridge)}
    halfway = translate(bridged, test[source], study.bridge, f"{source}_{study.bridge}")
    found = {
        f"zero-shot, {source} -> {target}": translate(bridged, test[source], target, f"{source}_{target}"),
        "the source": test[source],
        f"by way of {study.bridge}": translate(bridged, halfway, target, f"{source}_{study.bridge}_{target}"),
    }
    if not options.no_baseline:
        bridgeless, training["bridgeless"] = model(options, study, "bridgeless", study.bridgeless)
        found["without a bridge"] = translate(bridgeless, test[source], target, f"{source}_{target}")
    bare, training["bare"] = model(options, study, "bare", study.bridged, copies=False)
    found["without copies"] = translate(bare, test[source], target, f"{source}_{target}")
    found = {name: scored(study, lines(path), lines(test[target])) for name, path in found.items()}
    for pair in study.bridged:
        for before, after in (pair.split("-"), pair.split("-")[::-1]):
            path = translate(bridged, files(options, before)[1], after, f"{before}_{after}")
            found[f"trained, {before} -> {after}"] = scored(study, lines(path), lines(files(options, after)[1]))
    result = {
        "study": options.study,
        "title": study.title,
        "metric": study.metric,
        "sentences": len(lines(test[target])),
        "search": SEARCH,
        "figures": found,
        "training": training,
        "bridge": study.bridge,
        "pairs": {"bridged": study.bridged, "bridgeless": study.bridgeless},
    }
    runs.write(result_of(options), result)


def report(options: argparse.Namespace) -> None:
    """Puts this study's result in the figures, beside the other's, and writes the page from both."""
    path, figures = options.output.with_suffix(".json"), {}
    if path.exists():
        figures = json.loads(path.read_text(encoding="utf-8"))
    figures[options.study] = json.loads(result_of(options).read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(page(figures), encoding="utf-8")
    print(f"written to {options.output}.md and .json")


def page(figures: dict[str, Any]) -> str:
    """The report."""
    text = [
        "# Directions that were never trained on",
        "",
        "As in Johnson et al. 2016 (arXiv 1611.04558, section 4.6): one model learns several pairs of languages, each",
        "source beginning with a piece that names the language wanted, and is then asked for a pair it never saw.",
        "",
    ]
    for each in (figures[name] for name in STUDIES if name in figures):
        text += [f"## {each['title']}", "", f"| | {each['metric']} |", "|---|---|"]
        unit = " %" if each["metric"] == "exact match" else ""
        text += [f"| {name} | {found['figure']:.1f}{unit} |" for name, found in each["figures"].items()]
        signatures = {found["bleu_signature"] for found in each["figures"].values() if "bleu_signature" in found}
        text += ["", *(f"Signature `{signature}`." for signature in sorted(signatures))]
        bridged, bridgeless = (" and ".join(pairs) for pairs in each["pairs"].values())
        about = f"""The model was trained on {bridged}, in both directions, and on all of these texts as translations of
            themselves (`--copies`). *The source* is scored as it is; *by way of* is the model twice."""
        if "bridgeless" in each["training"]:
            about += f""" *Without a bridge* is a model of the same size, trained for as many steps on {bridgeless},
                with copies: it has met the source language, the target language and its piece, but no language in
                common with both."""
        about += f""" *Without copies* is the model if it learns its pairs alone. The pairs of both languages with
            {each["bridge"]} share its sentences. Scored are {each["sentences"]} that were not trained on in any
            language; {" ".join(each["search"])}, one seed."""
        text += [textwrap.fill(" ".join(about.split()), 116, break_on_hyphens=False), ""]
        for name, facts in each["training"].items():
            text += [f"{name}: {runs.where_from(facts)}; {facts['average']}.", ""]
            text += ["```", facts["preparation"], facts["command"], "```", ""]
    return "\n".join(text)


def main() -> None:
    """Train and score what is missing; write the page."""
    options = parse()
    if not options.report:
        options.workdir.mkdir(parents=True, exist_ok=True)
        run(options, STUDIES[options.study])
    report(options)


if __name__ == "__main__":
    main()
