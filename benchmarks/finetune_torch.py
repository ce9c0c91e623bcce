"""Fine-tune a Hugging Face folder with torch and transformers: the reference that our fine-tuning is compared with.

    python benchmarks/finetune_torch.py --tasks mrpc rte cola stsb --seeds 0 1 2 --data GLUE --weights HF --output JSONL

The loop is that of transformers' run_glue, run_qa and run_ner: batch 32, AdamW, weight decay 0.01 (none on biases and
LayerNorm), clipping to norm 1, a warmup of 10 % and a linear decay to 0, dropout 0.1, float32, on all cores. It shares
no code with ours but what sets malloc: readers, label order and metrics are written anew or scipy's, scikit-learn's
and seqeval's.

--data is a folder in GLUE's layout (MRPC/train.tsv ...); for ner the folder of eng.train and eng.testa; for qa that of
train-v1.1.json and dev-v1.1.json. Metrics are in percent, of the whole dev set, after every epoch. Each run (task,
seed) appends a line of JSON to --output; a run that the file holds already is not repeated, and one that was killed
goes on from where it was a few minutes before, then without times. Needs the extra [parity], and scipy, scikit-learn
and seqeval.
"""

import argparse
import collections
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core_flax.memory import keep_freed_memory

if "--keep-memory" in sys.argv:  # before torch or numpy start a thread
    keep_freed_memory()

import numpy as np
import torch
import transformers
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch_savepoint import RELEASE_STEPS, Savepoint, release_memory

RECIPE = {"batch": 32, "weight_decay": 0.01, "clip_norm": 1.0, "warmup": 0.1, "dropout": 0.1}
BATCH, UNTIMED_STEPS = RECIPE["batch"], 5
GROUPED = 50
"""Batches among which --group-by-length sorts, as the sampler of transformers' Trainer does."""
STRIDE, MAX_QUESTION, MAX_ANSWER, N_BEST = 128, 64, 30, 20
"""Tokens from window to window (run_qa's stride is what they share) and of the longest question and answer; n-best."""

TAGS = ("O", *(f"{place}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for place in "BI"))
PADS, IGNORED = {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0}, -100
"""A model's inputs and what pads them (0 is BERT's [PAD]); torch's label for places without a loss."""


@dataclass(frozen=True)
class Workload:
    """What one task gives the loop: features to train on and to predict, and the score of the predictions."""

    head: Any
    num_labels: int
    train: list[dict]
    dev: list[dict]
    score: Callable[[list[np.ndarray]], dict[str, float]]
    facts: dict[str, Any] = field(default_factory=dict)


GLUE = {  # folder, columns of texts and of label, classes in GLUE's order (none: regression), header if files have none
    "cola": ("CoLA", ["sentence"], "label", ["0", "1"], ["source", "label", "star", "sentence"]),
    "sst2": ("SST-2", ["sentence"], "label", ["0", "1"], None),
    "mrpc": ("MRPC", ["#1 String", "#2 String"], "Quality", ["0", "1"], None),
    "stsb": ("STS-B", ["sentence1", "sentence2"], "score", [], None),
    "rte": ("RTE", ["sentence1", "sentence2"], "label", ["entailment", "not_entailment"], None),
}


def make_glue(task: str, tokenizer: Any, options: argparse.Namespace) -> Workload:
    """Read and encode both splits of a GLUE task."""
    folder, columns, label, classes, header = GLUE[task]

    def encode(split: str, limit: int | None) -> tuple[list[dict], np.ndarray]:
        path = options.data / folder / f"{split}.tsv"
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, header, delimiter="\t", quoting=csv.QUOTE_NONE))[:limit]
        labels = [classes.index(row[label]) if classes else float(row[label]) for row in rows]
        texts = [[row[name] for row in rows] for name in columns]
        features = unbatch(tokenizer(*texts, truncation=True, max_length=options.length))
        return [{**each, "labels": gold} for each, gold in zip(features, labels, strict=True)], np.array(labels)

    train, _ = encode("train", options.max_train_rows)
    dev, gold = encode("dev", None)

    def score(outputs: list[np.ndarray]) -> dict[str, float]:
        found = np.argmax(outputs, -1) if classes else np.stack(outputs)[:, 0]
        if task == "stsb":
            return {"pearson": pearsonr(found, gold).statistic, "spearman": spearmanr(found, gold).statistic}
        if task == "cola":
            return {"mcc": matthews_corrcoef(gold, found)}
        return {"accuracy": accuracy_score(gold, found)} | ({"f1": f1_score(gold, found)} if task == "mrpc" else {})

    return Workload(transformers.AutoModelForSequenceClassification, len(classes) or 1, train, dev, score)


