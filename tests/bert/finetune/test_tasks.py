import dataclasses
import json
import subprocess
import sys

import pytest

from bert_flax.finetune.files import find_file
from bert_flax.finetune.readers import find_labels, read
from bert_flax.finetune.tasks import GLUE, TASKS, Columns, custom_task
from core_flax.types import UserError

TFDS_GLUE = """
import json
from tensorflow_datasets.text.glue import Glue
print(json.dumps([
    [config.name, config.data_dir, config.label_classes, config.label_column, config.text_features]
    for config in Glue.BUILDER_CONFIGS
]))
"""


@pytest.fixture(scope="module")
def tfds_glue():
    """GLUE as TensorFlow Datasets defines it, in another process because it imports much."""
    done = subprocess.run([sys.executable, "-c", TFDS_GLUE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("name", GLUE)
def test_glue_is_what_tfds_says(tfds_glue, name):
    folder, labels, label_column, texts = tfds_glue[name]
    spec = TASKS[name]
    assert spec.folder == folder
    if spec.kind == "regression":
        assert labels is None and spec.labels == () and spec.score_range == (0, 5)
    elif spec.labels == ("0", "1"):
        assert len(labels) == 2  # its names for the numbers in the files
    else:
        assert list(spec.labels) == labels
    columns = [spec.columns.text] + [spec.columns.text_pair] * (len(texts) == 2)
    assert list(spec.tfds_texts or columns) == list(texts)
    if name != "mrpc":  # which TFDS makes from Microsoft's files
        assert columns == list(texts.values())
    if name != "cola":  # whose train file has no header
        assert spec.columns.label == label_column


def test_every_task_is_whole():
    assert tuple(name for name in TASKS if TASKS[name].folder) == GLUE
    for name, spec in TASKS.items():
        assert spec.name == name
        assert {"train", "dev"} <= set(spec.files) & set(spec.labelled_splits)
        assert spec.primary in spec.metrics or spec.metrics in (("squad",), ("ner",))
        assert (spec.kind in ("regression", "span")) == (not spec.labels)


def test_the_papers_recipes():
    """Sections 4.1 to 4.4 of arXiv 1810.04805."""
    recipes = {name: (spec.epochs, spec.learning_rate, spec.batch_size) for name, spec in TASKS.items()}
    assert recipes["squad"] == (3, 5e-5, 32)
    assert recipes["squad2"] == (2, 5e-5, 48)
    assert recipes["swag"] == (3, 2e-5, 16)
    for name in GLUE:
        epochs, learning_rate, batch_size = recipes[name]
        assert (epochs, batch_size) == (3, 32) and learning_rate in (5e-5, 4e-5, 3e-5, 2e-5)


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "train.csv").write_text('words,kind,other\n"a, b",good,1\nc,bad,2\n"say ""d""",neither,3\n')
    (tmp_path / "valid.csv").write_text("kind,words\nneither,e\n")
    columns = "text=words,label=kind"
    labels = find_labels(columns, tmp_path)
    assert labels == ("bad", "good", "neither")
    spec = custom_task(columns, labels)
    train, dev = (read(spec, tmp_path, split).examples for split in ("train", "dev"))
    assert [(e.id, e.text, e.text_pair, e.label) for e in train] == [
        ("0", "a, b", None, 1),
        ("1", "c", None, 0),
        ("2", 'say "d"', None, 2),
    ]
    assert [(e.text, e.label) for e in dev] == [("e", 2)]


def test_a_regression_of_ones_own(tmp_path):
    (tmp_path / "train.tsv").write_text('key\ta\tb\tscore\nx7\t"one\ttwo\t-3.5\ny8\tthree"\tfour\t1e2\n')
    spec = custom_task("text=b,text-pair=a,label=score,id=key", regression=True)
    assert spec.kind == "regression" and spec.primary == "spearman"
    assert spec.columns == Columns("b", "a", "score", "key", needs_id=True)
    examples = read(spec, tmp_path, "train").examples
    assert [dataclasses.astuple(example) for example in examples] == [
        ("x7", "two", '"one', -3.5),
        ("y8", "four", 'three"', 100.0),
    ]
    for score in ("nan", "1e39", "-inf", "good"):
        (tmp_path / "train.tsv").write_text(f"key\ta\tb\tscore\nx7\tone\ttwo\t{score}\n")
        with pytest.raises(UserError, match=f"train.tsv:2: '{score}' is no score of task custom; it takes numbers$"):
            read(spec, tmp_path, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("text=words", "names no label"),
        ("label=kind", "names no text"),
        ("", "'' is not one ROLE=COLUMN"),
        ("text=words,label", "'label' is not one ROLE=COLUMN"),
        ("text=words,labels=kind", "'labels=kind' is not one ROLE=COLUMN with a role out of text, text_pair, label"),
        ("text=a,text=b,label=kind", "'text=b' is not one ROLE=COLUMN"),
        ("text=,label=kind", "'text=' is not one ROLE=COLUMN"),
        ("text=words,label=kind, of", "'of' is not one ROLE=COLUMN"),
        ("text=words,label=words", "column 'words' is both a text and the label to tell from it"),
        ("text=words,text_pair=kind,label=kind", "column 'kind' is both a text and the label to tell from it"),
    ],
)
def test_columns_that_cannot_be(columns, message):
    with pytest.raises(UserError, match=message):
        custom_task(columns)


def test_a_column_with_a_comma_in_its_name(tmp_path):
    (tmp_path / "train.csv").write_text('"words, all",kind=\na,x\nb,y\n')
    columns = '"text=words, all", label=kind='
    spec = custom_task(columns, find_labels(columns, tmp_path))
    assert [(e.text, e.label) for e in read(spec, tmp_path, "train").examples] == [("a", 0), ("b", 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words\tkind\na\tx\nb\tx\n", "column 'kind' holds no two labels (x)"),
        ("words\tkind\n", "column 'kind' holds no two labels (no rows)"),
        ("words\tkind\na\tx\nb\t\n", "train.tsv:3 has an empty label"),
        ("words\tkind\na\tx\nb\n", "train.tsv:3 has 1 field, not 2"),
        ("words\tclass\na\tx\n", "train.tsv has no column 'kind'; its columns are 'words', 'class'"),
    ],
)
def test_labels_that_cannot_be_found(tmp_path, content, message):
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(UserError) as error:
        find_labels("text=words,label=kind", tmp_path)
    assert message in str(error.value)


def test_a_split_that_could_be_two_files(tmp_path):
    for name in ("dev.tsv", "valid.csv"):
        (tmp_path / name).write_text("text\tlabel\n")
    with pytest.raises(UserError, match=r"dev.tsv and .*valid.csv could both be the dev split"):
        find_file(custom_task("text=text,label=label"), tmp_path, "dev")
