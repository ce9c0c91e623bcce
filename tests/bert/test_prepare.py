import dataclasses
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bert_flax import vocabulary_sample
from bert_flax.prepare import PrepareConfig, prepare
from core_flax.data.records import Manifest, PassageStore
from core_flax.text.wordpiece import SPECIALS, WordPiece
from core_flax.types import UserError

PHRASE = "the of river mountain people north city small great built water and in was by under lower stone"
WORDS = PHRASE.split(" ")


def make_text(num_documents=40, seed=0, sentences=(2, 12)):
    """Documents separated by blank lines, one sentence a line."""
    rng = random.Random(seed)

    def sentence():
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
        return f"{words.capitalize()} {rng.randrange(99)}."

    return "\n\n".join("\n".join(sentence() for _ in range(rng.randint(*sentences))) for _ in range(num_documents))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text())
    return path


def configure(tmp_path, *inputs, **settings):
    defaults = {"output": str(tmp_path / "out"), "vocab_size": 200, "num_workers": 1}
    return PrepareConfig(tuple(map(str, inputs)), **{**defaults, **settings})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored_sentences(folder, split):
    """Sentences of each document of a split, as token ids."""
    store = PassageStore(folder, split)
    documents = [[] for _ in range(store.info.documents)]
    found = store.read(np.arange(len(store)))
    for number, document in enumerate(store.document):
        sentences = range(found.first_sentence[number], found.first_sentence[number + 1])
        documents[document] += [
            found.tokens[found.begin(np.array([s]))[0] : found.sentence_ends[s]].tolist() for s in sentences
        ]
    return documents


def test_the_text_arrives_as_it_was(tmp_path, text_file):
    manifest = prepare(configure(tmp_path, text_file, valid_fraction=0.1))
    vocabulary = WordPiece.load(tmp_path / "out" / "vocab.txt")
    assert vocabulary.fingerprint == manifest.fingerprint and vocabulary.num_tokens == manifest.num_tokens
    expected = [vocabulary.encode(document.split("\n")) for document in text_file.read_text().split("\n\n")]
    train, valid = (stored_sentences(tmp_path / "out", split) for split in ("train", "valid"))
    assert len(train) + len(valid) == len(expected) == 40
    assert [document for document in expected if document in train] == train
    assert [document for document in expected if document in valid] == valid
    assert manifest.splits["train"].documents == len(train)
    assert manifest.splits["valid"].tokens == sum(len(sentence) for document in valid for sentence in document)
    assert manifest == Manifest.load(tmp_path / "out")


def test_the_manifest_describes_every_file(tmp_path, text_file):
    manifest = prepare(configure(tmp_path, text_file))
    found = contents(tmp_path / "out")
    assert set(found) == {*manifest.files, "manifest.json"}
    for name, about in manifest.files.items():
        assert about["bytes"] == len(found[name])
        assert about["sha256"] == hashlib.sha256(found[name]).hexdigest()


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, text_file, monkeypatch):
    monkeypatch.setattr("bert_flax.prepare._BLOCK_CHARACTERS", 2000)
    folders = {}
    for num_workers in (1, 2, 3):
        config = configure(tmp_path, text_file, output=str(tmp_path / f"out{num_workers}"), num_workers=num_workers)
        prepare(config)
        folders[num_workers] = contents(tmp_path / f"out{num_workers}")
    assert folders[1] == folders[2] == folders[3]


@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.5])
def test_held_out_tokens_are_the_share_asked_for(tmp_path, fraction):
    path = tmp_path / "text.txt"
    path.write_text(make_text(num_documents=600))
    splits = prepare(configure(tmp_path, path, valid_fraction=fraction)).splits
    share = splits["valid"].tokens / (splits["valid"].tokens + splits["train"].tokens)
    assert abs(share - fraction) < 0.01
    again = prepare(configure(tmp_path, path, valid_fraction=0.0, output=str(tmp_path / "whole"))).splits
    assert again["valid"].documents == 0
    assert again["train"].tokens == splits["train"].tokens + splits["valid"].tokens