def unbatch(batch: Any) -> list[dict]:
    """A tokenizer's answer as one feature for each row."""
    return [dict(zip(PADS, row, strict=True)) for row in zip(*(batch[name] for name in PADS), strict=True)]


def make_ner(task: str, tokenizer: Any, options: argparse.Namespace) -> Workload:
    """CoNLL-2003: a tag for the first piece of each word. Words cut off at the length are predicted to be outside."""

    def encode(name: str, limit: int | None) -> tuple[list[dict], list[dict[int, int]], list[list[str]]]:
        sentences = list(read_conll(options.data / name))[:limit]
        ways = {"is_split_into_words": True, "truncation": True, "max_length": options.length}
        batch = tokenizer([words for words, _ in sentences], **ways)
        features, firsts = unbatch(batch), []
        for row, (feature, (_, tags)) in enumerate(zip(features, sentences, strict=True)):
            feature["labels"] = [IGNORED] * len(feature["input_ids"])
            firsts.append({})
            for place, word in enumerate(batch.word_ids(row)):
                if word is not None and word not in firsts[-1]:
                    firsts[-1][word] = place
                    feature["labels"][place] = TAGS.index(tags[word])
        return features, firsts, [tags for _, tags in sentences]

    train, *_ = encode("eng.train", options.max_train_rows)
    dev, firsts, gold = encode("eng.testa", None)

    def score(outputs: list[np.ndarray]) -> dict[str, float]:
        found = []
        for logits_LC, places, tags in zip(outputs, firsts, gold, strict=True):
            best_L = logits_LC.argmax(-1)
            found.append([TAGS[best_L[places[word]]] if word in places else "O" for word in range(len(tags))])
        return {"f1": entity_f1(gold, found)}

    facts = {"dev_entities": len(get_entities(gold)), "dev_words_cut": sum(map(len, gold)) - sum(map(len, firsts))}
    return Workload(transformers.AutoModelForTokenClassification, len(TAGS), train, dev, score, facts)


