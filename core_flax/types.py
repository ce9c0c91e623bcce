"""Names shared by every file: the shape legend, the array aliases and the one error of the user's making.

Shape letters, used as suffixes of array names (``x_BLD`` is a [B, L, D] array):

====  =======================================================
B     batch: examples (sequences, or pairs of them)
L     length of the queries (positions of the sequence)
M     memory length: positions that are attended to
T     positions of all rows, one after another
D     model width
H     attention heads
G     heads of keys and values, where H / G heads of queries share each
K     width of one head
F     feed-forward width
V     vocabulary entries
N     layers
P     predictions per example (masked positions)
C     choices or classes
====  =======================================================

A name ending in ``_sums`` holds sums that have not been divided by their weights yet.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = Any
"""A ``jax.Array`` or a ``numpy.ndarray``: a name for readers, not for checkers, so that numpy-only code can use it."""

RowNumbers = np.ndarray | range
"""Which rows of a batch are meant, ascending: those that one host's devices need."""

Batch = Mapping[str, Array]
"""Arrays whose first dimension is the example, for one optimizer step."""

Params = Mapping[str, Any]
"""Nested dict of parameter arrays, as Flax Linen's ``init(...)["params"]`` returns it."""

Sums = Mapping[str, Array]
"""Scalars by name, summed over examples and not yet divided."""


class UserError(Exception):
    """A mistake in what the user asked for, with the remedy in its text.

    Command lines print it as one line and exit with status 2. It is no subclass of ValueError so that a ValueError
    of a library is never taken for the user's mistake.
    """