@pytest.mark.parametrize("count", [4, 5, 9])
def test_both_splits_have_two_documents_at_least(tmp_path, count):
    path = tmp_path / "text.txt"
    path.write_text(make_text(count))
    splits = prepare(configure(tmp_path, path)).splits
    assert min(splits["train"].documents, splits["valid"].documents) >= 2


def test_sentences_and_documents_of_prose(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"= Title {n} =\n\nOne sentence here. Another\none there.\n\nA third.\n" for n in range(4)))
    config = configure(tmp_path, path, document_start="= ", valid_fraction=0.0)
    assert prepare(config).splits["train"].sentences == 4 * 4
    lines = prepare(dataclasses.replace(config, sentences="line", output=str(tmp_path / "lines")))
    assert lines.splits["train"].sentences == 4 * 4
    decoded = WordPiece.load(tmp_path / "out" / "vocab.txt")
    first = [decoded.decode(sentence) for sentence in stored_sentences(tmp_path / "out", "train")[0]]
    assert first == ["= title 0 =", "one sentence here .", "another one there .", "a third ."]


@pytest.mark.parametrize(("policy", "documents", "dropped"), [("drop", 5, 1), ("keep", 6, 0)])
def test_documents_of_one_sentence(tmp_path, policy, documents, dropped):
    path = tmp_path / "text.txt"
    path.write_text(make_text(3) + "\n\nLonely river of stone.\n\n" + make_text(2, seed=1))
    with pytest.raises(UserError, match=r"text.txt:\d+: the document has one sentence only.*documents drop"):
        prepare(configure(tmp_path, path))
    assert not (tmp_path / "out").exists()
    manifest = prepare(configure(tmp_path, path, single_sentence_documents=policy, valid_fraction=0.0))
    assert (manifest.splits["train"].documents, manifest.dropped_documents) == (documents, dropped)
    sentences = stored_sentences(tmp_path / "out", "train")
    assert all(len(document) >= 2 for document in sentences)
    if policy == "keep":
        vocabulary = WordPiece.load(tmp_path / "out" / "vocab.txt")
        assert [vocabulary.decode(half) for half in sentences[3]] == ["lonely river of", "stone ."]