def read_conll(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Words and tags of each sentence; the file's IOB1 becomes IOB2, where every entity begins with B."""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split() for line in block.splitlines() if line and not line.startswith("-DOCSTART-")]
        raw = [row[-1] for row in rows]
        pairs = zip(["O", *raw], raw, strict=False)
        tags = ["B-" + tag[2:] if tag[0] == "I" and before[2:] != tag[2:] else tag for before, tag in pairs]
        if rows:
            yield [row[0] for row in rows], tags


def make_qa(task: str, tokenizer: Any, options: argparse.Namespace) -> Workload:
    """Questions as windows. An answer that is not where the file says is not learned from."""
    read = list(questions(options.data / "train-v1.1.json"))
    whole = [each for each in read if each[1].startswith(each[2][0]["text"], each[2][0]["answer_start"])]
    kept = whole[: options.max_train_rows]
    train, _ = windows(tokenizer, kept, options.length)
    scored = list(questions(options.data / "dev-v1.1.json"))
    dev, places = windows(tokenizer, scored, options.length)

    def score(outputs: list[np.ndarray]) -> dict[str, float]:
        best = collections.defaultdict(lambda: (-math.inf, ""))
        for logits_L2, (row, offsets) in zip(outputs, places, strict=True):
            best[row] = max(best[row], best_span(logits_L2, offsets, scored[row][1]), key=lambda pair: pair[0])
        pairs = [(best[row][1], [answer["text"] for answer in each[2]]) for row, each in enumerate(scored)]
        exact = [max(normal(found) == normal(gold) for gold in golds) for found, golds in pairs]
        f1 = [max(word_f1(found, gold) for gold in golds) for found, golds in pairs]
        return {"exact_match": np.mean(exact), "f1": np.mean(f1)}

    facts = {"train_questions": len(kept), "answers_not_in_place": len(read) - len(whole), "dev_questions": len(scored)}
    return Workload(transformers.AutoModelForQuestionAnswering, 2, train, dev, score, facts)


def questions(path: Path) -> Iterator[tuple[str, str, list[dict]]]:
    """Question, context and answers of everything in a file."""
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for each in paragraph["qas"]:
                yield each["question"].lstrip(), paragraph["context"], each["answers"]


def windows(tokenizer: Any, rows: list, length: int) -> tuple[list[dict], list[tuple[int, list]]]:
    """Windows with the first answer's place ([CLS] where it is not whole), and each one's row and context offsets."""
    ways: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    asked = tokenizer([question for question, _, _ in rows], truncation=True, max_length=MAX_QUESTION, **ways)
    read = tokenizer([context for _, context, _ in rows], return_offsets_mapping=True, **ways)
    features, places = [], []
    for row, (_, _, answers) in enumerate(rows):
        context, characters = read["input_ids"][row], read["offset_mapping"][row]
        head = [tokenizer.cls_token_id, *asked["input_ids"][row], tokenizer.sep_token_id]
        room = length - len(head) - 1
        for begin in range(0, max(1, len(context) - room + STRIDE), STRIDE):
            part = [*context[begin : begin + room], tokenizer.sep_token_id]
            offsets = [None] * len(head) + characters[begin : begin + room] + [None]
            first, last = answers[0]["answer_start"], answers[0]["answer_start"] + len(answers[0]["text"]) - 1
            ends = find(offsets, first), find(offsets, last)
            start, end = ends if all(ends) else (0, 0)
            inputs = head + part, [0] * len(head) + [1] * len(part), [1] * len(offsets)
            labels = {"start_positions": start, "end_positions": end}
            features.append(dict(zip(PADS, inputs, strict=True)) | labels)
            places.append((row, offsets))
    return features, places


def find(offsets: list, letter: int) -> int:
    """The token that a character of the context is part of; 0, which is [CLS], if there is none."""
    return next((place for place, pair in enumerate(offsets) if pair and pair[0] <= letter < pair[1]), 0)


def best_span(logits_L2: np.ndarray, offsets: list, context: str) -> tuple[float, str]:
    """Score and text of the best answer in one window."""
    best = (-math.inf, "")
    starts, ends = (np.argsort(-logits_L2[:, side])[:N_BEST] for side in (0, 1))
    for start, end in itertools.product(starts, ends):
        if offsets[start] and offsets[end] and 0 <= end - start < MAX_ANSWER:
            total = float(logits_L2[start, 0] + logits_L2[end, 1])
            if total > best[0]:
                best = total, context[offsets[start][0] : offsets[end][1]]
    return best


def normal(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def word_f1(found: str, gold: str) -> float:
    """F1 of the words that two answers share."""
    left, right = normal(found).split(), normal(gold).split()
    shared = sum((collections.Counter(left) & collections.Counter(right)).values())
    return 2 * shared / (len(left) + len(right)) if shared else 0.0


def load_model(workload: Workload, options: argparse.Namespace) -> torch.nn.Module:
    """The folder's encoder under a new head. Ends the program if anything but the head is missing."""
    ways = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), RECIPE["dropout"])
    ways |= {"num_labels": workload.num_labels, "output_loading_info": True, "dtype": torch.float32}
    model, loaded = workload.head.from_pretrained(options.weights, **ways)
    lost = [name for name in sorted(loaded["missing_keys"]) if not name.startswith(("classifier.", "qa_outputs."))]
    if lost:
        sys.exit(f"{options.weights} lacks parameters other than the head's: {', '.join(lost)}")
    return model.to(options.device)


