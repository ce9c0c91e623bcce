"""Order and chance as pure functions of counters.

Every random decision about the data is a hash of (seed, epoch, example, which decision), so any batch can be computed
at any time, on any host, with nothing to save. The hash is written out here and not numpy's, because the numbers of
``Generator.permutation`` and ``Generator.integers`` may change from one numpy version to the next.
"""

import numpy as np
from numpy.typing import ArrayLike

_MASK64 = (1 << 64) - 1
_ROUNDS = 8
"""Four Feistel rounds suffice for large domains; in small ones each round sees only a few bits, so take more."""


def mix(values: ArrayLike) -> np.ndarray:
    """Hash each integer to 64 well mixed bits: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection."""
    x = np.array(values, dtype=np.uint64, ndmin=1)  # a copy, changed in place; never a scalar, whose overflow warns
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def stream(*parts: ArrayLike) -> np.ndarray:
    """A 64-bit key for the given integers (seed, epoch, index, ...), which broadcast against each other.

    Returns:
        uint64 array of the broadcast shape (at least 1-D). Other parts, or the same in another order: another key.
    """
    key = mix(_unsigned(parts[0]))
    for part in parts[1:]:
        key = mix(key ^ mix(_unsigned(part)) * np.uint64(3))
    return key


def uniform(key: ArrayLike, counter: ArrayLike = 0) -> np.ndarray:
    """Draw number ``counter`` of the stream ``key``: float64 in [0, 1), of the shape the two broadcast to."""
    return (mix(np.asarray(key, np.uint64) ^ mix(counter)) >> np.uint64(11)) * 2.0**-53


def integers(key: ArrayLike, counter: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Draw number ``counter`` of the stream ``key`` as int64 in [0, high). The bias is below high / 2**53."""
    return (uniform(key, counter) * high).astype(np.int64)


def shuffled(indices: ArrayLike, length: int, seed: int, epoch: ArrayLike = 0) -> np.ndarray:
    """Where each index lands when ``range(length)`` is shuffled, without ever holding that order in memory.

    A balanced Feistel network permutes the smallest power of four that holds ``length``; results outside the range are
    sent through again until they fall inside ("cycle walking", Black and Rogaway 2002), which leaves a permutation.

    Args:
        indices: int array, each in [0, length).
        length: number of items that are shuffled.
        seed: which family of permutations.
        epoch: which permutation; a scalar or one per index.

    Returns:
        int64 array of the shape of ``indices`` (at least 1-D).
    """
    x = np.array(indices, dtype=np.uint64, ndmin=1)
    assert length > 0 and (x.size == 0 or int(x.max()) < length), "indices must lie in range(length)"
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    keys = [np.broadcast_to(stream(seed, epoch, number), x.shape) for number in range(_ROUNDS)]
    walking = np.ones(x.shape, bool)
    while walking.any():
        x[walking] = _feistel(x[walking], half, [key[walking] for key in keys])
        walking = x >= np.uint64(length)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: list[np.ndarray]) -> np.ndarray:
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & low_bits
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low_bits)
    return (left << half) | right


def _unsigned(part: ArrayLike) -> np.ndarray:
    """Integers of any sign as uint64, so that a negative seed is a seed like any other."""
    if isinstance(part, int):
        return np.array([part & _MASK64], np.uint64)
    return np.atleast_1d(np.asarray(part)).astype(np.uint64)