def test_only_sentences_with_tokens_count(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(make_text(4) + "\n\nOne sentence.\n\x07\n")
    with pytest.raises(UserError, match="one sentence only"):
        prepare(configure(tmp_path, path, sentences="line"))


def test_a_document_is_whole_when_its_sentences_are_counted(tmp_path, monkeypatch):
    """Two parts of one sentence each, at the end of a block."""
    monkeypatch.setattr("bert_flax.prepare._BLOCK_CHARACTERS", 1000)
    monkeypatch.setattr("core_flax.data.corpora._PART_BYTES", 1000)
    path = tmp_path / "text.txt"
    path.write_text(make_text(4) + f"\n\n{'river ' * 200}\n{'stone ' * 200}\n")
    manifest = prepare(configure(tmp_path, path, sentences="line", valid_fraction=0.0))
    assert manifest.splits["train"].documents == 5


@pytest.mark.parametrize("policy", ["refuse", "drop"])
@pytest.mark.parametrize("num_parts", range(3, 8))
def test_the_last_part_of_a_long_document_is_not_one_by_itself(tmp_path, monkeypatch, policy, num_parts):
    """A sentence of its own part after many full parts: among others, as the first part after a full block."""
    monkeypatch.setattr("bert_flax.prepare._BLOCK_CHARACTERS", 2000)
    monkeypatch.setattr("core_flax.data.corpora._PART_BYTES", 1000)
    full = f"{'river ' * 99}.\n{'stone ' * 99}.\n"
    path = tmp_path / "text.txt"
    path.write_text(full * num_parts + "Lonely river.\n\n" + make_text(3))
    config = configure(tmp_path, path, sentences="line", valid_fraction=0.0, single_sentence_documents=policy)
    manifest = prepare(config)
    assert (manifest.splits["train"].documents, manifest.dropped_documents) == (4, 0)
    first = stored_sentences(tmp_path / "out", "train")[0]
    assert len(first) == 2 * num_parts + 1
    assert WordPiece.load(tmp_path / "out" / "vocab.txt").decode(first[-1]) == "lonely river ."


def test_a_long_document_without_tokens_is_dropped_once(tmp_path, monkeypatch):
    monkeypatch.setattr("bert_flax.prepare._BLOCK_CHARACTERS", 2000)
    monkeypatch.setattr("core_flax.data.corpora._PART_BYTES", 1000)
    path = tmp_path / "text.txt"
    path.write_text(make_text(3) + "\n\n" + ("\x07" * 99 + "\n") * 200 + "\n" + make_text(2))
    manifest = prepare(configure(tmp_path, path, sentences="line", valid_fraction=0.0))
    assert (manifest.splits["train"].documents, manifest.dropped_documents) == (5, 1)


def test_a_given_vocabulary_is_used(tmp_path, text_file):
    vocabulary = WordPiece([*SPECIALS, *WORDS, "."], lowercase=False)
    vocabulary.save(tmp_path / "vocab.txt")
    config = configure(tmp_path, text_file, vocab=str(tmp_path / "vocab.txt"), lowercase=False, vocab_size=30522)
    manifest = prepare(config)
    assert manifest.fingerprint == vocabulary.fingerprint and not manifest.lowercase
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()
    store = PassageStore(tmp_path / "out", "train")
    assert store.unigram[vocabulary.unk_id] > 0 and store.unigram.sum() == store.info.tokens


def test_long_documents_lose_nothing(tmp_path, monkeypatch):
    """A document in several parts and several blocks stays one document."""
    monkeypatch.setattr("bert_flax.prepare._BLOCK_CHARACTERS", 3000)
    monkeypatch.setattr("core_flax.data.corpora._PART_BYTES", 1000)
    path = tmp_path / "text.txt"
    path.write_text(make_text(5) + "\n\n" + make_text(1, sentences=(700, 700)) + "\n\n" + make_text(5, seed=2))
    manifest = prepare(configure(tmp_path, path, valid_fraction=0.0, sentences="line"))
    vocabulary = WordPiece.load(tmp_path / "out" / "vocab.txt")
    expected = [vocabulary.encode(document.split("\n")) for document in path.read_text().split("\n\n")]
    assert stored_sentences(tmp_path / "out", "train") == expected
    assert manifest.splits["train"].documents == 11


def test_gzip_and_several_files_and_jsonl(tmp_path, text_file):
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(make_text(10, seed=5).encode()))
    records_ = [json.dumps({"text": document}) for document in make_text(10, seed=6).split("\n\n")]
    (tmp_path / "c.jsonl").write_text("\n".join(records_))
    config = configure(tmp_path, text_file, tmp_path / "b.txt.gz", tmp_path / "c.jsonl", valid_fraction=0.0)
    assert prepare(config).splits["train"].documents == 60


def test_the_text_that_python_ships(tmp_path):
    splits = prepare(configure(tmp_path, "python:docs", vocab_size=2000, valid_fraction=0.05)).splits
    assert splits["train"].documents + splits["valid"].documents > 70
    assert splits["train"].tokens > 60_000


def test_done_already_and_what_differs(tmp_path, text_file):
    config = configure(tmp_path, text_file)
    manifest = prepare(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(dataclasses.replace(config, num_workers=2)) == manifest
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"is prepared already, but with another valid_fraction;.*--overwrite"):
        prepare(dataclasses.replace(config, valid_fraction=0.3))
    text_file.write_text(make_text(50))
    with pytest.raises(UserError, match=r"is prepared already, but with another input;.*--overwrite"):
        prepare(config)
    assert Manifest.load(tmp_path / "out") == manifest
    assert prepare(dataclasses.replace(config, overwrite=True)).splits["train"].documents > 45