def make_optimizer(model: torch.nn.Module, num_steps: int, learning_rate: float) -> tuple[Any, Any]:
    """AdamW and its schedule; biases and LayerNorm do not decay."""
    groups = {RECIPE["weight_decay"]: [], 0.0: []}
    for name, value in model.named_parameters():
        groups[0.0 if name.endswith(("bias", "LayerNorm.weight")) else RECIPE["weight_decay"]].append(value)
    settings = [{"params": values, "weight_decay": decay} for decay, values in groups.items()]
    optimizer = torch.optim.AdamW(settings, learning_rate, fused=True)
    warmup = math.ceil(RECIPE["warmup"] * num_steps)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, warmup, num_steps)


def collate(rows: list[dict], options: argparse.Namespace, labels: bool) -> dict[str, torch.Tensor]:
    """Features as tensors, padded to the longest of them or to the length."""
    width = options.length if options.pad == "max" else max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in rows[0]:
        if labels or name in PADS:
            values, pad = [row[name] for row in rows], PADS.get(name, IGNORED)
            if isinstance(values[0], list):
                values = [value + [pad] * (width - len(value)) for value in values]
            batch[name] = torch.tensor(values).to(options.device)
    return batch


def draw_order(lengths: list[int], draws: torch.Generator, grouped: bool) -> list[int]:
    """An epoch's rows at random; grouped: each batch of rows of like length, the batches at random."""
    rows = torch.randperm(len(lengths), generator=draws).tolist()
    if not grouped:
        return rows
    pools = [rows[first : first + GROUPED * BATCH] for first in range(0, len(rows), GROUPED * BATCH)]
    rows = [row for pool in pools for row in sorted(pool, key=lambda row: lengths[row])]
    batches = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
    places = torch.randperm(len(batches) - 1, generator=draws).tolist()  # the last, which may be short, stays the last
    return [row for place in [*places, len(batches) - 1] for row in batches[place]]


def savepoint_path(task: str, seed: int, options: argparse.Namespace) -> Path:
    """Beside the output; of these settings and no others."""
    digest = hashlib.sha256(json.dumps(settings(options), sort_keys=True).encode()).hexdigest()
    return options.output.with_suffix(f".{task}-{seed}-{digest[:8]}.pt")


