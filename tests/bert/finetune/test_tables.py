"""GLUE's and SWAG's tables: quotes, headers, labels and torn rows, each as its official files have them."""

import csv
import io
import random

import pytest
from task_files import table, tuples, write

from bert_flax.finetune.examples import TextExample
from bert_flax.finetune.files import glue_tasks
from bert_flax.finetune.readers import read, read_file
from bert_flax.finetune.tables import check_fields, format_table, open_table
from bert_flax.finetune.tasks import GLUE, TASKS, custom_task
from core_flax.types import UserError

COLA, SST2, MRPC, STSB, QQP, MNLI, QNLI, RTE, WNLI = (TASKS[name] for name in GLUE)
SWAG = TASKS["swag"]


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


def test_a_header_is_not_taken_for_a_row_of_cola(tmp_path):
    """Another task's file of four columns: what is in the fourth is no sentence to predict."""
    path = write(tmp_path / "dev.tsv", table(("index", "sentence1", "sentence2", "label"), (0, "a", "b", "entailment")))
    for labelled in (True, False):
        with pytest.raises(UserError, match=r"dev.tsv:1: 'sentence1' is no label of task cola, which has 0, 1"):
            read_file(COLA, path, labelled)


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


def test_texts_are_read_as_they_are(tmp_path):
    """Whatever a text holds but a tab and a line feed comes back, and so does its label."""
    draw = random.Random(1)
    characters = [chr(code) for code in range(32, 0x250)] + list("\"'\\,\r\x0b\u2028🙂") * 20
    texts = ["".join(draw.choices(characters, k=draw.randint(0, 30))) for _ in range(300)]
    rows = [TextExample(str(n), text, texts[-n - 1], n % 2) for n, text in enumerate(texts)]
    lines = [(row.id, row.text, row.text_pair, RTE.labels[row.label]) for row in rows]
    write(tmp_path / "RTE/train.tsv", table(("index", "sentence1", "sentence2", "label"), *lines))
    assert read(RTE, tmp_path, "train").examples == tuple(rows)


# Tables of one's own

MINE = custom_task("text=text,label=label", ("x", "y"))


def test_spaces_around_the_names_of_columns(tmp_path):
    path = write(tmp_path / "a.csv", "text , label\na,x\n")
    assert tuples(read_file(MINE, path, labelled=True)) == [("0", "a", None, 0)]
    write(path, "text, text ,label\na,b,x\n")
    with pytest.raises(UserError, match="has two columns 'text'"):
        read_file(MINE, path, labelled=True)


def test_a_field_may_be_as_long_as_a_book(tmp_path):
    book = "word " * 100_000
    (row,) = read_file(MINE, write(tmp_path / "a.csv", f"text,label\n{book},y\n"), labelled=True).examples
    assert row.text == book


@pytest.mark.parametrize(("ending", "remedy"), [("csv", "stands in double quotes"), ("tsv", "can hold no tab")])
def test_how_a_torn_row_is_mended(tmp_path, ending, remedy):
    comma = {"csv": ",", "tsv": "\t"}[ending]
    path = write(tmp_path / f"a.{ending}", f"text{comma}label\na{comma}x{comma}y\n")
    with pytest.raises(UserError, match=f"a.{ending}:2 has 3 fields, not 2; mend the row: a field .*{remedy}"):
        read_file(MINE, path, labelled=True)


def test_a_column_of_ids_that_is_named_must_be_there(tmp_path):
    spec = custom_task("text=text,label=label,id=key", ("x", "y"))
    path = write(tmp_path / "a.csv", "key,text\nk7,a\n")
    assert tuples(read_file(spec, path, labelled=False)) == [("k7", "a", None, None)]
    write(path, "kye,text\nk7,a\n")
    with pytest.raises(UserError, match="has no column 'key'; its columns are 'kye', 'text'"):
        read_file(spec, path, labelled=False)


def test_what_is_written_is_read_again(tmp_path):
    rows = [("index", "prediction"), ("a, b", 'say "x"'), ("tab\there", "two\nlines"), ("", 1.5)]
    path = tmp_path / "a.csv"
    path.write_text(format_table(path, rows), encoding="utf-8")
    found = open_table(path, "prediction")
    assert [found.names, *(tuple(row) for _, row in found.rows)] == [tuple(map(str, row)) for row in rows]
    assert format_table(tmp_path / "a.tsv", rows[:2]) == 'index\tprediction\na, b\tsay "x"\n'
    check_fields(path, ["tab\there", "two\nlines"])
    check_fields(tmp_path / "a.tsv", ["a, b", 'say "x"', ""])
    for field in rows[2]:
        with pytest.raises(UserError, match=r"holds a tab or a line break, which a TSV cannot; .* end in \.csv"):
            check_fields(tmp_path / "a.tsv", ["a", field])


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
    (tmp_path / "test.csv").rename(tmp_path / "TEST.CSV")
    assert len(read_file(SWAG, tmp_path / "TEST.CSV", labelled=False).examples) == 1


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
