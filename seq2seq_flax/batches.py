"""Batches of sentence pairs, several to a row: a budget of tokens, hardly any padding, two shapes to compile.

How a step's pairs are chosen: the pairs, sorted by length, are cut into as many strata as a step takes pairs, and a
step takes one pair of each stratum, by a permutation of the stratum that the epoch decides. So every pair comes once in
an epoch, at a random step; all steps are of nearly the same size, whatever the lengths; and the pairs of a step are a
function of (lengths, seed, epoch, step) that needs no plan of the epoch and nothing to save.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from core_flax.data import order
from core_flax.data.packing import fitting
from core_flax.types import Batch, UserError
from seq2seq_flax.config import InputsConfig
from seq2seq_flax.pairs import PairStore

SAMPLED_STEPS = 48
"""Steps that are packed on trial to learn how many pairs a step can take."""
_IN_ORDER_PAIRS = 1024
"""Held-out pairs are packed so many at a time: the work grows with their square."""
_IMBALANCE = 2.0
"""What room on one side alone counts, against room on both."""
_ROOM_STEP = 8
"""Row lengths are multiples of this."""


@dataclass(frozen=True)
class PairPacking:
    """Where each of n pairs lies.

    Attributes:
      row: int [n].
      source_start, target_start: int [n], first position of the pair's source and target in their rows.
      slot: int [n], how many pairs of the row lie before it.
      num_rows: rows in use.
    """

    row: np.ndarray
    source_start: np.ndarray
    target_start: np.ndarray
    slot: np.ndarray
    num_rows: int


def pack_pairs(source_lengths: np.ndarray, target_lengths: np.ndarray, capacity: tuple[int, int]) -> PairPacking:
    """Pairs into rows that have room for so many source and so many target tokens, row by row.

    A row begins with the largest pair left (its size is the larger of the shares that its sides take of a row), and
    then takes, of the pairs that fit, the one that leaves least room, and as equal on both sides as can be: room on one
    side alone is lost. Where both sides count, that wastes half as much as best fit (a kind of the "bin-centric"
    heuristics of Panigrahy et al. 2011, "Heuristics for Vector Bin Packing"). Equal pairs go in the order given.

    Args:
      source_lengths: int [n].
      target_lengths: int [n].
      capacity: (source, target) tokens of a row.

    Raises:
      ValueError: a pair that no row can hold.
    """
    lengths = np.stack([source_lengths, target_lengths], axis=1).astype(np.int64)
    shares = lengths / capacity
    if shares.size and shares.max() > 1:
        worst = lengths[shares.max(axis=1).argmax()]
        raise ValueError(f"a pair of {worst[0]} and {worst[1]} tokens does not fit rows of {capacity}")
    row, slot = np.zeros((2, len(lengths)), np.int64)
    start = np.zeros((len(lengths), 2), np.int64)
    left = np.lexsort((-shares.sum(axis=1), -shares.max(axis=1)))
    num_rows = 0
    while len(left):
        used, count, chosen = np.zeros(2, np.int64), 0, 0
        while True:
            pair = left[chosen]
            row[pair], start[pair], slot[pair] = num_rows, used, count
            used, count, left = used + lengths[pair], count + 1, np.delete(left, chosen)
            room = (capacity - used - lengths[left]) / capacity
            fits = np.flatnonzero((room >= 0).all(axis=1))
            if not len(fits):
                break
            room = room[fits]
            chosen = fits[(room.sum(axis=1) + _IMBALANCE * np.abs(room[:, 0] - room[:, 1])).argmin()]
        num_rows += 1
    return PairPacking(row, start[:, 0], start[:, 1], slot, num_rows)


class PairBatches:
    """The batches of a split. A batch is a pure function of the step.

    Its arrays, R rows of M source and L target tokens:
      source_tokens: int32 [R, M].
      source_positions: int32 [R, M], which start anew with each sentence.
      source_sequences: int32 [R, M], the pair's number in its row, from 1; 0: padding.
      target_inputs: int32 [R, L], each target moved one to the right, after ``<s>``.
      target_labels: int32 [R, L], what is to be predicted there.
      target_positions, target_sequences: int32 [R, L], likewise; a source and its target have the same number.

    Attributes:
      store: the pairs.
      capacity: (M, L).
      pairs_per_step: pairs of a training step; now and then one or a few less, if they do not divide the corpus.
    """

    def __init__(
        self, store: PairStore, inputs: InputsConfig, num_rows: int, bos_id: int, row_multiple: int = 1
    ) -> None:
        """Batches of ``num_rows`` rows; should one need more, their number divides by ``row_multiple``.

        Raises:
          UserError: the longest pair does not fit a row.
        """
        self.store, self.packed, self.num_rows, self.bos_id = store, inputs.packing, num_rows, bos_id
        self.capacity = row_capacity(store, inputs.row_length)
        self._multiple = row_multiple
        lengths = np.stack([store.source_lengths, store.target_lengths], axis=1).astype(np.int64)
        self._lengths = lengths
        # Pairs of one size in an order of no meaning, so that a stratum is not a stretch of the corpus.
        chance = order.mix(np.arange(len(store)))
        self._sorted = np.lexsort((chance, lengths[:, 1], lengths.sum(axis=1)))
        num_steps = -(-len(store) // min(self._most_pairs(), len(store)))
        self.pairs_per_step = -(-len(store) // num_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every pair comes once."""
        return -(-len(self.store) // self.pairs_per_step)

    def drawn(self, step: int, seed: int) -> np.ndarray:
        """Which pairs a training step takes: one of each stratum, none where a stratum has one pair less."""
        return self._drawn(step, seed, self.pairs_per_step)

    def _drawn(self, step: int, seed: int, num_strata: int) -> np.ndarray:
        num_pairs = len(self.store)
        num_steps = -(-num_pairs // num_strata)
        epoch, place = divmod(step, num_steps)
        begins = np.arange(num_strata + 1) * num_pairs // num_strata
        # Every stratum its own permutation: an epoch number that no other (stratum, epoch) has.
        numbers = epoch * num_strata + np.arange(num_strata)
        chosen = order.shuffled(np.full(num_strata, place), num_steps, seed, numbers)
        inside = chosen < np.diff(begins)
        return self._sorted[(begins[:-1] + chosen)[inside]]

    def _most_pairs(self) -> int:
        """As many pairs a step as fit the rows, at all of the steps looked at."""
        if not self.packed:
            return self.num_rows
        mean = self._lengths.mean(axis=0)
        many = max(2, int((self.num_rows * np.array(self.capacity) / mean).min()) + 2)
        few = many * 9 // 10 if self._fits(min(many * 9 // 10, len(self.store))) else 1
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self._fits(min(middle, len(self.store))) else (few, middle)
        return few

    def _fits(self, num_pairs: int) -> bool:
        steps = range(min(SAMPLED_STEPS, -(-len(self.store) // num_pairs)))
        return all(self._pack(self._drawn(step, 0, num_pairs)).num_rows <= self.num_rows for step in steps)

    def _pack(self, numbers: np.ndarray) -> PairPacking:
        lengths = self._lengths[numbers]
        if self.packed:
            return pack_pairs(lengths[:, 0], lengths[:, 1], self.capacity)
        nothing = np.zeros(len(numbers), np.int64)
        return PairPacking(np.arange(len(numbers)), nothing, nothing, nothing, len(numbers))

    def make_batch(self, step: int, seed: int) -> Batch:
        """The pairs of a training step, drawn without replacement within each epoch, packed into rows."""
        numbers = self.drawn(step, seed)
        packing = self._pack(numbers)
        # Rarely does a step need more rows than those looked at beforehand: a second shape, and one for any case.
        sizes = (self.num_rows, self._rounded(self.num_rows * 9 // 8), self._rounded(max(len(numbers), self.num_rows)))
        return self._batch(numbers, packing, fitting(packing.num_rows, tuple(sorted(sizes))))

    def _rounded(self, num_rows: int) -> int:
        return -(-num_rows // self._multiple) * self._multiple

    def in_order(self, num_rows: int, num_batches: int = 0) -> Iterator[Batch]:
        """Every pair once, in batches of ``num_rows`` rows, whatever fits best side by side; 0: all batches."""
        packing = self._pack_all()
        count = -(-packing.num_rows // num_rows)
        for number in range(min(count, num_batches) if num_batches else count):
            begin = number * num_rows
            inside = np.flatnonzero((packing.row >= begin) & (packing.row < begin + num_rows))
            row, source_start = packing.row[inside] - begin, packing.source_start[inside]
            part = PairPacking(row, source_start, packing.target_start[inside], packing.slot[inside], num_rows)
            yield self._batch(inside, part, num_rows)

    def _pack_all(self) -> PairPacking:
        """The whole split, portion by portion; the rows of one portion follow those of the one before."""
        starts = range(0, len(self.store), _IN_ORDER_PAIRS)
        parts = [self._pack(np.arange(start, min(start + _IN_ORDER_PAIRS, len(self.store)))) for start in starts]
        first_rows = np.cumsum([0, *(part.num_rows for part in parts)])
        return PairPacking(
            np.concatenate([part.row + first for part, first in zip(parts, first_rows[:-1], strict=True)]),
            np.concatenate([part.source_start for part in parts]),
            np.concatenate([part.target_start for part in parts]),
            np.concatenate([part.slot for part in parts]),
            int(first_rows[-1]),
        )

    def mean_tokens(self) -> tuple[float, float]:
        """(source, target) tokens of a training step that are no padding, on average."""
        source, target = self._lengths.sum(axis=0) / self.steps_per_epoch
        return float(source), float(target)

    def share_of_padding(self, seed: int, num_steps: int = 50) -> float:
        """Share of the tokens of the first training batches, sources and targets, that is padding."""
        batches = [self.make_batch(step, seed) for step in range(num_steps)]
        names = ("source_sequences", "target_sequences")
        padding = sum(np.count_nonzero(batch[name] == 0) for batch in batches for name in names)
        return padding / sum(batch[name].size for batch in batches for name in names)

    def _batch(self, numbers: np.ndarray, packing: PairPacking, num_rows: int) -> dict[str, np.ndarray]:
        """The arrays for pairs with these numbers at these places."""
        source, source_positions, source_sequences = np.zeros((3, num_rows, self.capacity[0]), np.int32)
        inputs, labels, positions, sequences = np.zeros((4, num_rows, self.capacity[1]), np.int32)
        pairs = self.store.read(numbers)
        for place, (source_ids, target_ids) in enumerate(pairs):
            row, begin, number = packing.row[place], packing.source_start[place], packing.slot[place] + 1
            inside = slice(begin, begin + len(source_ids))
            source[row, inside] = source_ids
            source_positions[row, inside] = np.arange(len(source_ids))
            source_sequences[row, inside] = number
            begin = packing.target_start[place]
            inside = slice(begin, begin + len(target_ids))
            inputs[row, inside] = [self.bos_id, *target_ids[:-1]]
            labels[row, inside] = target_ids
            positions[row, inside] = np.arange(len(target_ids))
            sequences[row, inside] = number
        return {
            "source_tokens": source,
            "source_positions": source_positions,
            "source_sequences": source_sequences,
            "target_inputs": inputs,
            "target_labels": labels,
            "target_positions": positions,
            "target_sequences": sequences,
        }


def row_capacity(store: PairStore, row_length: int) -> tuple[int, int]:
    """(source, target) tokens of a row: ``row_length`` for the side with more tokens, in proportion for the other.

    Raises:
      UserError: the longest sentence does not fit.
    """
    longest = np.array([store.source_lengths.max(), store.target_lengths.max()])
    if longest.max() > row_length:
        least = -(-int(longest.max()) // _ROOM_STEP) * _ROOM_STEP
        raise UserError(
            f"--inputs.row-length {row_length} is shorter than the longest sentence, {longest.max()} tokens: choose "
            f"{least} or more, or prepare the data with a lower --max-length"
        )
    tokens = np.array([store.source_lengths.sum(), store.target_lengths.sum()], float)
    # To the nearest multiple: rounded up, the side would be padded by what was added, in every row.
    nearest = np.round(row_length * tokens / tokens.max() / _ROOM_STEP).astype(int) * _ROOM_STEP
    wanted = np.maximum(nearest, -(-longest // _ROOM_STEP) * _ROOM_STEP)
    source, target = (min(row_length, int(side)) for side in wanted)
    return source, target
