import hashlib
import pickle

import numpy as np
import pytest
from numbered_text import (
    CLS,
    DOCUMENT,
    INSIDE,
    MASK,
    NUM_SPECIAL,
    NUM_TEXT,
    PAD,
    SENTENCE,
    SEP,
    make_folder,
    make_vocabulary,
)

from bert_flax.examples import InputsConfig, PairExamples, eval_batches
from core_flax.data.records import PassageStore
from core_flax.text.wordpiece import SPECIALS, WordPiece
from core_flax.types import UserError


@pytest.fixture(scope="module")
def vocabulary():
    return make_vocabulary()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    directory = tmp_path_factory.mktemp("data")
    make_folder(directory, vocabulary)
    return directory


@pytest.fixture(scope="module")
def train(folder):
    return PassageStore(folder, "train")


def restored(batch):
    """The tokens of a batch before any was masked."""
    tokens = batch["tokens"].copy()
    rows, columns = np.nonzero(batch["masked_weights"])
    tokens[rows, batch["masked_positions"][rows, columns]] = batch["masked_tokens"][rows, columns]
    return tokens


def segments_of(batch):
    """Segments A and B of each example as places in the text, having checked all that must hold of the layout."""
    found = []
    for tokens, segments, valid in zip(restored(batch), batch["segments"], batch["valid"], strict=True):
        size = valid.sum()
        assert valid[:size].all() and (tokens[size:] == PAD).all() and (segments[size:] == 0).all()
        assert tokens[0] == CLS
        first, second = np.flatnonzero(tokens == SEP)
        assert second == size - 1
        assert segments[: first + 1].sum() == 0 and segments[first + 1 : size].all()
        a, b = tokens[1:first] - NUM_SPECIAL, tokens[first + 1 : second] - NUM_SPECIAL
        for part in (a, b):
            assert len(part) >= 1 and part.min() >= 0
            assert (np.diff(part) == 1).all(), "a segment is a run of the text"
            assert DOCUMENT[part[0]] == DOCUMENT[part[-1]]
        found.append((a, b))
    return found


def make(train, vocabulary, batch_size=500, seed=1, **settings):
    return PairExamples(
        train, vocabulary, InputsConfig(**{"length": 64, "max_predictions": 12} | settings), seed, batch_size
    )


