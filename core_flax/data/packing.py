"""Several short sequences in one row: which goes where, as a pure function of their lengths."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Where each of S sequences lies.

    Attributes:
      row: int [S], its row.
      start: int [S], its first position there.
      slot: int [S], how many sequences of the row lie before it.
      num_rows: rows in use.
    """

    row: np.ndarray
    start: np.ndarray
    slot: np.ndarray
    num_rows: int


def pack(lengths: np.ndarray, capacity: int, max_per_row: int | None = None) -> Packing:
    """Best fit, longest first: each sequence goes to the fullest row that still has room for it.

    At most 11/9 of the fewest rows possible, and 6/9 of a row (Johnson 1973), in practice a few rows in a hundred more.
    Equal lengths go in the order given, so the result depends on nothing but the arguments.

    Args:
      lengths: tokens of each sequence, [S], from 1 to ``capacity``.
      capacity: tokens to a row.
      max_per_row: sequences to a row, at most; None: any number.

    Raises:
      ValueError: a sequence that no row can hold.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit rows of {capacity} tokens")
    row, start, slot = (np.zeros(len(lengths), np.int64) for _ in range(3))
    used: list[int] = []
    count: list[int] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> the open rows that have just that
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        room = next((room for room in range(length, capacity + 1) if with_room[room]), None)
        if room is None:
            chosen = len(used)
            used.append(0)
            count.append(0)
        else:
            chosen = with_room[room].pop()
        row[index], start[index], slot[index] = chosen, used[chosen], count[chosen]
        used[chosen] += length
        count[chosen] += 1
        if max_per_row is None or count[chosen] < max_per_row:
            with_room[capacity - used[chosen]].append(chosen)
    return Packing(row, start, slot, len(used))


def fitting(size: int, of: tuple[int, ...]) -> int:
    """The smallest of the ascending sizes that is at least ``size``."""
    return of[int(np.searchsorted(of, size))]
