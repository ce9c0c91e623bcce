import numpy as np
import pytest

from core_flax.data import order


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 16, 17, 100, 255, 256, 257, 1000, 65537])
@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5])
def test_shuffled_is_a_permutation(length, seed):
    found = order.shuffled(np.arange(length), length, seed, epoch=3)
    assert np.array_equal(np.sort(found), np.arange(length))


def test_shuffled_needs_no_neighbours():
    whole = order.shuffled(np.arange(1000), 1000, seed=1, epoch=2)
    some = np.array([999, 0, 17, 17])
    assert np.array_equal(order.shuffled(some, 1000, seed=1, epoch=2), whole[some])
    # One epoch for each index, as in a batch that lies across the end of an epoch.
    mixed = order.shuffled(np.array([5, 5]), 1000, seed=1, epoch=np.array([2, 7]))
    assert mixed.tolist() == [whole[5], order.shuffled(5, 1000, seed=1, epoch=7)[0]]


def test_shuffled_stays_what_it_is():
    """A run that is resumed under another numpy must see the same data. These values were printed once."""
    assert order.shuffled(np.arange(10), 10, seed=0, epoch=0).tolist() == [8, 2, 5, 7, 0, 9, 6, 4, 1, 3]
    assert order.shuffled(np.arange(5), 1_000_003, seed=42, epoch=7).tolist() == [132853, 271301, 86812, 405385, 95969]
    assert order.stream(1, 2, 3).tolist() == [17966644405936341382]
    np.testing.assert_array_equal(
        order.uniform(order.stream(5), np.arange(3)), [0.9371233464116534, 0.33726274442364956, 0.6912609210788955]
    )


def test_mix_is_splitmix64():
    """The first outputs of the published generator (https://prng.di.unimi.it/splitmix64.c) from state 0."""
    states = [0, 0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A]
    assert order.mix(np.array(states, np.uint64)).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize("length", [8, 30, 1000])
def test_every_index_lands_everywhere_alike(length):
    epochs = np.arange(2000)
    for index in (0, 1, length // 2, length - 1):
        found = order.shuffled(np.full(len(epochs), index), length, seed=9, epoch=epochs)
        num_bins = min(length, 10)
        counts = np.bincount(found * num_bins // length, minlength=num_bins)
        expected = len(epochs) * np.bincount(np.arange(length) * num_bins // length) / length
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < num_bins - 1 + 5 * np.sqrt(2 * (num_bins - 1)), (index, counts)


def test_neighbours_part_and_epochs_and_seeds_differ():
    length = 10_000
    found = order.shuffled(np.arange(length), length, seed=0, epoch=0)
    assert np.mean(np.abs(np.diff(found)) == 1) < 0.002  # 0.0002 expected
    for other in (order.shuffled(np.arange(length), length, 0, 1), order.shuffled(np.arange(length), length, 1, 0)):
        assert np.mean(found == other) < 0.002
        assert abs(np.corrcoef(found, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(found, np.arange(length))[0, 1]) < 0.05


def test_small_lengths_reach_every_order():
    found = order.shuffled(np.tile(np.arange(4), 5000), 4, seed=3, epoch=np.repeat(np.arange(5000), 4)).reshape(-1, 4)
    orders, counts = np.unique(found, axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 0.5 * 5000 / 24 and counts.max() < 2 * 5000 / 24


def test_draws_are_uniform_and_independent():
    key = order.stream(0, 0, np.arange(200))
    draws = order.uniform(key[:, None], np.arange(500))
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005 and abs(draws.std() - 12**-0.5) < 0.005
    counts = np.bincount((draws * 100).astype(int).ravel())
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * np.sqrt(2 * 99)
    for one, two in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.02


def test_integers_cover_their_range():
    key = order.stream(4)
    found = order.integers(key, np.arange(3000), 3)
    assert found.dtype == np.int64
    assert np.bincount(found, minlength=3).min() > 900 and set(found.tolist()) == {0, 1, 2}
    assert order.integers(key, np.arange(3), np.array([1, 1, 1])).tolist() == [0, 0, 0]


def test_streams_of_other_parts_differ():
    keys = {int(order.stream(*parts)[0]) for parts in [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 1), (-1, 0)]}
    assert len(keys) == 7


def test_unsuitable_index_is_refused():
    with pytest.raises(AssertionError, match="range"):
        order.shuffled(np.array([10]), 10, seed=0)
