"""A small model in Hugging Face's format, and small files in the official layouts of every kind of task, all made up.

What is to be told lies in a word or two, so that a small model can learn it in a few steps.
"""

import contextlib
import csv
import io
import json
import os
import random
import subprocess

import jax
import numpy as np
import pytest

from bert_flax.cli import main
from bert_flax.huggingface import save_pretrained
from bert_flax.model import BertConfig, BertForPreTraining
from core_flax.text.wordpiece import SPECIALS, WordPiece

NOUNS = "river farmer teacher garden window market letter winter engine village".split()  # noqa: SIM905
VERBS = "sees finds opens paints sells builds crosses".split()  # noqa: SIM905
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = [*SPECIALS, "the", "a", "good", "bad", "who", "in", "and", *NOUNS, *VERBS, ".", "?", ","]
VOCABULARY = WordPiece([*PIECES, *LETTERS.replace("a", ""), *(f"##{letter}" for letter in LETTERS)])
CONFIG = BertConfig(
    vocab_size=VOCABULARY.num_tokens, num_layers=1, width=16, num_heads=2, mlp_width=32, max_length=64, init_stddev=0.1
)
OPTIONS = {
    "train.batch-size": 8,
    "inputs.max-length": 32,
    "optimizer.learning-rate": 1e-2,
    "epochs": 8,
    "log.every-steps": 1,
}
QUICK = {"dropout": 0.0, "attention_dropout": 0.0}
"""Programs without dropout are compiled faster."""


def write_model(folder):
    """A folder of Hugging Face's; its weights are drawn."""
    ids = np.zeros((1, 4), np.int32)
    params = jax.jit(BertForPreTraining(CONFIG).init)(jax.random.key(0), ids, ids, ids == 0, ids)["params"]
    save_pretrained(folder, CONFIG, jax.device_get(params), VOCABULARY)
    return folder


def arguments(task, data, workdir, *more, **changes):
    """Of ``bert-flax finetune``; ``changes`` to its options are ``train__batch_size=4``, None leaves one out."""
    given = {"data": data, "workdir": workdir} | OPTIONS
    given |= {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return ["finetune", task, *flags, "--log.no-tensorboard", *map(str, more)]


@contextlib.contextmanager
def in_a_hurry():
    """Programs are compiled fast rather than to be fast, here and in the processes that are started."""
    name = "jax_disable_most_optimizations"
    if name.upper() in os.environ:  # within another
        yield
        return
    os.environ[name.upper()] = "1"
    jax.config.update(name, True)
    yield
    jax.config.update(name, False)
    del os.environ[name.upper()]


def here(*argv):
    """``bert-flax`` in this process, on four devices."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    return subprocess.CompletedProcess(argv, stop.value.code, out.getvalue(), err.getvalue())


def right(done):
    """What a command has printed that ended well."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(*argv):
    """The one line of a command that was refused."""
    done = here(*argv)
    assert done.returncode == 2, done
    assert done.stderr.startswith("bert-flax: error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def sentence(draw, quality):
    return f"the {quality} {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}"


def rows(seed, count):
    """(number, text, text, whether the first is about something good)."""
    draw = random.Random(seed)
    for number in range(count):
        first, second = draw.choice(("good", "bad")), draw.choice(("good", "bad"))
        yield number, sentence(draw, first) + ".", sentence(draw, second) + " .", int(first == "good")


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def tsv(path, *lines):
    return put(path, "".join("\t".join(map(str, line)) + "\n" for line in lines))


def write_glue(home, train=24, dev=13, test=5):
    """MRPC, RTE, CoLA and STS-B, each in its folder and layout."""
    sizes = {"train": train, "dev": dev, "test": test}
    for seed, (split, count) in enumerate(sizes.items()):
        found, labelled = list(rows(seed, count)), split != "test"
        name = f"{split}.tsv"
        both = ("Quality" if labelled else "index", "#1 ID", "#2 ID", "#1 String", "#2 String")
        tsv(home / "MRPC" / name, both, *((good if labelled else n, 1, 2, a, b) for n, a, b, good in found))
        words = ("entailment", "not_entailment")
        tsv(
            home / "RTE" / name,
            ("index", "sentence1", "sentence2", *(["label"] * labelled)),
            *((n, a, b, *([words[good]] * labelled)) for n, a, b, good in found),
        )
        if labelled:
            tsv(home / "CoLA" / name, *(("x", int("good" in a), "", a) for _, a, _, _ in found))
        else:
            tsv(home / "CoLA" / name, ("index", "sentence"), *((n, a) for n, a, _, _ in found))
        tsv(
            home / "STS-B" / name,
            ("index", "genre", "sentence1", "sentence2", *(["score"] * labelled)),
            *((n, "made", a, b, *([f"{4 * good + n % 5 / 5:.3f}"] * labelled)) for n, a, b, good in found),
        )
    return home


def questions(seed, count, version):
    """SQuAD's JSON; in version 2.0 every third question has no answer."""
    draw, paragraphs = random.Random(seed), []
    for number in range(count):
        nouns = draw.sample(NOUNS, 3)
        context = " ".join(f"In the {noun}, a {quality} {noun}." for noun, quality in zip(nouns, ("bad",) * 3))  # noqa: B905
        good = draw.randrange(3)
        impossible = version == 2 and number % 3 == 2
        context = context if impossible else context.replace(f"bad {nouns[good]}", f"good {nouns[good]}")
        start = context.find(f"good {nouns[good]}")
        answers = [] if impossible else [{"text": f"good {nouns[good]}", "answer_start": start}]
        qa = {"id": f"q{seed}-{number}", "question": "Who?", "answers": answers}
        paragraphs.append({"context": context, "qas": [qa | ({"is_impossible": impossible} if version == 2 else {})]})
    return json.dumps({"version": f"{version}", "data": [{"title": "made", "paragraphs": paragraphs}]})


def write_squad(home, version, train=24, dev=9):
    name = "v1.1" if version == 1 else "v2.0"
    for seed, (split, count) in enumerate({"train": train, "dev": dev}.items()):
        put(home / f"{split}-{name}.json", questions(seed, count, version))
    return home


def write_swag(home, train=16, dev=9):
    for seed, (split, count) in enumerate({"train": train, "val": dev}.items()):
        draw, text = random.Random(seed), io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["", "video-id", "sent1", "sent2", *(f"ending{n}" for n in range(4)), "label"])
        for number in range(count):
            label = draw.randrange(4)
            endings = [sentence(draw, "good" if choice == label else "bad") + ", and" for choice in range(4)]
            writer.writerow([number, "made", "The winter.", "The", *endings, label])
        put(home / f"{split}.csv", text.getvalue())
    return home


def write_ner(home, train=20, dev=9):
    """Words after "good" are persons, those after "bad" places; some sentences are longer than 32 tokens."""
    for seed, (split, count) in enumerate({"eng.train": train, "eng.testa": dev}.items()):
        draw, lines = random.Random(seed), []
        for number in range(count):
            if number % 4 == 0:
                lines += ["-DOCSTART- -X- O O", ""]
            for _ in range(8 if number % 5 == 4 else 1):
                quality = draw.choice(("good", "bad"))
                words = sentence(draw, quality).split()
                lines += [
                    f"{word} NN I-NP {('I-PER' if quality == 'good' else 'I-LOC') if place == 2 else 'O'}"
                    for place, word in enumerate(words)
                ]
            lines.append("")
        put(home / split, "\n".join(lines) + "\n")
    return home