def many(examples, num_batches=8):
    batches = [examples.make_batch(step) for step in range(num_batches)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def is_near(found, expected, count):
    """Within four standard deviations of a share drawn ``count`` times."""
    return abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


def test_the_arrays(train, vocabulary):
    batch = make(train, vocabulary, batch_size=6, length=32, max_predictions=5).make_batch(0)
    found = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert found == {
        "tokens": ((6, 32), "int32"),
        "segments": ((6, 32), "int32"),
        "valid": ((6, 32), "bool"),
        "masked_positions": ((6, 5), "int32"),
        "masked_tokens": ((6, 5), "int32"),
        "masked_weights": ((6, 5), "float32"),
        "next_is_random": ((6,), "int32"),
        "example_weights": ((6,), "float32"),
    }
    assert batch["example_weights"].tolist() == [1] * 6


@pytest.mark.parametrize("length", [8, 64, 512])
def test_pairs(train, vocabulary, length):
    batch = many(make(train, vocabulary, length=length, max_predictions=4), 4)
    for (a, b), is_random in zip(segments_of(batch), batch["next_is_random"], strict=True):
        assert len(a) + len(b) <= length - 3
        if is_random:
            assert DOCUMENT[a[0]] != DOCUMENT[b[0]]
        else:
            assert DOCUMENT[a[0]] == DOCUMENT[b[0]] and a[-1] < b[0]
            assert SENTENCE[b[0]] > SENTENCE[a[-1]]


def test_pairs_are_whole_sentences_unless_cut_to_fit(train, vocabulary):
    batch = many(make(train, vocabulary, length=512, short_rate=0.0), 4)
    begins = np.flatnonzero(np.diff(SENTENCE, prepend=-1))
    num_whole = 0
    for (a, b), is_random in zip(segments_of(batch), batch["next_is_random"], strict=True):
        if len(a) + len(b) < 512 - 3:  # so nothing was cut
            num_whole += 1
            assert a[0] in begins and b[0] in begins
            assert {a[-1] + 1, b[-1] + 1} <= {*begins, NUM_TEXT}
            assert is_random or b[0] == a[-1] + 1
    assert num_whole > 20


def test_where_a_ends_is_drawn_evenly(train, vocabulary):
    batch = many(make(train, vocabulary, length=512, short_rate=0.0, random_next_rate=0.0), 4)
    shares = []
    for a, b in segments_of(batch):
        in_a, in_b = (len(np.unique(SENTENCE[part])) for part in (a, b))
        if in_a + in_b > 20:
            shares.append(in_a / (in_a + in_b))
    counts = np.histogram(shares, bins=4, range=(0, 1))[0]
    assert counts.sum() > 300 and (np.abs(counts / counts.sum() - 0.25) < 0.08).all()


def test_random_seconds_never_begin_where_true_ones_cannot(train, vocabulary):
    batch = many(make(train, vocabulary, random_next_rate=1.0))
    firsts = [0, *np.cumsum(train.num_sentences)]
    assert not {SENTENCE[b[0]] for _, b in segments_of(batch)} & set(firsts)


def test_cut_pairs_are_balanced_and_cut_at_both_ends(train, vocabulary):
    batch = many(make(train, vocabulary, length=16, max_predictions=2, short_rate=0.0))
    begins, ends = (np.flatnonzero(np.diff(SENTENCE, **{side: -1})) for side in ("prepend", "append"))
    pairs = segments_of(batch)
    full = [(a, b) for a, b in pairs if len(a) + len(b) == 13]
    assert len(full) > 0.9 * len(pairs)
    for number in range(2):
        cut = [(part[0] not in begins, part[-1] not in ends) for part in (pair[number] for pair in full)]
        front, back = np.mean([one for one in cut if any(one)], axis=0)
        assert 0.6 < front < 0.9 and 0.6 < back < 0.9  # both, more often than not
    # Only the longer one is cut: one with fewer than half of the tokens is whole.
    assert all(a[0] in begins and a[-1] in ends for a, b in full if len(a) < 6)
    assert all(b[0] in begins and b[-1] in ends for a, b in full if len(b) < 6)


@pytest.mark.parametrize("rate", [0.5, 0.0, 1.0])
def test_share_of_random_seconds(train, vocabulary, rate):
    batch = many(make(train, vocabulary, random_next_rate=rate))
    assert is_near(batch["next_is_random"].mean(), rate, 4000) or batch["next_is_random"].mean() == rate


def test_random_seconds_come_from_all_other_text_alike(train, vocabulary):
    batch = many(make(train, vocabulary, random_next_rate=1.0, length=32, max_predictions=5), 16)
    pairs = segments_of(batch)
    sizes = np.bincount(DOCUMENT).astype(float)
    large = np.flatnonzero(sizes > 1000)
    own = DOCUMENT[[a[0] for a, _ in pairs]]
    other = DOCUMENT[[b[0] for _, b in pairs]]
    for document in large:
        drawn = other[own != document] == document
        share = np.mean([sizes[document] / (sizes.sum() - sizes[mine]) for mine in own[own != document]])
        assert abs(drawn.mean() - share) < 0.03


def test_share_of_short_examples(train, vocabulary):
    sizes = many(make(train, vocabulary, length=32, max_predictions=5, short_rate=0.1))["valid"].sum(axis=1) - 3
    # Short targets are uniform over 2..29, the longest of them not short; some documents and passages end early.
    assert abs((sizes < 29).mean() - 0.1 * 27 / 28) < 0.035
    assert (sizes < 8).mean() > 0.01
    always = many(make(train, vocabulary, length=32, max_predictions=5, short_rate=1.0))["valid"].sum(axis=1) - 3
    assert always.min() == 2 and abs(always.mean() - (2 + 29) / 2) < 1
    never = many(make(train, vocabulary, length=32, max_predictions=5, short_rate=0.0))["valid"].sum(axis=1) - 3
    assert (never < 29).mean() < 0.04


@pytest.mark.parametrize("whole_word", [False, True])
def test_masks(train, vocabulary, whole_word):
    batch = many(make(train, vocabulary, whole_word=whole_word), 16)
    original, size = restored(batch), batch["valid"].sum(axis=1)
    weights = batch["masked_weights"]
    rows, columns = np.nonzero(weights)
    positions = batch["masked_positions"][rows, columns]
    assert ((original[rows, positions]) >= NUM_SPECIAL).all(), "no special token is to be predicted"
    assert set(np.unique(weights)) == {0, 1}
    for name in ("masked_positions", "masked_tokens"):
        assert (batch[name][weights == 0] == 0).all()
    for row in range(0, len(size), 97):
        chosen = batch["masked_positions"][row][weights[row] > 0]
        assert (np.diff(chosen) > 0).all()
    # BERT counts [CLS] and [SEP] among the tokens.
    wanted = np.minimum(np.maximum(1, np.rint(0.15 * size)), 12)
    if whole_word:
        assert (weights.sum(axis=1) <= wanted).all()
        assert weights.sum() > 0.9 * wanted.sum()
    else:
        assert np.array_equal(weights.sum(axis=1), wanted)
        assert abs(weights.sum() / size.sum() - 0.15) < 0.01  # rounding 0.15 * 64 up to 10 alone makes 0.006
    labels, shown = batch["masked_tokens"][rows, columns], batch["tokens"][rows, positions]
    count = len(labels)
    assert is_near((shown == MASK).mean(), 0.8, count)
    assert is_near((shown == labels).mean(), 0.1, count)
    drawn = shown[(shown != MASK) & (shown != labels)]
    assert is_near(len(drawn) / count, 0.1, count)
    assert drawn.min() >= NUM_SPECIAL
    quarters = np.bincount((drawn - NUM_SPECIAL) * 4 // NUM_TEXT)
    assert len(quarters) == 4 and (np.abs(quarters / len(drawn) - 0.25) < 0.03).all()
    untouched = np.ones(original.shape, bool)
    untouched[rows, positions] = False
    assert np.array_equal(batch["tokens"][untouched], original[untouched])


def test_places_to_predict_are_drawn_evenly(train, vocabulary):
    batch = many(make(train, vocabulary, short_rate=0.0, length=32, max_predictions=5), 16)
    full = batch["valid"].all(axis=1)
    places = batch["masked_positions"][full][batch["masked_weights"][full] > 0]
    separators = np.bincount(np.nonzero(batch["tokens"][full] == SEP)[1], minlength=32)
    share = np.bincount(places, minlength=32)[1:31] / (full.sum() - separators[1:31])
    assert (np.abs(share / share.mean() - 1) < 0.15).all()


def test_whole_words_are_masked_whole(train, vocabulary):
    batch = many(make(train, vocabulary, whole_word=True))
    original = restored(batch)
    num_long = 0
    for row in range(len(original)):
        chosen = set(batch["masked_positions"][row][batch["masked_weights"][row] > 0].tolist())
        is_text = original[row] >= NUM_SPECIAL
        words = []
        for place in np.flatnonzero(is_text):
            if is_text[place - 1] and INSIDE[original[row, place] - NUM_SPECIAL]:
                words[-1].append(place)
            else:
                words.append([place])
        for word in words:
            assert len(chosen & set(word)) in (0, len(word))
            num_long += len(word) > 2 and word[0] in chosen
    assert num_long > 100


def test_a_cut_word_at_the_beginning_of_a_segment_is_a_word(train, vocabulary):
    examples = make(train, vocabulary, length=8, max_predictions=5, mask_rate=0.5, whole_word=True)
    examples._continues_word = np.ones(vocabulary.num_tokens, bool)  # so each segment is the rest of one long word
    batch = many(examples, 1)
    for (a, b), chosen, weights in zip(
        segments_of(batch), batch["masked_positions"], batch["masked_weights"], strict=True
    ):
        wanted = round(0.5 * (len(a) + len(b) + 3))
        words = [list(range(1, 1 + len(a))), list(range(2 + len(a), 2 + len(a) + len(b)))]
        possible = [word for word in words if len(word) <= wanted]
        found = chosen[weights > 0].tolist()
        assert found in possible or (len(a) + len(b) <= wanted and found == words[0] + words[1]), (found, words)


def test_everything_is_drawn_anew_each_epoch(train, vocabulary):
    examples = make(train, vocabulary)
    indices = np.arange(examples.num_examples)
    one, two = examples.examples(indices, 0), examples.examples(indices, 1)
    size = np.minimum(one["valid"].sum(axis=1), two["valid"].sum(axis=1))
    assert 0.4 < np.mean(one["next_is_random"] == two["next_is_random"]) < 0.6
    assert np.mean([a[0] == c[0] for (a, _), (c, _) in zip(segments_of(one), segments_of(two), strict=True)]) < 0.5
    assert np.mean((one["masked_positions"] == two["masked_positions"]).all(axis=1)[size > 30]) < 0.01
    again = examples.examples(indices, 0)
    assert all(np.array_equal(one[name], again[name]) for name in one)


def test_an_epoch_takes_every_slot_once(train, vocabulary):
    """A passage gives as many examples as its length asks for, in every epoch; the order differs."""
    examples = make(train, vocabulary, batch_size=1)
    num_tokens = train.num_tokens
    slots = np.maximum(1, np.rint(num_tokens / (0.75 * 61)))
    assert examples.num_examples == slots.sum()
    ends = np.cumsum(num_tokens)
    orders = []
    for epoch in range(2):
        batches = (examples.make_batch(epoch * examples.num_examples + step) for step in range(examples.num_examples))
        begins = [segments_of(batch)[0][0][0] for batch in batches]
        found = np.searchsorted(ends, begins, side="right")
        assert np.array_equal(np.bincount(found, minlength=len(train)), slots)
        orders.append(found)
    assert np.mean(orders[0] == orders[1]) < 0.5


def test_in_time_all_of_the_text_is_seen_alike(train, vocabulary):
    examples = make(train, vocabulary, short_rate=0.0)
    seen, opened = np.zeros(NUM_TEXT), np.zeros(SENTENCE[-1] + 1)
    for epoch in range(100):
        for a, b in segments_of(examples.examples(np.arange(examples.num_examples), epoch)):
            opened[SENTENCE[a[0]]] += 1
            seen[a[0] : a[-1] + 1] += 1
            seen[b[0] : b[-1] + 1] += 1
    assert seen.min() > 0.05 * np.median(seen)
    assert seen.max() < 4 * np.median(seen)
    # All but sentences near the end of a passage also open examples: the last has no next one, nor enough text.
    lengths = np.bincount(SENTENCE)
    lasts = np.cumsum(train.num_sentences)
    left = lasts[np.searchsorted(lasts, np.arange(len(lengths)), side="right")] - np.arange(len(lengths))
    assert opened[(left > 60) & (lengths > 4)].all()
    firsts = lasts[:-1]
    assert (opened[firsts] > 25).all()


def test_hosts_together_see_what_one_host_sees(train, vocabulary):
    examples = make(train, vocabulary, batch_size=32)
    for step in (0, 7, 10**9):
        whole = examples.make_batch(step)
        hosts = [examples.make_batch(step, range(16)), examples.make_batch(step, range(16, 32))]
        strided = [examples.make_batch(step, range(start, 32, 2)) for start in range(2)]
        for name, array in whole.items():
            assert np.array_equal(np.concatenate([host[name] for host in hosts]), array)
            assert np.array_equal(np.stack([host[name] for host in strided], 1).reshape(array.shape), array)


def test_a_batch_depends_on_nothing_but_seed_and_step(train, folder, vocabulary):
    one = make(train, vocabulary, batch_size=32)
    for _ in range(3):
        one.make_batch(0)
    other = pickle.loads(pickle.dumps(make(PassageStore(folder, "train"), make_vocabulary(), batch_size=32)))
    far = one.num_examples  # a step in whose batches epochs meet, for any batch size
    for step in (5, far // 32, far):
        left, right = one.make_batch(step), other.make_batch(step)
        assert all(np.array_equal(left[name], right[name]) for name in left)
    another_seed = make(train, vocabulary, batch_size=32, seed=2).make_batch(5)
    assert not np.array_equal(one.make_batch(5)["tokens"], another_seed["tokens"])


def test_epochs_follow_each_other_without_a_gap(train, vocabulary):
    """Batches of another size hold the same examples in the same order, across the end of an epoch."""
    large, small = make(train, vocabulary, batch_size=1000), make(train, vocabulary, batch_size=100)
    assert 300 < large.num_examples < 1000
    one, parts = large.make_batch(0), [small.make_batch(step) for step in range(10)]
    for name, array in one.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


def test_batches_stay_what_they_are(train, vocabulary):
    """A resumed run must see the data that it would have seen, under any version of numpy. Printed once."""
    batch = make(train, vocabulary, batch_size=16, whole_word=True).make_batch(3)
    digest = hashlib.sha256(b"".join(batch[name].astype("<f4").tobytes() for name in sorted(batch))).hexdigest()
    assert digest == "cf7fb7c905dce1e48e102f17999645e51c9ada5c40fd688744c67a43aba42446"


def test_evaluation_takes_every_example_once(folder, vocabulary):
    store, config = PassageStore(folder, "valid"), InputsConfig(length=64, max_predictions=12)
    num_examples = make(store, vocabulary).num_examples
    batches = list(eval_batches(store, vocabulary, config, batch_size=16))
    assert len(batches) == -(-num_examples // 16) and num_examples % 16
    weights = np.concatenate([batch["example_weights"] for batch in batches])
    assert weights.sum() == num_examples and weights[:num_examples].all()
    padding = batches[-1]["example_weights"] == 0
    assert (batches[-1]["masked_weights"][padding] == 0).all() and batches[-1]["valid"][padding].any(axis=1).all()
    one_by_one = list(eval_batches(store, vocabulary, config, batch_size=1))
    assert len(one_by_one) == num_examples
    rows = {batch["tokens"].tobytes() for batch in one_by_one}
    assert len(rows) == num_examples
    assert {row.tobytes() for batch in batches for row in batch["tokens"]} == rows


def test_evaluation_can_be_shorter_and_on_two_hosts(folder, vocabulary):
    store, config = PassageStore(folder, "valid"), InputsConfig(length=64, max_predictions=12)
    whole = list(eval_batches(store, vocabulary, config, 16))
    assert len(whole) > 3
    some = list(eval_batches(store, vocabulary, config, 16, max_batches=2))
    hosts = [list(eval_batches(store, vocabulary, config, 16, rows=rows)) for rows in (range(8), range(8, 16))]
    assert len(some) == 2
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            assert np.array_equal(np.concatenate([host[step][name] for host in hosts]), array)
            assert step >= 2 or np.array_equal(some[step][name], array)


def test_data_of_another_tokenizer_is_refused(train):
    with pytest.raises(UserError, match="made with another tokenizer"):
        make(train, WordPiece(SPECIALS))


def test_too_few_documents_are_refused(tmp_path, vocabulary):
    make_folder(tmp_path, vocabulary, valid_documents=1)
    with pytest.raises(UserError, match=r"has 1 documents in its split 'valid'.*at least 2"):
        make(PassageStore(tmp_path, "valid"), vocabulary)
