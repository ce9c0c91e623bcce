"""What a user can get wrong in official files, and TensorFlow Datasets in their place."""

import gzip
import itertools
import json
import subprocess
import sys

import pytest
from task_files import question, squad, table, write

from bert_flax.finetune.examples import summarize
from bert_flax.finetune.readers import read, read_file
from bert_flax.finetune.tasks import TASKS
from core_flax.types import UserError

COLA, RTE, WNLI, SQUAD, SWAG, NER = (TASKS[name] for name in ("cola", "rte", "wnli", "squad", "swag", "ner"))


# What a user can get wrong

PAIR = ("index", "sentence1", "sentence2", "label")


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        (RTE, b"", "FILE is empty"),
        (RTE, b"\xef\xbb\xbf\n\n", "FILE is empty"),
        (RTE, table(PAIR), "FILE holds no example"),
        (
            RTE,
            table(PAIR, (0, "a", "b", "neutral")),
            "FILE:2: 'neutral' is no label of task rte, which has entailment, ",
        ),
        (RTE, table(PAIR, (0, "a", "b", "entailment"), (1, "a", "b", "")), "FILE:3: '' is no label of task rte"),
        (RTE, table(PAIR[:3], (0, "a", "b")), "FILE has no column 'label'; its columns are 'index', 'sentence1', 'sen"),
        (RTE, table((*PAIR, "label"), range(5)), "FILE has two columns 'label'"),
        (RTE, table(PAIR, (0, "a", "b", "entailment"), (1, "a", "b")), "FILE:3 has 3 fields, not 4"),
        (RTE, table(PAIR, (0,)), "FILE:2 has 1 field, not 4"),
        (RTE, table(PAIR, (0, "a", "b", "c", "entailment")), "FILE:2 has 5 fields, not 4"),
        (
            RTE,
            table(PAIR, (0, "a", "b", "entailment")) + "\n" + table((0, "a", "b", "entailment")),
            "FILE:3 is blank; mend the row",
        ),
        (RTE, (table(PAIR) + table((0, "Süd", "b", "entailment"))).encode("latin-1"), "FILE:2 is not UTF-8: byte 0xfc"),
        (RTE, table(PAIR).encode("utf-16"), "convert the file, for example with iconv -f UTF-16 -t UTF-8"),
        (RTE, gzip.compress(table(PAIR).encode()), "FILE is gzipped; unpack it (gunzip)"),
        (RTE, "x" * 10**6, f"FILE has no column 'sentence1'; its columns are '{'x' * 60}'"),
        (RTE, table(range(99)), "its columns are '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '10', '11', '12', "),
        (RTE, table(PAIR, (0, "a", "b", "x" * 999)), f"FILE:2: '{'x' * 60}' is no label of task rte, which has "),
        (
            COLA,
            table(("xy01", "1", "", "a"), ("xy01", "2", "", "b")),
            "FILE:2: '2' is no label of task cola, which has 0, 1",
        ),
        (COLA, table(("xy01", "1", "a")), "FILE:1 has 3 fields, not 4"),
        (SWAG, table(("sent1", "sent2", "label")), "FILE has no column 'ending0'"),
        (NER, "a NN O O\nb NN O\n", "FILE:2 has 3 columns where line 1 has 4"),
        (
            NER,
            "-DOCSTART- O\n\na NN O I-PER\n\nb NN O I-GPE\n",
            "FILE:5: 'I-GPE' is no tag of task ner, which has O, B-P",
        ),
        (NER, "a\nb\n", "FILE:1 has a word and no tag"),
        (NER, "-DOCSTART- -X- O O\n\n", "FILE holds no example"),
        (SQUAD, '{"data": [\n{]}', "FILE:2 is not valid JSON: Expecting property name"),
        (SQUAD, "[" * 100_000, "FILE is not JSON that can be read: maximum recursion depth exceeded"),
        (SQUAD, '{"data": ' + "9" * 5000 + "}", "FILE is not JSON that can be read: Exceeds the limit (4300 digits)"),
        (SQUAD, "[]", "FILE has no 'data' (list)"),
        (SQUAD, '{"data": []}', "FILE holds no example"),
        (SQUAD, '{"data": [{"paragraphs": [{"qas": []}]}]}', "FILE data[0].paragraphs[0] has no 'context' (string)"),
        (SQUAD, squad({"question": "?", "answers": []}), "FILE data[1].paragraphs[0].qas[0] has no 'id' (string)"),
        (SQUAD, squad({"id": "a", "question": "?"}), "FILE question a has no 'answers' (list)"),
        (SQUAD, squad(question("a", ("Der", "0"))), "FILE question a has no 'answer_start' (whole number)"),
        (SQUAD, squad(question("a", ("Der", True))), "FILE question a has no 'answer_start' (whole number)"),
        (SQUAD, squad(question("a"), context="x\ud83d"), "half of a surrogate pair at character 1 of 'context'"),
        (SQUAD, squad(question("a", ("", 0))), "FILE holds no example: FILE question a has no answer"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("FILE") else "",
)
def test_bad_files(tmp_path, spec, content, message):
    path = write(tmp_path / "file", content)
    with pytest.raises(UserError) as error:
        read_file(spec, path, labelled=True)
    assert message.replace("FILE", str(path)) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_bad_places(tmp_path):
    rows = table(PAIR, (0, "a", "b", "entailment"))
    path = write(tmp_path / "RTE/train.tsv", rows)

    def refuse(spec, data, split="train"):
        with pytest.raises(UserError) as error:
            read(spec, data, split)
        return str(error.value)

    assert f"{tmp_path}/x does not exist" in refuse(RTE, tmp_path / "x")
    assert "is a file; give the folder that holds it, as train.tsv" in refuse(RTE, path)
    assert "lacks the dev split of rte: there is no RTE/dev.tsv or dev.tsv" in refuse(RTE, tmp_path, "dev")
    assert "there is no eng.train or train.txt" in refuse(NER, tmp_path)
    assert "rte has no split 'validation'; it has train, dev, test" in refuse(RTE, tmp_path, "validation")
    assert f"{tmp_path}/RTE is the folder of task rte, not of wnli" in refuse(WNLI, tmp_path / "RTE")
    write(tmp_path / "train.tsv", rows)
    assert f"{path} and {tmp_path}/train.tsv could both be the train split" in refuse(RTE, tmp_path)
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Is a directory"):
        read_file(RTE, tmp_path, labelled=True)


