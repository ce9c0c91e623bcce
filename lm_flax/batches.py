"""Rows of a stream of tokens, and batches of them: pure functions of (seed, step). Imports no jax.

Every token is predicted from those before it, the first of a document from the token that ends documents: what is read
is the stream moved on by one. Rows are cut in order, one behind the other, whatever documents are in them, so every
position of a row is real. With packing "documents", tokens of different documents are told apart.
"""

from collections.abc import Iterator

import numpy as np

from core_flax.data.order import integers, shuffled, stream
from core_flax.types import Batch, RowNumbers, UserError
from lm_flax.config import InputsConfig


class Rows:
    """Rows of a text.

    Args:
      tokens_T: the text.
      ends: where its documents end, ascending.
      before: what stands before its first token, and before that of each document which is told apart: the token that
        ends documents, unless a model has another. None: nothing does, and then the first token is not predicted.
      inputs: what a row is.
    """

    def __init__(self, tokens_T: np.ndarray, ends: np.ndarray, before: int | None, inputs: InputsConfig) -> None:
        self._tokens_T, self._before, self.length = tokens_T, before, inputs.length
        self._first = int(before is None)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        # One document alone needs no telling apart.
        self._starts = starts if inputs.packing == "documents" and len(ends) > 1 else None

    @property
    def num_predicted(self) -> int:
        """Tokens that are predicted."""
        return max(0, len(self._tokens_T) - self._first)

    def at(self, starts_B: np.ndarray, weights_BL: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Rows that begin with the predicted tokens of these numbers.

        Args:
          starts_B: int [B], from 0 up to num_predicted - 1.
          weights_BL: what the tokens count; None: 1.

        Returns:
          "tokens" (read) and "labels" (predicted), int32 [B, L]; "weights", float32, 0 beyond the text; with documents
          to tell apart "sequences", from 1 in each row, and "positions", int32.
        """
        place_BL = self._first + np.asarray(starts_B, np.int64)[:, None] + np.arange(self.length)
        real_BL = place_BL < len(self._tokens_T)
        place_BL = np.where(real_BL, place_BL, self._first)
        read_BL = np.asarray(self._tokens_T[np.maximum(place_BL - 1, 0)], np.int32)
        if self._before is not None:
            read_BL = np.where(place_BL == 0, np.int32(self._before), read_BL)
        weights_BL = real_BL.astype(np.float32) if weights_BL is None else weights_BL * real_BL
        batch = {
            "tokens": np.where(real_BL, read_BL, 0).astype(np.int32),
            "labels": np.where(real_BL, self._tokens_T[place_BL], 0).astype(np.int32),
            "weights": weights_BL.astype(np.float32),
        }
        if self._starts is None:
            return batch
        document_BL = np.searchsorted(self._starts, place_BL, side="right") - 1
        first_BL = np.maximum(self._starts[document_BL], place_BL[:, :1])
        if self._before is not None:
            is_first_BL = real_BL & (place_BL == self._starts[document_BL])
            batch["tokens"] = np.where(is_first_BL, np.int32(self._before), batch["tokens"])
        sequences_BL = np.where(real_BL, 1 + document_BL - document_BL[:, :1], 0)
        positions_BL = np.where(real_BL, place_BL - first_BL, 0)
        return batch | {"sequences": sequences_BL.astype(np.int32), "positions": positions_BL.astype(np.int32)}


class TextBatches:
    """Training batches of a text.

    Args:
      rows: the text's rows.
      order: InputsConfig.order, "shuffled" or "random".
      seed: of everything that is drawn.
      batch_size: rows of a batch.

    Raises:
      UserError: the text is shorter than one row.
    """

    def __init__(self, rows: Rows, order: str, seed: int, batch_size: int) -> None:
        self._rows, self._order, self._seed, self._batch_size = rows, order, seed, batch_size
        spare = rows.num_predicted - rows.length
        if spare < 0:
            raise UserError(
                f"the text has {rows.num_predicted} tokens to predict, a row {rows.length}: prepare more text or set "
                "--inputs.length lower"
            )
        # Rows of an epoch: so many that they can begin at each of ``length`` places, if the text has more than one row.
        self.num_rows = max(1, (spare + 1) // rows.length)

    def make_batch(self, step: int, rows: RowNumbers) -> Batch:
        """The given rows of the batch of a step."""
        return self._rows.at(self.starts(step, rows))

    def starts(self, step: int, rows: RowNumbers) -> np.ndarray:
        """Where those rows begin, int [rows].

        In an epoch of shuffled rows every token comes once, but for fewer than two rows at the ends, which are others
        in each epoch.
        """
        number = step * self._batch_size + np.asarray(rows)
        spare = self._rows.num_predicted - self._rows.length
        if self._order == "random":
            return integers(stream(self._seed, number), 0, spare + 1)
        epoch = number // self.num_rows
        row = shuffled(number % self.num_rows, self.num_rows, self._seed, epoch)
        left = self._rows.num_predicted - self.num_rows * self._rows.length
        return row * self._rows.length + integers(stream(self._seed, epoch), 1, left + 1)


def in_order(rows: Rows, batch_size: int, max_batches: int = 0, stride: int | None = None) -> Iterator[Batch]:
    """The whole text, every token counted once; the last batch is filled up with rows that count nothing.

    Args:
      rows: the text's rows.
      batch_size: rows of a batch.
      max_batches: stop after so many; 0: all.
      stride: how far a row begins behind the one before, at most its length, of which only the last so many tokens
        count then: each is predicted from at least length - stride tokens before it. None: the length.
    """
    length = rows.length
    stride = stride or length
    num_rows = 1 + max(0, -(-(rows.num_predicted - length) // stride))
    later = np.arange(length) >= length - stride
    num_batches = -(-num_rows // batch_size)
    for number in range(min(num_batches, max_batches or num_batches)):
        row_B = number * batch_size + np.arange(batch_size)
        real_B = row_B < num_rows
        counts_BL = real_B[:, None] & (later | (row_B == 0)[:, None])
        yield rows.at(np.where(real_B, row_B, 0) * stride, counts_BL)