def test_a_damaged_folder_is_not_taken_for_done(tmp_path, text_file):
    config = configure(tmp_path, text_file)
    prepare(config)
    (tmp_path / "out" / "train-00000-of-00001.arrayrecord").unlink()
    with pytest.raises(UserError, match=r"arrayrecord is missing; run prepare again with --overwrite"):
        prepare(config)


RUN = """
import signal, sys
import bert_flax.prepare
from bert_flax.prepare import PrepareConfig, prepare
from core_flax.types import UserError
import bert_flax.prepare
bert_flax.prepare._BLOCK_CHARACTERS = 20_000
if __name__ == "__main__":
    limit = int(sys.argv[4])
    if limit:
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        print("started", flush=True)
        prepare(PrepareConfig((sys.argv[1],), sys.argv[2], vocab=sys.argv[3], num_workers=int(sys.argv[5])))
    except UserError as error:
        print("UserError:", error)
        sys.exit(2)
"""


def run_script(tmp_path, text, vocab, limit=0, num_workers=1):
    (tmp_path / "run.py").write_text(RUN)
    arguments = [str(tmp_path / "run.py"), str(text), str(tmp_path / "out"), str(vocab), str(limit), str(num_workers)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def large(tmp_path):
    """Text of some megabytes and a vocabulary."""
    (tmp_path / "large.txt").write_text("\n\n".join([make_text(2000)] * 2))
    WordPiece([*SPECIALS, *WORDS, *".0123456789"]).save(tmp_path / "vocab.txt")
    return tmp_path / "large.txt", tmp_path / "vocab.txt"


def test_killed_and_run_again(tmp_path, large):
    folder = tmp_path / "out"
    with run_script(tmp_path, *large, num_workers=2) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("train-00000.arrayrecord.partial")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert list(folder.iterdir()), "killed in the middle"
    with pytest.raises(UserError, match="not complete"):
        PassageStore(folder, "train")
    with run_script(tmp_path, *large, num_workers=2) as process:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert PassageStore(folder, "train").info.documents > 3_000


@pytest.mark.parametrize("limit", [2000, 100_000])
def test_a_full_disk_leaves_nothing(tmp_path, large, limit):
    """No file may be larger than the limit: writing fails like on a full disk."""
    with run_script(tmp_path, *large, limit=limit) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "UserError: cannot write" in output
    assert not (tmp_path / "out").exists()


def test_the_sample_for_the_vocabulary_is_bounded_and_even():
    slices = [f"{number:6d}" for number in range(10_000)]
    drawn = list(map(int, vocabulary_sample._thin(slices, 6000)))
    assert 500 <= len(drawn) <= 1000
    assert len(set(np.diff(drawn))) == 1 and drawn[-1] > 9900
    assert vocabulary_sample._thin(slices[:1000], 6000) == slices[:1000]


def test_many_different_words_make_the_sample_smaller(tmp_path, monkeypatch):
    """Memory grows with them. The count behind it is an estimate."""
    rng = random.Random(0)
    texts = [" ".join(f"W{rng.randrange(40_000)}" for _ in range(1000)) for _ in range(100)]
    exact = len({word for text in texts for word in text.split()})
    assert abs(vocabulary_sample._count_words(texts) / exact - 1) < 0.02
    assert vocabulary_sample._count_words([]) == 0

    samples = []
    monkeypatch.setattr("bert_flax.vocabulary_sample._MAX_WORDS", 15_000)
    monkeypatch.setattr("core_flax.text.wordpiece.train", lambda sample, *_: samples.append(sample))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts))
    with pytest.raises(AttributeError):  # no vocabulary came back
        prepare(configure(tmp_path, path))
    different = len({word for text in samples[0] for word in text.split()})
    assert 0.5 * 15_000 < different <= 1.02 * 15_000
