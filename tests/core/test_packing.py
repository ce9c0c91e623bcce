import itertools

import numpy as np
import pytest

from core_flax.data.packing import fitting, pack


@pytest.mark.parametrize(("capacity", "max_per_row", "seed"), [(32, None, 0), (32, 3, 1), (64, 1, 2), (7, 2, 3)])
def test_every_sequence_has_a_place_of_its_own(capacity, max_per_row, seed):
    lengths = np.random.default_rng(seed).integers(1, capacity + 1, 200)
    packing = pack(lengths, capacity, max_per_row)
    taken = np.zeros((packing.num_rows, capacity), int)
    for length, row, start in zip(lengths, packing.row, packing.start, strict=True):
        assert start + length <= capacity
        taken[row, start : start + length] += 1
    assert taken.max() == 1 and taken.sum() == lengths.sum() and (taken[:, 0] == 1).all()
    counts = np.bincount(packing.row)
    assert max_per_row is None or counts.max() <= max_per_row
    for row, count in enumerate(counts):
        inside = packing.row == row
        assert sorted(packing.slot[inside]) == list(range(count))
        assert (np.argsort(packing.slot[inside]) == np.argsort(packing.start[inside])).all()


def test_as_few_rows_as_can_be_where_that_is_known():
    # Drawn by cutting 20 full rows into pieces: 20 rows can hold them.
    draw = np.random.default_rng(5)
    lengths = np.concatenate([np.diff([0, *np.sort(draw.choice(np.arange(1, 100), 3, False)), 100]) for _ in range(20)])
    assert 20 <= pack(lengths, 100).num_rows <= 22
    # And exhaustively: no order in which the sequences are put, each where it fits, needs fewer.
    lengths = np.array([6, 5, 4, 4, 3, 2])

    def rows_of(order):
        rooms = []
        for length in order:
            place = next((number for number, room in enumerate(rooms) if room >= length), None)
            if place is None:
                rooms.append(10 - length)
            else:
                rooms[place] -= length
        return len(rooms)

    assert pack(lengths, 10).num_rows == min(rows_of(order) for order in itertools.permutations(lengths))


def test_nothing_to_pack_and_what_fits_nowhere():
    assert pack(np.array([], int), 8).num_rows == 0
    for lengths in ([9], [0, 3]):
        with pytest.raises(ValueError, match="do not fit rows of 8 tokens"):
            pack(np.array(lengths), 8)


def test_the_next_size_that_fits():
    assert [fitting(size, (2, 5, 9)) for size in (1, 2, 3, 5, 9)] == [2, 2, 5, 5, 9]
