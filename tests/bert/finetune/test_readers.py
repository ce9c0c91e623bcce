import csv
import dataclasses
import io
import itertools
import json
import random
import subprocess
import sys

import pytest

from bert_flax.finetune.conll import to_iob2
from bert_flax.finetune.examples import Answer, QuestionExample, TextExample, summarize
from bert_flax.finetune.files import glue_tasks
from bert_flax.finetune.readers import read, read_file
from bert_flax.finetune.tasks import TASKS
from core_flax.types import UserError

COLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE, WNLI, SQUAD, SQUAD2, SWAG, NER = TASKS.values()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(*rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def tuples(dataset):
    return [dataclasses.astuple(example) for example in dataset.examples]


# GLUE


def test_quotes_are_text(tmp_path):
    """A field may hold one quote, or begin with one: csv's default would join rows until the next."""
    rows = [('"They left early .', "He said : they left ."), ('A " B', '"All of it"'), ('""', "' \\")]
    header = ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    text = table(header, *((number % 2, 7, 8, *row) for number, row in enumerate(rows)))
    write(tmp_path / "MRPC" / "train.tsv", text)
    dataset = read(MRPC, tmp_path, "train")
    assert tuples(dataset) == [(str(number), *row, number % 2) for number, row in enumerate(rows)]
    stored = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    assert [example.text_pair for example in dataset.examples] == [row["#2 String"] for row in stored]
    assert read(MRPC, tmp_path / "MRPC", "train") == dataset
    assert glue_tasks(tmp_path) == {"mrpc": ("train",)}


def test_mrpc_test_has_other_columns(tmp_path):
    write(tmp_path / "test.tsv", table(("index", "#1 ID", "#2 ID", "#1 String", "#2 String"), (31, 1, 2, "a", "b")))
    assert tuples(read(MRPC, tmp_path, "test")) == [("31", "a", "b", None)]


def test_cola_has_a_header_only_in_test(tmp_path):
    write(tmp_path / "train.tsv", table(("xy01", 1, "", "They sleep."), ("xy01", 0, "*", "Them sleeps.")))
    write(tmp_path / "test.tsv", table(("index", "sentence"), (5, "We sleep.")))
    assert tuples(read(COLA, tmp_path, "train")) == [("0", "They sleep.", None, 1), ("1", "Them sleeps.", None, 0)]
    assert tuples(read(COLA, tmp_path, "test")) == [("5", "We sleep.", None, None)]
    assert tuples(read_file(COLA, tmp_path / "train.tsv", labelled=False))[0] == ("0", "They sleep.", None, None)


def test_sst2_test_has_an_index(tmp_path):
    write(tmp_path / "dev.tsv", table(("sentence", "label"), ("so dull ", 0), ("so bright ", 1)))
    write(tmp_path / "test.tsv", table(("index", "sentence"), (9, "so so ")))
    assert tuples(read(SST2, tmp_path, "dev")) == [("0", "so dull ", None, 0), ("1", "so bright ", None, 1)]
    assert tuples(read(SST2, tmp_path, "test")) == [("9", "so so ", None, None)]


def test_qqp_with_empty_and_torn_rows(tmp_path):
    rows = [(4, 1, 2, "Why so?", "", 0), (6, 3, 4, "", "How?", 1)]
    torn = "8\t5\t6\tA question that\nbreaks?\tAnother?\t1\n"
    text = table(("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), rows[0])
    path = write(tmp_path / "QQP" / "train.tsv", text + torn + table(rows[1]))
    dataset = read(QQP, tmp_path, "train")
    assert tuples(dataset) == [("4", "Why so?", "", 0), ("6", "", "How?", 1)]
    assert dataset.dropped == (f"{path}:3 has 4 fields, not 6", f"{path}:4 has 3 fields, not 6")
    # and so for predictions, where the label's column may be missing
    write(path, table(("id", "question1", "question2"), (4, "Why so?", ""), (5, "torn")))
    dataset = read_file(QQP, path, labelled=False)
    assert tuples(dataset) == [("4", "Why so?", "", None)] and len(dataset.dropped) == 1


def mnli(*rows, labels=("label1", "gold_label")):
    parses = ("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse")
    header = ("index", "promptID", "pairID", "genre", *parses, "sentence1", "sentence2", *labels)
    return table(header, *((number, "", "", "", "", "", "", "", *row) for number, row in enumerate(rows)))


def test_mnli_matched_and_mismatched(tmp_path):
    five = tuple(f"label{number}" for number in range(1, 6))
    votes = ("neutral",) * 5
    write(tmp_path / "MNLI/train.tsv", mnli(("a", "b", "neutral", "neutral"), ("c", "d", "-", "-")))
    dev = [("e", "f", *votes, "contradiction"), ("g", "h", *votes, "-"), ("i", "j", *votes, "entailment")]
    path = write(tmp_path / "MNLI/dev_matched.tsv", mnli(*dev, labels=(*five, "gold_label")))
    write(tmp_path / "MNLI/dev_mismatched.tsv", mnli(("k", "l", *votes, "neutral"), labels=(*five, "gold_label")))
    write(tmp_path / "MNLI/test_mismatched.tsv", mnli(("m", "n"), labels=()))
    names = ("entailment", "neutral", "contradiction")
    found = {split: read(MNLI, tmp_path, split) for split in ("train", "dev", "dev_mismatched", "test_mismatched")}
    assert [(e.text, e.text_pair, names[e.label]) for e in found["dev"].examples] == [
        ("e", "f", "contradiction"),
        ("i", "j", "entailment"),
    ]
    assert [example.id for example in found["dev"].examples] == ["0", "2"]
    assert found["dev"].dropped == (f"{path}:3 has no label ('-')",) and len(found["train"].dropped) == 1
    assert tuples(found["dev_mismatched"]) == [("0", "k", "l", 1)]
    assert tuples(found["test_mismatched"]) == [("0", "m", "n", None)]
    assert len(read_file(MNLI, path, labelled=False).examples) == 3
    assert glue_tasks(tmp_path) == {"mnli": tuple(found)}
    with pytest.raises(UserError, match=r"there is no MNLI/test_matched.tsv or test_matched.tsv"):
        read(MNLI, tmp_path, "test")


def test_stsb_scores(tmp_path):
    header = (
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    )
    rows = [(0, "", "", "", "", "", "", "a", "b", "3.800"), (1, "", "", "", "", "", "", "c", "d", "0")]
    path = write(tmp_path / "STS-B/dev.tsv", table(header, *rows))
    assert tuples(read(STSB, tmp_path, "dev")) == [("0", "a", "b", 3.8), ("1", "c", "d", 0.0)]
    for score in ("5.1", "-0.2", "nan", "inf", "high", ""):
        write(path, table(header, *rows, (2, "", "", "", "", "", "", "a", "b", score)))
        with pytest.raises(UserError, match=f":4: '{score}' is no score of task stsb; it takes numbers from 0 to 5"):
            read(STSB, tmp_path, "dev")


def test_entailment_is_first(tmp_path):
    words = [("a", "b", "not_entailment"), ("c", "d", "entailment")]
    for folder, header in (("RTE", ("sentence1", "sentence2")), ("QNLI", ("question", "sentence"))):
        rows = ((number, *row) for number, row in enumerate(words))
        write(tmp_path / folder / "dev.tsv", table(("index", *header, "label"), *rows))
    write(tmp_path / "WNLI/dev.tsv", table(("index", "sentence1", "sentence2", "label"), (0, "a", "b", 1)))
    assert tuples(read(RTE, tmp_path, "dev")) == [("0", "a", "b", 1), ("1", "c", "d", 0)]
    assert tuples(read(QNLI, tmp_path, "dev")) == [("0", "a", "b", 1), ("1", "c", "d", 0)]
    assert tuples(read(WNLI, tmp_path, "dev")) == [("0", "a", "b", 1)]


def test_rows_end_at_line_feeds_alone(tmp_path):
    """Texts from the web hold characters that Python takes for the end of a line."""
    odd = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh"
    text = table(("sentence", "label"), (odd, 1), ("b", 0))
    path = write(tmp_path / "dev.tsv", text)
    assert [example.text for example in read(SST2, tmp_path, "dev").examples] == [odd, "b"]
    write(path, text.replace("\n", "\r\n") + "\r\n\n")  # as an editor for Windows leaves it
    assert [(example.text, example.label) for example in read(SST2, tmp_path, "dev").examples] == [(odd, 1), ("b", 0)]
    write(path, text.removesuffix("\n"))
    assert len(read(SST2, tmp_path, "dev").examples) == 2


# SWAG


def swag(rows, label=("label",)):
    stream = io.StringIO()
    writer = csv.writer(stream)
    endings = [f"ending{choice}" for choice in range(4)]
    writer.writerow(("", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source", *endings, *label))
    writer.writerows(rows)
    return stream.getvalue()


def test_swag_is_quoted(tmp_path):
    endings = ("waves, then sits.", 'says "no".', "looks\nup.", "")
    row = (17, "v", 3, "He stands. She", "He stands.", "She", "gold", *endings)
    write(tmp_path / "val.csv", swag([(*row, 2)]))
    write(tmp_path / "test.csv", swag([row], label=()))
    assert tuples(read(SWAG, tmp_path, "dev")) == [("17", "He stands.", "She", endings, 2)]
    assert tuples(read(SWAG, tmp_path, "test")) == [("17", "He stands.", "She", endings, None)]


def test_swag_rows_are_told_by_their_first_line(tmp_path):
    """A field may hold a line break, so rows and lines are not the same."""
    whole = (0, "", "", "", "a", "b", "gold", "w\nw\nw", "x", "y", "z", 0)
    path = write(tmp_path / "dev.csv", swag([whole, (*whole[:-1], 4)]))
    with pytest.raises(UserError, match=r"dev.csv:5: '4' is no label of task swag, which has 0, 1, 2, 3"):
        read_file(SWAG, path, labelled=True)
    write(path, swag([whole, whole[:-1]]))
    with pytest.raises(UserError, match=r"dev.csv:5 has 11 fields, not 12"):
        read_file(SWAG, path, labelled=True)
    write(path, swag([whole]) + '1,,,,a,b,"gold"x,1,2,3,4,0\n')
    with pytest.raises(UserError, match=r"dev.csv:5 is not a row of CSV"):
        read_file(SWAG, path, labelled=True)


# CoNLL


CONLL = """-DOCSTART- -X- O O

Anna NNP I-NP I-PER
Berg NNP I-NP I-PER
Berlin NNP I-NP B-PER
sah VBD I-VP O

Acme NNP I-NP I-ORG
Oslo NNP I-NP I-LOC
\t
-DOCSTART- -X- O O

Rio NNP I-NP I-LOC
"""


def test_conll_columns(tmp_path):
    write(tmp_path / "eng.testa", CONLL)
    expected = [
        ("0", ("Anna", "Berg", "Berlin", "sah"), ("B-PER", "I-PER", "B-PER", "O"), 0),
        ("1", ("Acme", "Oslo"), ("B-ORG", "B-LOC"), 0),
        ("2", ("Rio",), ("B-LOC",), 1),
    ]
    assert tuples(read(NER, tmp_path, "dev")) == expected
    without = CONLL.replace("-DOCSTART- -X- O O\n", "")
    write(tmp_path / "valid.txt", without.replace(" ", "\t").replace("\n", "\r\n"))
    (tmp_path / "eng.testa").unlink()
    assert tuples(read(NER, tmp_path, "dev")) == [(*row[:3], number) for number, row in enumerate(expected)]
    words = write(tmp_path / "words", "".join(line.split(" ")[0] + "\n" for line in CONLL.split("\n")))
    assert tuples(read_file(NER, words, labelled=False)) == [(*row[:2], None, row[3]) for row in expected]


def entities(tags, scheme):
    """(type, start, stop) by the definition of each scheme: the start of an entity, then all that is inside it."""
    found = []
    for place, tag in enumerate(tags):
        before = tags[place - 1] if place else "O"
        if scheme == "IOB1":
            begins = tag != "O" and (tag[0] == "B" or before == "O" or before[2:] != tag[2:])
        else:
            begins = tag[0] == "B"
        if begins:
            found.append([tag[2:], place, place + 1])
        elif tag != "O":
            assert found[-1][0] == tag[2:] and found[-1][2] == place, "I- that goes on nothing"
            found[-1][2] += 1
    return found


def test_iob1_and_iob2_hold_the_same_entities():
    draw = random.Random(0)
    for _ in range(2000):
        wanted, iob1, iob2 = [], [], []
        while len(iob1) < 12:
            kind, length = draw.choice(("PER", "LOC", None)), draw.randint(1, 3)
            if kind is None:
                iob1, iob2 = [*iob1, "O"], [*iob2, "O"]
                continue
            touches = bool(wanted) and wanted[-1][0] == kind and wanted[-1][2] == len(iob1)
            wanted.append([kind, len(iob1), len(iob1) + length])
            iob2 += [f"B-{kind}"] + [f"I-{kind}"] * (length - 1)
            iob1 += [f"{'B' if touches else 'I'}-{kind}"] + [f"I-{kind}"] * (length - 1)
        assert entities(iob1, "IOB1") == wanted  # the test's own reading of both schemes is right
        assert entities(to_iob2(iob1), "IOB2") == wanted
        assert to_iob2(iob1) == to_iob2(iob2) == tuple(iob2)


# SQuAD

CONTEXT = "Der Fluß, «naïve» 🙂, fließt nach Süden."
FLOW = CONTEXT.index("fließt")


def squad(*questions, context=CONTEXT):
    half = len(questions) // 2
    paragraphs = [{"context": context, "qas": list(part)} for part in (questions[:half], questions[half:])]
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [part]} for part in paragraphs]})


def question(name, *answers, **more):
    return {"id": name, "question": f"{name}?", "answers": [{"text": t, "answer_start": s} for t, s in answers]} | more


def test_squad_counts_characters(tmp_path):
    smile = CONTEXT.index("🙂")
    path = write(
        tmp_path / "dev-v1.1.json", squad(question("a", ("🙂", smile), ("fließt", FLOW)), question("b", ("D", 0)))
    )
    dataset = read(SQUAD, tmp_path, "dev")
    first = QuestionExample("a", "a?", CONTEXT, (Answer("🙂", smile), Answer("fließt", FLOW)), False)
    assert dataset.examples == (first, QuestionExample("b", "b?", CONTEXT, (Answer("D", 0),), False))
    assert dataset.dropped == dataset.warnings == ()
    assert read_file(SQUAD, path, labelled=True) == dataset
    assert [example.answers for example in read_file(SQUAD, path, labelled=False).examples] == [(), ()]


def test_misplaced_answers_are_not_trained_on(tmp_path):
    questions = [
        question("whole", ("Der", 0)),
        question("half", ("fließt", FLOW), ("fließt", FLOW + 1)),
        question("off", ("Der", 1)),
        question("negative", (".", -1)),
        question("beyond", ("Der", 999)),
    ]
    for split in ("train", "dev"):
        write(tmp_path / f"{split}-v1.1.json", squad(*questions))
    train, dev = (read(SQUAD, tmp_path, split) for split in ("train", "dev"))
    assert [(e.id, e.answers) for e in train.examples] == [
        ("whole", (Answer("Der", 0),)),
        ("half", (Answer("fließt", FLOW),)),
    ]
    for example in train.examples:
        for answer in example.answers:
            assert example.context[answer.start : answer.start + len(answer.text)] == answer.text
    assert len(train.dropped) == 4 and train.warnings == ()
    assert "train-v1.1.json question off: answer_start 1 of 'Der' points at 'er '" in train.dropped[1]
    # The scorer compares texts, so nothing is left out of an evaluation.
    assert [example.id for example in dev.examples] == ["whole", "half", "off", "negative", "beyond"]
    assert len(dev.warnings) == 4 and dev.dropped == ()
    write(tmp_path / "train-v1.1.json", squad(questions[2]))
    with pytest.raises(UserError, match=r"train-v1.1.json holds no example: .*answer_start 1 of 'Der'"):
        read(SQUAD, tmp_path, "train")


def test_squad2_knows_impossible_questions(tmp_path):
    plausible = {"plausible_answers": [{"text": "Der", "answer_start": 0}]}
    questions = [
        question("yes", ("Der", 0), is_impossible=False),
        question("no", is_impossible=True) | plausible,
        question("unsaid"),  # as the official scorer sees it
        question("none", is_impossible=False),
        question("blank", ("", 0), is_impossible=False),
    ]
    path = write(tmp_path / "dev-v2.0.json", squad(*questions))
    dataset = read(SQUAD2, tmp_path, "dev")
    assert [(e.id, e.is_impossible, len(e.answers)) for e in dataset.examples] == [
        ("yes", False, 1),
        ("no", True, 0),
        ("unsaid", True, 0),
    ]
    assert dataset.dropped == (f"{path} question none has no answer", f"{path} question blank has no answer")
    with pytest.raises(UserError, match=r"question no is unanswerable, which task squad does not know; take squad2"):
        read_file(SQUAD, path, labelled=True)
    assert len(read_file(SQUAD, path, labelled=False).examples) == 5
    write(path, squad(question("both", ("Der", 0), is_impossible=True)))
    with pytest.raises(UserError, match="question both is_impossible and has the answer 'Der'"):
        read(SQUAD2, tmp_path, "dev")


def test_two_questions_of_one_id(tmp_path):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.json", squad(question("a", ("Der", 0)), question("a", ("Der", 0))))
    assert len(read(SQUAD, tmp_path, "train").examples) == 2
    with pytest.raises(UserError, match=r"dev.json question a comes twice"):
        read(SQUAD, tmp_path, "dev")


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
        (RTE, table(PAIR, (0, "a", "b", "c", "entailment")), "FILE:2 has 5 fields, not 4"),
        (
            RTE,
            table(PAIR, (0, "a", "b", "entailment")) + "\n" + table((0, "a", "b", "entailment")),
            "FILE:3 has 1 fields",
        ),
        (RTE, (table(PAIR) + table((0, "Süd", "b", "entailment"))).encode("latin-1"), "FILE:2 is not UTF-8: byte 0xfc"),
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
    assert "\n" not in str(error.value)


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
    command = [sys.executable, "-W", "error", "-c", TFDS_SCRIPT, str(tmp_path)]
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


def test_texts_are_read_as_they_are(tmp_path):
    """Whatever a text holds but a tab and a line feed comes back, and so does its label."""
    draw = random.Random(1)
    characters = [chr(code) for code in range(32, 0x250)] + list("\"'\\,\r\x0b\u2028🙂") * 20
    texts = ["".join(draw.choices(characters, k=draw.randint(0, 30))) for _ in range(300)]
    rows = [TextExample(str(n), text, texts[-n - 1], n % 2) for n, text in enumerate(texts)]
    lines = [(row.id, row.text, row.text_pair, RTE.labels[row.label]) for row in rows]
    write(tmp_path / "RTE/train.tsv", table(PAIR, *lines))
    assert read(RTE, tmp_path, "train").examples == tuple(rows)
