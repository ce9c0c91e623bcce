"""Packed batches of pairs: everything once, whole and side by side; hardly any padding; a function of the step."""

import numpy as np
import pytest
from pair_text import caption_lengths, write_store

from core_flax.types import UserError
from seq2seq_flax.batches import PairBatches, pack_pairs, row_capacity
from seq2seq_flax.config import InputsConfig

BOS = 1


def batches_of(store, row_length=64, num_rows=8, multiple=1, **inputs):
    return PairBatches(store, InputsConfig(row_length=row_length, **inputs), num_rows, BOS, multiple)


def pairs_in(batch):
    """(source ids, target ids) of every pair of a batch, looked up by its number in both sides of its row."""
    for row, numbers in enumerate(batch["target_sequences"]):
        for number in range(1, numbers.max() + 1):
            source, target = (batch[f"{side}_sequences"][row] == number for side in ("source", "target"))
            for side, inside in (("source", source), ("target", target)):
                np.testing.assert_array_equal(batch[f"{side}_positions"][row][inside], np.arange(inside.sum()))
            labels = batch["target_labels"][row][target].tolist()
            assert batch["target_inputs"][row][target].tolist() == [BOS, *labels[:-1]]
            yield batch["source_tokens"][row][source].tolist(), labels


def as_lists(store, numbers):
    return [(source.tolist(), target.tolist()) for source, target in store.read(np.asarray(numbers))]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "data", caption_lengths(250))


@pytest.mark.parametrize(("capacity", "seed"), [((64, 64), 0), ((48, 64), 1), ((60, 61), 2)])
def test_every_pair_has_a_place_of_its_own(capacity, seed):
    lengths = np.minimum(caption_lengths(150, seed), capacity)
    packing = pack_pairs(lengths[:, 0], lengths[:, 1], capacity)
    starts = (packing.source_start, packing.target_start)
    for side in range(2):
        taken = np.zeros((packing.num_rows, capacity[side]), int)
        for row, start, length in zip(packing.row, starts[side], lengths[:, side], strict=True):
            assert start + length <= capacity[side]
            taken[row, start : start + length] += 1
        assert taken.max() == 1 and taken.sum() == lengths[:, side].sum()
    for row, count in enumerate(np.bincount(packing.row)):
        assert sorted(packing.slot[packing.row == row]) == list(range(count))


def test_what_fits_nowhere():
    with pytest.raises(ValueError, match=r"a pair of 5 and 9 tokens does not fit rows of \(8, 8\)"):
        pack_pairs(np.array([3, 5]), np.array([3, 9]), (8, 8))


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_takes_every_pair_once_in_an_order_of_its_own(store, packing):
    batches = batches_of(store, packing=packing)
    everything, orders = sorted(as_lists(store, range(len(store)))), []
    assert len(store) % batches.pairs_per_step != 0  # the ragged case
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        drawn = [sorted(pairs_in(batches.make_batch(step, 5))) for step in steps]
        assert sorted(pair for each in drawn for pair in each) == everything
        assert all(batches.pairs_per_step - 4 <= len(each) <= batches.pairs_per_step for each in drawn)
        orders.append(drawn)
    assert orders[0] != orders[1]


def test_a_batch_is_a_function_of_seed_and_step(store):
    batch, other = batches_of(store).make_batch(7, 5), batches_of(store)
    for name, array in other.make_batch(7, 5).items():
        np.testing.assert_array_equal(array, batch[name])
    assert (other.make_batch(7, 6)["source_tokens"] != batch["source_tokens"]).any()


def test_a_step_mixes_the_lengths_of_the_corpus(store):
    """Each pair may come at any step: no step is of short or of long sentences, none always meets its neighbour."""
    batches = batches_of(store, num_rows=4)
    steps = range(20 * batches.steps_per_epoch)
    means = [store.target_lengths[batches.drawn(step, 0)].mean() for step in steps]
    assert np.std(means) < 0.03 * np.mean(means)
    taken = [frozenset(batches.drawn(step, 0).tolist()) for step in steps]
    others = [each - {3} for each in taken if 3 in each]
    assert len(others) == 20 and not frozenset.intersection(*others)


@pytest.mark.parametrize(("row_length", "num_rows"), [(128, 64), (128, 16)])
def test_95_in_100_tokens_are_real_and_one_shape_is_the_rule(tmp_path, row_length, num_rows):
    store = write_store(tmp_path / "data", caption_lengths(20_000, seed=3))
    batches = batches_of(store, row_length, num_rows, multiple=4)
    assert batches.share_of_padding(seed=1, num_steps=12) <= 0.05
    sizes = [len(batches.make_batch(step, 2)["source_tokens"]) for step in range(20)]
    assert sizes.count(num_rows) >= 19 and all(size % 4 == 0 for size in sizes)
    source, target = batches.mean_tokens()
    assert 0.9 < target / (num_rows * row_length) < 1 and 0.8 < source / (num_rows * row_length) < 1


@pytest.mark.parametrize("num_rows", [1, 5, 400])
def test_in_order_shows_every_pair_once(store, num_rows):
    seen = []
    for batch in batches_of(store).in_order(num_rows):
        assert {len(array) for array in batch.values()} == {num_rows}
        seen += pairs_in(batch)
    assert sorted(seen) == sorted(as_lists(store, range(len(store))))


def test_rows_hold_both_sides_in_proportion(tmp_path):
    assert row_capacity(write_store(tmp_path / "a", [(10, 20), (5, 10)]), 64) == (32, 64)
    assert row_capacity(write_store(tmp_path / "b", [(20, 20), (1, 30)]), 64) == (24, 64)
    with pytest.raises(UserError, match=r"row-length 16 is shorter than the longest sentence, 20 tokens: choose 24"):
        row_capacity(write_store(tmp_path / "c", [(10, 20)]), 16)


def test_fewer_pairs_than_fit(tmp_path):
    store = write_store(tmp_path / "data", [(5, 6), (7, 8), (9, 4)])
    batches = batches_of(store)
    assert batches.pairs_per_step == 3 and batches.steps_per_epoch == 1
    assert sorted(pairs_in(batches.make_batch(4, 0))) == sorted(as_lists(store, range(3)))
