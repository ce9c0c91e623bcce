"""Batches of units, several sequences to a row: hardly any padding, and a handful of shapes to compile."""

from collections.abc import Iterator

import numpy as np

from bert_flax.finetune.inputs import NO_TAG, Units
from core_flax.data import order
from core_flax.data.packing import fitting, pack
from core_flax.types import Batch

MIN_TOKENS_PER_SLOT = 8
"""A row of L tokens takes at most L / 8 units: shorter ones would leave more slots empty than they would fill rows."""
SAMPLED_STEPS = 128
"""Steps of which the numbers of rows are looked at to choose the shapes to compile."""


class PackedUnits:
    """The batches of a data set. A batch is a pure function of the step, as in pretraining.

    Its arrays, R rows of L tokens and S slots for units of C sequences:
      tokens, segments: int32 [R, L].
      positions: int32 [R, L], which start anew with each sequence.
      sequences: int32 [R, L], equal where tokens are of one sequence and may see each other; 0: padding.
      first_tokens: int32 [R, S, C], where each sequence starts in its row; 0 where there is none.
      units: int32 [R, S], the unit's number in the data set; -1: none.
      weights: float32 [R, S], 1 where there is a unit.
      labels: by the units' labels, if there are any: int32 or float32 [R, S]; for answers int32 [R, S, 2], places in
        the row; for tags int32 [R, L], NO_TAG where there is none.

    Attributes:
      units: the data set.
      row_length: L.
    """

    def __init__(self, units: Units, row_length: int, row_multiple: int = 1) -> None:
        """Units whose sequences together fit ``row_length``; the rows of each batch divide by ``row_multiple``."""
        self.units = units
        self.row_length, self.row_multiple = row_length * units.per_unit, row_multiple
        self._begins = np.concatenate([[0], np.cumsum(units.lengths)])
        self._sizes = np.diff(self._begins[:: units.per_unit])
        self._counts: dict[tuple[int, int], tuple[int, ...]] = {}
        self._slots = max(1, self.row_length // MIN_TOKENS_PER_SLOT // units.per_unit)

    def make_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The units of a training step, drawn without replacement within each epoch, packed into rows."""
        numbers = self._drawn(step, batch_size, seed)
        packing = pack(self._sizes[numbers], self.row_length, self._slots)
        num_rows = fitting(packing.num_rows, self.row_counts(batch_size, seed))
        return self._batch(numbers, packing.row, packing.start, packing.slot, num_rows)

    def row_counts(self, batch_size: int, seed: int) -> tuple[int, ...]:
        """Numbers of rows that batches may have: enough for most, for nearly all, and for any. A shape for each."""
        if (batch_size, seed) not in self._counts:
            drawn = (self._sizes[self._drawn(step, batch_size, seed)] for step in range(SAMPLED_STEPS))
            rows = np.sort([pack(lengths, self.row_length, self._slots).num_rows for lengths in drawn])
            most, nearly_all = int(rows[len(rows) * 3 // 4]), int(rows[-1])
            wanted = nearly_all if nearly_all <= 1.1 * most else most, nearly_all, batch_size
            multiple = self.row_multiple
            self._counts[batch_size, seed] = tuple(sorted({-(-int(count) // multiple) * multiple for count in wanted}))
        return self._counts[batch_size, seed]

    def _drawn(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Which units a training step takes."""
        epoch, place = np.divmod(step * batch_size + np.arange(batch_size), self.units.num_units)
        return order.shuffled(place, self.units.num_units, seed, epoch)

    def in_order(self, num_rows: int) -> Iterator[Batch]:
        """Every unit once, whatever fits best side by side, in as few batches as have ``num_rows`` rows or less.

        All have the same number of rows: not more than it takes to hold the units.
        """
        packing = pack(self._sizes, self.row_length, self._slots)
        num_batches = -(-packing.num_rows // num_rows)
        num_rows = -(-packing.num_rows // (num_batches * self.row_multiple)) * self.row_multiple
        for begin in range(0, packing.num_rows, num_rows):
            inside = np.flatnonzero((packing.row >= begin) & (packing.row < begin + num_rows))
            yield self._batch(
                inside, packing.row[inside] - begin, packing.start[inside], packing.slot[inside], num_rows
            )

    def mean_tokens(self, batch_size: int) -> float:
        """Real tokens of a training batch, on average."""
        return float(self._sizes.mean() * batch_size)

    def share_of_padding(self, batch_size: int, seed: int, num_batches: int = 50) -> float:
        """Share of the tokens of the first training batches that are padding."""
        drawn = [self._sizes[self._drawn(step, batch_size, seed)] for step in range(num_batches)]
        rows = [pack(sizes, self.row_length, self._slots).num_rows for sizes in drawn]
        shown = sum(fitting(count, self.row_counts(batch_size, seed)) for count in rows) * self.row_length
        return 1 - float(sum(sizes.sum() for sizes in drawn)) / shown

    def _batch(
        self, numbers: np.ndarray, rows: np.ndarray, starts: np.ndarray, slots: np.ndarray, num_rows: int
    ) -> dict[str, np.ndarray]:
        """The arrays for units with these numbers at these places."""
        L, S, C = self.row_length, self._slots, self.units.per_unit
        tokens, segments, positions, sequences = np.zeros((4, num_rows, L), np.int32)
        batch = {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "sequences": sequences,
            "first_tokens": np.zeros((num_rows, S, C), np.int32),
            "units": np.full((num_rows, S), -1, np.int32),
            "weights": np.zeros((num_rows, S), np.float32),
        }
        for number, row, start, slot in zip(numbers, rows, starts, slots, strict=True):
            batch["units"][row, slot], batch["weights"][row, slot] = number, 1
            for choice in range(C):
                ids = self.units.tokens[number * C + choice]
                num_first, stop = self.units.num_first[number * C + choice], start + len(ids)
                tokens[row, start:stop] = ids
                segments[row, start + num_first : stop] = 1
                positions[row, start:stop] = np.arange(len(ids))
                sequences[row, start:stop] = 1 + slot * C + choice
                batch["first_tokens"][row, slot, choice] = start
                start = stop
        return batch | self._labels(numbers, rows, starts, slots, num_rows)

    def _labels(
        self, numbers: np.ndarray, rows: np.ndarray, starts: np.ndarray, slots: np.ndarray, num_rows: int
    ) -> dict[str, np.ndarray]:
        given = self.units.labels
        if not given:
            return {}
        if isinstance(given[0], np.ndarray):
            tags = np.full((num_rows, self.row_length), NO_TAG, np.int32)
            for number, row, start in zip(numbers, rows, starts, strict=True):
                tags[row, start : start + len(given[number])] = given[number]
            return {"labels": tags}
        values = np.array([given[number] for number in numbers])
        dtype = np.float32 if values.dtype.kind == "f" else np.int32
        labels = np.zeros((num_rows, self._slots, *values.shape[1:]), dtype)
        is_span = values.ndim == 2
        labels[rows, slots] = values + starts[:, None] if is_span else values
        return {"labels": labels}