def train(
    model: Any,
    steps: Any,
    work: Workload,
    order: list[int],
    skip: int,
    options: argparse.Namespace,
    point: Savepoint | None = None,
) -> dict:
    """One epoch, or the rest of it: mean loss, and the seconds and examples of the steps after the first ``skip``."""
    optimizer, schedule = steps
    losses, start = [torch.tensor(loss) for loss in (point.losses if point else ())], None
    done = len(losses)
    model.train()
    for number, first in enumerate(range(0, len(order), BATCH)):
        if number < done:
            continue
        if number == skip:
            if losses:
                losses[-1].item()  # waits for the device, as reading the mean does at the end
            start = time.perf_counter()
        rows = [work.train[index] for index in order[first : first + BATCH]]
        loss = model(**collate(rows, options, labels=True)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["clip_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if point:
            point.after_step(losses)
    figures = {"train_loss": torch.stack(losses).mean().item(), "timed_examples": max(0, len(order) - skip * BATCH)}
    return figures | {"timed_seconds": time.perf_counter() - start if start else 0.0}


@torch.no_grad()
def predict(model: Any, work: Workload, options: argparse.Namespace) -> tuple[list[np.ndarray], float]:
    """Logits of every dev feature, without padding, and the seconds they took."""
    model.eval()
    outputs, start = [], time.perf_counter()
    for first in range(0, len(work.dev), BATCH):
        rows = work.dev[first : first + BATCH]
        answer = model(**collate(rows, options, labels=False))
        pair = (answer.start_logits, answer.end_logits) if "start_logits" in answer else None
        logits = (torch.stack(pair, -1) if pair else answer.logits).float().cpu().numpy()
        sizes = [None if logits.ndim == 2 else len(row["input_ids"]) for row in rows]
        outputs += [each[:size] for each, size in zip(logits, sizes, strict=True)]
        if first // BATCH % RELEASE_STEPS == 0:
            release_memory()
    return outputs, time.perf_counter() - start


def run(task: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score: the figures of one line."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.weights)
    work = {"ner": make_ner, "qa": make_qa}.get(task, make_glue)(task, tokenizer, options)
    encoded = time.perf_counter()
    torch.manual_seed(seed)
    model = load_model(work, options)
    steps = make_optimizer(model, math.ceil(len(work.train) / BATCH) * options.epochs, options.learning_rate)
    order = torch.Generator().manual_seed(seed)
    point = Savepoint(savepoint_path(task, seed, options), model, steps, order)
    for epoch in range(len(point.epochs), options.epochs):
        rows = draw_order([len(row["input_ids"]) for row in work.train], order, options.group_by_length)
        figures = train(model, steps, work, rows, 0 if epoch else UNTIMED_STEPS, options, point)
        outputs, seconds = predict(model, work, options)
        metrics = {name: round(100 * float(value), 3) for name, value in work.score(outputs).items()}
        point.end_epoch({"epoch": epoch + 1, "metrics": metrics, **figures, "predict_seconds": seconds})
        print(f"{task} seed {seed}: {json.dumps(point.epochs[-1])}", flush=True)
    epochs = point.epochs
    timed = 0.0 if point.resumed else sum(each["timed_seconds"] for each in epochs)
    return {
        "metrics": epochs[-1]["metrics"],
        "train_examples_per_second": sum(each["timed_examples"] for each in epochs) / timed if timed else None,
        "predict_examples_per_second": len(work.dev) * len(epochs) / sum(each["predict_seconds"] for each in epochs),
        "seconds": None if point.resumed else time.perf_counter() - start,
        "seconds_of_reading_and_tokenizing": encoded - start,
        "features": {"train": len(work.train), "dev": len(work.dev)},
        "load_before_and_after": [load, os.getloadavg()[0]],
        **work.facts,
        "epochs": epochs,
    }


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides a run's result, besides the machine: a run with the same ones is not repeated."""
    names = ("epochs", "learning_rate", "length", "pad", "max_train_rows", "device")
    weights = hashlib.sha256((options.weights / "model.safetensors").read_bytes()).hexdigest()
    grouped = {"group_by_length": True} if options.group_by_length else {}
    return {**{name: getattr(options, name) for name in names}, **grouped, **RECIPE, "weights_sha256": weights}


def origin(options: argparse.Namespace) -> dict[str, Any]:
    """Where a line comes from: command, commit ("-dirty": with changes), versions, machine."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "seqeval")
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    hardware = {"cpu": cpu[1] if cpu else platform.processor(), "cores": len(os.sched_getaffinity(0))}
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "hardware": hardware | {"threads": torch.get_num_threads(), "gpu": gpu},
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def parse() -> argparse.Namespace:
    """The options; None stands for the task's own value."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", "--task", nargs="+", required=True, choices=[*GLUE, "qa", "ner"])
    parser.add_argument("--seeds", "--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="Hugging Face folder of a BERT")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to append to")
    parser.add_argument("--epochs", type=int, help="default: 3, for qa 2")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--pad", choices=("longest", "max"), default="max", help="to a batch's longest or the length")
    parser.add_argument("--group-by-length", action="store_true", help="batches of rows of like length")
    parser.add_argument("--keep-memory", action="store_true", help="malloc set as our command line sets it, on a CPU")
    parser.add_argument("--max-train-rows", type=int, help="train on the first rows alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Run what the output file does not hold yet."""
    common = parse()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    common.output.parent.mkdir(parents=True, exist_ok=True)
    common.output.touch()
    for seed in common.seeds:
        for task in common.tasks:
            options = argparse.Namespace(**vars(common))
            options.epochs = common.epochs or (2 if task == "qa" else 3)
            options.length = 384 if task == "qa" else 128
            wanted = {"task": task, "seed": seed, "settings": settings(options)}
            lines = common.output.read_text(encoding="utf-8").splitlines()
            if any(wanted.items() <= json.loads(line).items() for line in lines):
                print(f"{task} seed {seed}: in {common.output} already")
                continue
            report = wanted | origin(options) | run(task, seed, options)
            print(json.dumps({name: value for name, value in report.items() if name != "epochs"}, indent=1))
            with common.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(report) + "\n")
            savepoint_path(task, seed, options).unlink()


if __name__ == "__main__":
    main()
