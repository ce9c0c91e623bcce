import gzip
import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from core_flax.data import corpora
from core_flax.data.corpora import read_parts
from core_flax.types import UserError

TEXT = "\n\nFirst one.\nStill first.\n  \n\nSecond.\n\nThird,\nlast"


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def documents(parts):
    """Whole documents, from parts that must follow each other."""
    found = []
    open_document = False
    for part in parts:
        if open_document:
            found[-1] += part.text
        else:
            assert part.document == len(found)
            found.append(part.text)
        open_document = not part.last
        assert part.document == len(found) - 1
        assert part.text.strip()
    assert not open_document
    return found


def test_blank_lines_separate_documents(tmp_path):
    name = write(tmp_path / "a.txt", TEXT)
    parts = list(read_parts([name]))
    assert documents(parts) == ["First one.\nStill first.\n", "Second.\n", "Third,\nlast"]
    assert [part.where for part in parts] == [f"{name}:3", f"{name}:7", f"{name}:9"]


def test_a_file_is_a_document(tmp_path):
    names = [write(tmp_path / "a.any", TEXT), write(tmp_path / "b", "Other.\n\n\n\n")]
    assert documents(read_parts(names, "file")) == [
        "First one.\nStill first.\n\nSecond.\n\nThird,\nlast",
        "Other.\n\n",
    ]


