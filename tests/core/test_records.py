import pickle
import random
import threading

import numpy as np
import pytest

from core_flax.data import records, shards
from core_flax.data.folder import MANIFEST, describe_file, token_type
from core_flax.data.records import Manifest, PassageStore, SplitWriter, pack_passages
from core_flax.types import UserError

NUM_TOKENS = 1000


def random_documents(count, seed=0, num_tokens=NUM_TOKENS):
    rng = random.Random(seed)
    lengths = [1, 2, 9, 30, 200, 1500]
    return [
        [[rng.randrange(num_tokens) for _ in range(rng.choice(lengths))] for _ in range(rng.randint(2, 40))]
        for _ in range(count)
    ]


def write_folder(directory, documents, num_tokens=NUM_TOKENS):
    """A complete folder whose split ``train`` holds the documents and whose split ``valid`` is empty."""
    directory.mkdir(exist_ok=True)
    (directory / records.VOCAB).write_text("[PAD]\n")
    files = {records.VOCAB: describe_file(directory / records.VOCAB)}
    splits = {}
    for split in records.SPLITS:
        writer = SplitWriter(directory, split, num_tokens)
        for sentences in documents if split == "train" else []:
            writer.write(pack_passages(sentences, token_type(num_tokens)), new_document=True)
        splits[split], new = writer.finish()
        files |= new
    Manifest("fingerprint", num_tokens, True, splits, files, 0, {}).save(directory)
    return directory


def sentences_of(passages, number):
    ends = passages.sentence_ends[passages.first_sentence[number] : passages.first_sentence[number + 1]]
    begins = [passages.first_token[number], *ends[:-1]]
    return [passages.tokens[begin:end].tolist() for begin, end in zip(begins, ends, strict=True)]


@pytest.mark.parametrize("num_tokens", [NUM_TOKENS, 70_000])
def test_what_is_written_is_read(tmp_path, num_tokens, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    documents = random_documents(30, num_tokens=num_tokens)
    store = PassageStore(write_folder(tmp_path / "data", documents, num_tokens), "train")
    assert len(list(tmp_path.glob("data/train-*-of-*.arrayrecord"))) > 5
    assert not list(tmp_path.glob("data/*.partial"))
    found = store.read(np.arange(len(store)))
    by_document = [[] for _ in documents]
    for number, document in enumerate(store.document):
        by_document[document] += sentences_of(found, number)
    for written, read in zip(documents, by_document, strict=True):
        pieces = [sentence[at : at + 1024] for sentence in written for at in range(0, len(sentence), 1024)]
        assert read == pieces
    flat = [token for sentences in documents for sentence in sentences for token in sentence]
    assert store.unigram.tolist() == np.bincount(flat, minlength=num_tokens).tolist()
    info = store.info
    assert (info.documents, info.passages, info.tokens) == (len(documents), len(store), len(flat))
    assert info.sentences == sum(map(len, by_document)) == store.num_sentences.sum()
    assert np.array_equal(store.num_tokens, np.diff(found.first_token))


def test_random_access_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    store = PassageStore(write_folder(tmp_path / "data", random_documents(30)), "train")
    everything = store.read(np.arange(len(store)))
    wanted = np.array([7, 0, len(store) - 1, 7, 3])
    found = store.read(wanted)
    for row, number in enumerate(wanted):
        assert sentences_of(found, row) == sentences_of(everything, number)
    assert store._records._reader(2) is store._records._reader(2), "shards stay open"
    begins = found.begin(np.arange(len(found.sentence_ends) + 1))
    assert begins.tolist() == [0, *found.sentence_ends]


def test_threads_and_copies_read_the_same(tmp_path):
    store = PassageStore(write_folder(tmp_path / "data", random_documents(20)), "train")
    expected = store.read(np.arange(len(store))).tokens
    copy = pickle.loads(pickle.dumps(store))
    found = []

    def read(which):
        found.extend(which.read(np.arange(len(store))).tokens for _ in range(20))

    threads = [threading.Thread(target=read, args=(which,)) for which in (store, store, copy)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60 and all(np.array_equal(tokens, expected) for tokens in found)


def test_passages_are_bounded_and_have_a_next_sentence():
    for sentences in random_documents(200, seed=1):
        for record in pack_passages(sentences, token_type(NUM_TOKENS)):
            assert record.num_sentences >= 2
            assert record.num_tokens <= records.PASSAGE_TOKENS + records.MAX_SENTENCE_TOKENS


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([1], []),
        ([2], [[1, 1]]),
        ([9], [[5, 4]]),
        ([3, 1], [[3, 1]]),
        ([2500], [[1024, 1024, 452]]),
        ([1000] * 4, [[1000] * 4]),
        ([1024] * 4, [[1024] * 4]),
        ([1000] * 5, [[1000] * 3, [1000] * 2]),
        ([1000] * 6, [[1000] * 4, [1000] * 2]),
    ],
)
def test_where_passages_are_cut(lengths, expected):
    packed = pack_passages([[5] * length for length in lengths], token_type(NUM_TOKENS))
    assert [np.frombuffer(r.data, "<u2", r.num_sentences, 4).tolist() for r in packed] == expected
    assert [r.num_tokens for r in packed] == list(map(sum, expected))