def test_many_lines_in_one():
    assert summarize(["a", "b", "c"]) == "a; b; c"
    assert summarize([*"abc", *itertools.repeat("d", 1234)]) == "a; b; c; and 1,234 more"


# TensorFlow Datasets

TFDS_SCRIPT = """
import dataclasses, json, os, sys
from bert_flax.finetune import readers
from bert_flax.finetune.readers import read
from bert_flax.finetune.tasks import TASKS, custom_task
from core_flax.types import UserError
assert not {"tensorflow", "jax", "tensorflow_datasets"} & set(sys.modules)  # what reading files takes
folder = sys.argv[1]
os.environ["TFDS_DATA_DIR"] = folder
import tensorflow_datasets as tfds
F = tfds.features

def build(name, features, stored=True, **splits):
    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))
    def split_generators(self, manager):
        return {split: enumerate(rows) for split, rows in splits.items()}
    members = dict(VERSION=tfds.core.Version("1.0.0"), _info=info, _split_generators=split_generators,
        _generate_examples=lambda self: None, __module__=__name__)
    kind = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    if stored:  # else it is when it is first read
        kind(data_dir=folder, file_format="array_record").download_and_prepare()
        del tfds.core.registered._DATASET_REGISTRY[kind.name]  # from here on it is known by its files alone

import numpy as np
pair = {"sentence1": F.Text(), "sentence2": F.Text(), "idx": np.int32}
def pairs(*labels):
    return [{"sentence1": f"ä{n}", "sentence2": f"b{n}", "label": l, "idx": n} for n, l in enumerate(labels)]
build("MyPairs", pair | {"label": F.ClassLabel(names=["different", "same"])},
    train=pairs(1, 0, 0, 1, 1, 1, 0, 0, 1), validation=pairs(0, 1), test=pairs(-1, -1))
build("MyWords", pair | {"label": F.ClassLabel(names=["not_entailment", "entailment"])}, train=pairs(1, 0))
build("MyScores", pair | {"label": np.float32}, stored=False, train=pairs(3.8, 0.333, 5))
answers = F.Sequence({"text": F.Text(), "answer_start": np.int32})
texts = {"id": np.str_, "question": F.Text(), "context": F.Text(), "answers": answers}
def q(name, text, start, **more):
    found = {"text": text, "answer_start": start}
    return {"id": name, "question": "q?", "context": "ß 🙂 ende", "answers": found} | more
build("MyQuestions", texts, train=[q("a", ["ende"], [4]), q("b", ["ende"], [5])], dev=[q("c", ["🙂", "ß"], [2, 0])])
build("MyImpossible", texts | {"is_impossible": np.bool_}, train=[q("d", [], [], is_impossible=True)])
words = {"tokens": F.Sequence(F.Text()), "ner": F.Sequence(F.ClassLabel(names=["O", "I-PER", "B-PER"]))}
build("MyTags", words, train=[{"tokens": ["Ü", "b", "c"], "ner": [1, 1, 0]}])

def out(spec, name, split="train"):
    try:
        found = read(spec, "tfds:" + name, split)
        rows = [dataclasses.astuple(example) for example in found.examples]
        print(json.dumps([rows, found.dropped]))
    except UserError as error:
        print(json.dumps(str(error)))

T = TASKS
for case in [(T["mrpc"], "my_pairs"), (T["mrpc"], "my_pairs", "dev"), (T["mrpc"], "my_pairs", "test"),
        (T["rte"], "my_words"), (T["stsb"], "my_scores"), (T["squad"], "my_questions"),
        (T["squad"], "my_questions", "dev"), (T["squad2"], "my_impossible"), (T["ner"], "my_tags"),
        (T["squad2"], "my_questions"), (T["rte"], "my_pairs"), (T["qqp"], "my_pairs"), (T["mrpc"], "my_words", "dev"),
        (T["mrpc"], "glue/cola"), (T["swag"], "my_pairs"), (T["mrpc"], "no_such"), (T["mrpc"], "../x")]:
    out(*case)
assert not {"tensorflow", "jax"} & set(sys.modules)
"""