def test_a_matching_line_starts_a_document(tmp_path):
    name = write(tmp_path / "a.txt", "Preface.\n\n= One =\n\nText = a.\n= Two =\nText b.\n\nMore.")
    assert documents(read_parts([name], document_start=r"= .* =$")) == [
        "Preface.\n\n",
        "= One =\n\nText = a.\n",
        "= Two =\nText b.\n\nMore.",
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_jsonl_and_gzip(tmp_path, pack):
    lines = [{"text": "One.\n\nTwo."}, {"text": "", "id": 3}, {"title": "x", "text": "Grüße 今日"}]
    data = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    for names in (("a.jsonl", "b.txt"), ("a.JSONL", "b.TXT")):
        ending = ".gz" * (pack is not bytes)
        ending = ending.upper() if names[0].endswith("JSONL") else ending
        jsonl = write(tmp_path / (names[0] + ending), pack(data.encode()))
        plain = write(tmp_path / (names[1] + ending), pack(TEXT.encode()))
        parts = list(read_parts([jsonl, plain]))
        assert documents(parts)[:2] == ["One.\n\nTwo.", "Grüße 今日"]
        assert len(documents(parts)) == 5
        assert [part.where for part in parts[:3]] == [f"{jsonl}:1", f"{jsonl}:3", f"{plain}:3"]


def test_byte_order_mark_and_windows_lines(tmp_path):
    name = write(tmp_path / "a.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo.\r\n")
    assert documents(read_parts([name])) == ["One.\r\n", "Two.\r\n"]


def test_only_newlines_end_lines(tmp_path):
    name = write(tmp_path / "a.txt", "One\u2028two\x0b\x85three\n")
    assert documents(read_parts([name])) == ["One\u2028two\x0b\x85three\n"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_long_documents_come_in_parts(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(corpora, "_PART_BYTES", 1000)
    long = "".join(f"Line {number} of a long document, größer.\n" + "\n" * (number % 7 == 0) for number in range(500))
    text = f"Short one.\n{long}" if suffix == "jsonl" else f"= Short one.\n= {long}= Last."
    data = text if suffix == "txt" else f"{json.dumps({'text': text})}\n{json.dumps({'text': 'x'})}"
    parts = list(read_parts([write(tmp_path / f"a.{suffix}", data)], document_start="= "))
    assert max(len(part.text) for part in parts) <= 1100
    assert len(parts) > 15
    assert "".join("".join(documents(parts)).split()) == "".join((text + "x" * (suffix == "jsonl")).split())
    assert len(documents(parts)) == (2 if suffix == "jsonl" else 3)


def test_long_lines_are_cut_between_words_or_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_PART_BYTES", 1000)
    words = "wörter " * 2000
    characters = "字" * 3001
    parts = list(read_parts([write(tmp_path / "a.txt", f"{words}\n{characters}\nEnd.\n")]))
    assert len(documents(parts)) == 1
    assert max(len(part.text.encode()) for part in parts) < 4000
    text = "".join(part.text for part in parts)
    assert set(text[: len(words)].split()) == {"wörter"}
    assert "".join(text.split()) == "".join((words + characters + "End.").split())


def test_memory_does_not_grow_with_the_file(tmp_path):
    one_line = tmp_path / "line.txt.gz"
    with gzip.open(one_line, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b"word " * 200_000)
    tracemalloc.start()
    num_parts = sum(1 for _ in read_parts([str(one_line)], "file"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_parts >= 20
    assert peak < 12e6  # of 40 MB


def test_progress_counts_the_stored_bytes(tmp_path):
    names = [write(tmp_path / "a.txt", TEXT * 9), write(tmp_path / "b.gz", gzip.compress(TEXT.encode() * 1000))]
    told = []
    list(read_parts(names, progress=told.append))
    assert sum(told) == corpora.stored_bytes(names) == sum((tmp_path / n).stat().st_size for n in ("a.txt", "b.gz"))


def test_python_documentation():
    parts = list(read_parts(["python:docs"]))
    texts = documents(parts)
    assert len(texts) > 70
    assert sum(map(len, texts)) > 300_000
    assert not any(line and not line.strip("*=~^+-| ") for text in texts for line in text.split("\n"))
    assert any(text.startswith('The "assert" statement\n') for text in texts)
    assert corpora.stored_bytes(["python:docs"]) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("absent.txt", None, "absent.txt does not exist"),
        ("empty.txt", "", "empty.txt holds no text"),
        ("blank.txt", " \n\n\t\n", "blank.txt holds no text"),
        (
            "packed.txt",
            gzip.compress(b"text " * 50, mtime=0),
            "packed.txt is no text but gzipped; .* ends in .gz",
        ),
        ("wide.txt", "Grüße".encode("utf-16"), "wide.txt:1 is not UTF-8: byte 0xff .*iconv -f UTF-16"),
        ("latin.txt", b"ascii\nGr\xfc\xdfe\n", "latin.txt:2 is not UTF-8: byte 0xfc at position 3 .*iconv"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "bad.jsonl:2 is not valid JSON"),
        (
            "other.jsonl",
            '{"body": "a", "id": 1}\n',
            r"other.jsonl:1 has no string in the field 'text' \(found: body, id",
        ),
        ("number.jsonl", '{"text": 3}\n', "number.jsonl:1 has no string in the field 'text'"),
        ("list.jsonl", "[1]\n", "list.jsonl:1 has no string in the field 'text'"),
        ("half.jsonl", '{"text": "a\\ud800"}\n', "half.jsonl:1 holds half of a surrogate pair"),
        ("cut.txt.gz", gzip.compress(b"text\n" * 10_000, mtime=0)[:-20], "cut.txt.gz is not a whole gzip file"),
        ("plain.txt.gz", "no gzip\n", "plain.txt.gz is not a whole gzip file"),
        ("folder/x.txt", "a\n", "folder is a folder; name the files in it"),
    ],
)
def test_bad_input_is_named(tmp_path, name, data, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if data is not None:
        write(path, data)
    asked = path.parent if name.startswith("folder") else path
    with pytest.raises(UserError, match=message):
        list(read_parts([str(asked)]))


def test_bad_regular_expression_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--document-start '\(' is not a regular expression"):
        list(read_parts([write(tmp_path / "a.txt", "a")], document_start="("))


def test_too_long_json_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_JSON_LINE_BYTES", 1 << 20)
    name = write(tmp_path / "a.jsonl", json.dumps({"text": "word " * 300_000}))
    with pytest.raises(UserError, match=r"a.jsonl:1 is longer than 1 MiB"):
        list(read_parts([name]))


def test_lines_come_through_a_pipe_and_text_to_prepare_does_not():
    read, write_end = os.pipe()
    os.write(write_end, b"one\ntwo\n")
    os.close(write_end)
    assert list(corpora.read_lines(f"/dev/fd/{read}")) == [(1, "one"), (2, "two")]
    with pytest.raises(UserError, match=r"is no file but a pipe or a device, and is read more than once"):
        corpora.stored_bytes([f"/dev/fd/{read}"])
    os.close(read)


def test_a_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed; give a file"):
        list(corpora.read_lines("-"))


TFDS_SCRIPT = """
import os, sys
os.environ["TFDS_DATA_DIR"] = sys.argv[1]
import tensorflow_datasets as tfds
from core_flax.data import corpora
from core_flax.types import UserError

class TinyPages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "title": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        return {"train": self._pages(20), "test": self._pages(3)}
    def _pages(self, count):
        for number in range(count):
            yield number, {"text": f"Seite {number} groß.\\n\\nNächster Absatz.", "title": str(number)}
    def _generate_examples(self):
        pass

TinyPages(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
del tfds.core.registered._DATASET_REGISTRY["tiny_pages"]  # from here on it is known by its files alone
expected = lambda count: {f"Seite {number} groß.\\n\\nNächster Absatz." for number in range(count)}
for name, count in {"tfds:tiny_pages": 20, "tfds:tiny_pages:train": 20, "tfds:tiny_pages:test": 3}.items():
    parts = list(corpora.read_parts([name]))
    assert len(parts) == count and {part.text for part in parts} == expected(count), name
assert len(list(corpora.read_parts(["tfds:tiny_pages:train[:25%]"]))) == 5
assert corpora.identify("tfds:tiny_pages:test")["dataset"] == "tiny_pages/1.0.0"
assert corpora.stored_bytes(["tfds:tiny_pages"]) is None
for name in ("tfds:tiny_pages:nosplit", "tfds:no_such_dataset", "tfds:c4/no_such_config", "tfds:mnist", "tfds:../x"):
    try:
        list(corpora.read_parts([name]))
        raise SystemExit(f"{name} raised nothing")
    except UserError as error:
        print(error)
assert not {"tensorflow", "jax"} & set(sys.modules)
"""


def test_tfds_without_tensorflow(tmp_path):
    """A dataset that TFDS itself wrote in array_record format; in a process of its own to see what it imports."""
    # With the protobuf that Beam asks for, TFDS calls what protobuf is going to remove.
    warnings = ["-W", "error", "-W", "ignore:label() is deprecated:DeprecationWarning"]
    command = [sys.executable, *warnings, "-c", TFDS_SCRIPT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    split, dataset, config, field, name = result.stdout.splitlines()[-5:]
    assert "Unknown split 'nosplit'" in split
    assert "no_such_dataset cannot be had" in dataset
    assert "no_such_config" in config
    assert "tfds:mnist has no field 'text' (it has image, label)" in field
    assert "is not the name of a dataset" in name