def test_a_document_may_come_in_pieces(tmp_path):
    writer = SplitWriter(tmp_path, "train", NUM_TOKENS)
    one, two = ([pack_passages([[n] * 3, [n]], token_type(NUM_TOKENS)) for n in (1, 2)][i] for i in (0, 1))
    for passages, new in ((one, True), (two, False), (two, True)):
        writer.write(passages, new)
    info, _ = writer.finish()
    assert (info.documents, info.passages) == (2, 3)
    assert np.load(tmp_path / "train.index.npy")[:, 2].tolist() == [0, 0, 1]


def test_empty_split(tmp_path):
    store = PassageStore(write_folder(tmp_path / "data", random_documents(3)), "valid")
    assert len(store) == 0 and store.info == records.SplitInfo()
    assert store.unigram.sum() == 0


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data folder .*nothing is missing .*make it with prepare"):
        PassageStore(tmp_path / "nothing", "train")
    folder = write_folder(tmp_path / "data", random_documents(5))
    shard = folder / "train-00000-of-00001.arrayrecord"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    message = rf"{shard.name} has {len(content) - 1} bytes instead of {len(content)}; run prepare again"
    with pytest.raises(UserError, match=message):
        PassageStore(folder, "train")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing; run prepare again"):
        PassageStore(folder, "train")
    manifest = folder / MANIFEST
    text = manifest.read_text()
    for damaged, message in (
        (text[:100], "damaged .*run prepare again with --overwrite"),
        ("{}", "damaged"),
        ("[]", "damaged"),
        (text.replace('"format": 1', '"format": 7'), "has format 7, not 1; run prepare again with --overwrite"),
        (text.replace('"format": 1', '"kind": "pairs"'), "holds data of kind 'pairs'; give another folder"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(UserError, match=message):
            PassageStore(folder, "train")
    manifest.unlink()
    with pytest.raises(UserError, match=r"is not complete \(no manifest.json\); make it with prepare"):
        PassageStore(folder, "train")


def test_a_damaged_shard_is_named(tmp_path):
    folder = write_folder(tmp_path / "data", random_documents(20))
    shard = folder / "train-00000-of-00001.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 2000] = bytes(2000)
    shard.write_bytes(content)
    store = PassageStore(folder, "train")
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        store.read(np.arange(len(store)))


def test_lost_records_are_noticed_when_written(tmp_path, monkeypatch):
    class Forgetful(shards.ArrayRecordWriter):
        def write(self, data):
            pass

    monkeypatch.setattr(shards, "ArrayRecordWriter", Forgetful)
    writer = SplitWriter(tmp_path, "train", NUM_TOKENS)
    writer.write(pack_passages([[1, 2], [3]], token_type(NUM_TOKENS)), True)
    with pytest.raises(OSError, match="holds 0 of 1 records"):
        writer.finish()
    writer.abort()