def test_tfds_without_tensorflow(tmp_path):
    """Datasets that TFDS itself wrote in array_record format; in a process of its own to see what it imports."""
    # With the protobuf that Beam asks for, TFDS calls what protobuf is going to remove.
    warnings = ["-W", "error", "-W", "ignore:label() is deprecated:DeprecationWarning"]
    command = [sys.executable, *warnings, "-c", TFDS_SCRIPT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith(("[", '"'))]
    train, dev, test, words, scores, questions, more_questions, impossible, tags, *errors = found
    expected = [[str(n), f"ä{n}", f"b{n}", label] for n, label in enumerate((1, 0, 0, 1, 1, 1, 0, 0, 1))]
    assert train[0] == expected  # in the original order, which TFDS does not keep
    assert [row[3] for row in dev[0]] == [0, 1] and [row[3] for row in test[0]] == [None, None]
    assert [row[3] for row in words[0]] == [0, 1]  # by name: entailment is our first
    assert [row[3] for row in scores[0]] == [3.8, 0.333, 5.0]
    assert questions[0] == [["a", "q?", "ß 🙂 ende", [["ende", 4]], False]]
    assert "question b: answer_start 5 of 'ende' points at 'nde'" in questions[1][0]
    assert more_questions[0] == [["c", "q?", "ß 🙂 ende", [["🙂", 2], ["ß", 0]], False]]
    assert impossible[0] == [["d", "q?", "ß 🙂 ende", [], True]]
    assert tags[0] == [["0", ["Ü", "b", "c"], ["B-PER", "I-PER", "O"], 0]]
    messages = [
        "my_questions has no field 'is_impossible' (it has ",
        "my_pairs has the labels different, same; task rte has entailment, not_entailment",
        "my_pairs has no field 'question1'",
        "my_words has no split validation or dev or validation_matched; it has train",
        "tfds:glue/cola holds task cola, not mrpc",
        "TFDS has no dataset for task swag",
        "tfds:no_such cannot be had",
        "is not the name of a dataset",
    ]
    assert len(errors) == len(messages)
    for error, message in zip(errors, messages, strict=True):
        assert message in error
