"""Batches for word vectors: text without many of its most frequent words, how far to look around, and noise.

All of it is drawn from counters: a batch is a pure function of (seed, step).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from core_flax.config import check_range
from core_flax.data.order import integers, shuffled, stream, uniform
from core_flax.types import Batch, RowNumbers, UserError


@dataclass(frozen=True)
class WindowsConfig:
    """How text becomes pairs of words."""

    length: int = 128
    """Words of a row, before frequent ones are left out."""
    window: int = 5
    """Farthest word on either side that belongs to a word's context; for each word it is drawn between 1 and this."""
    num_negatives: int = 5
    """Words of noise to tell a word from."""
    subsample: float = 1e-3
    """A word that makes up a share f of the text stays with probability sqrt(subsample / f) (1310.4546, equation 5); 0:
    all stay."""
    noise_power: float = 0.75
    """Noise is drawn by a word's frequency to this power (1310.4546, section 2.2)."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("inputs", self, "length", least=2)
        check_range("inputs", self, "window", "num_negatives", least=1)
        check_range("inputs", self, "subsample", "noise_power", least=0)


class WindowBatches:
    """Batches of rows of a text.

    Args:
      tokens_T: the text's words.
      ends: where each of its documents ends, ascending; no context reaches beyond.
      counts_V: how often each word occurs, in the text that is trained on.
      config: how rows are made.
      seed: of everything that is drawn.
      batch_size: rows of a batch.

    Raises:
      UserError: the text is shorter than one row.
    """

    def __init__(
        self,
        tokens_T: np.ndarray,
        ends: np.ndarray,
        counts_V: np.ndarray,
        config: WindowsConfig,
        seed: int,
        batch_size: int,
    ) -> None:
        if len(tokens_T) < config.length:
            raise UserError(
                f"a text of {len(tokens_T)} tokens, to train on or held out, is shorter than a row of "
                f"{config.length}: prepare more text, or train with a lower --inputs.length"
            )
        self._tokens_T, self._ends, self._config = tokens_T, ends, config
        self._seed, self._batch_size = seed, batch_size
        share_V = counts_V / counts_V.sum()
        rate = np.sqrt(config.subsample / np.maximum(share_V, 1e-30)) if config.subsample else np.ones(len(share_V))
        self._stays_V = np.minimum(1.0, rate)
        noise_V = np.where(counts_V > 0, share_V**config.noise_power, 0.0)
        self._noise_V = np.cumsum(noise_V) / np.cumsum(noise_V)[-1]  # ends with 1 exactly, above every draw

    @property
    def num_rows(self) -> int:
        """Rows of an epoch; the last one may be shorter."""
        return -(-len(self._tokens_T) // self._config.length)

    def make_batch(self, step: int, rows: RowNumbers) -> Batch:
        """The given rows of the batch of a step: epochs of all the text, each in an order and with draws of its own."""
        number = step * self._batch_size + np.asarray(rows)
        epoch = number // self.num_rows
        return self._rows(shuffled(number % self.num_rows, self.num_rows, self._seed, epoch), epoch)

    def in_order(self, num_batches: int = 0) -> Iterator[Batch]:
        """The whole text once, or its first batches; the last one is filled up with rows that hold nothing."""
        stop = self.num_rows if not num_batches else min(self.num_rows, num_batches * self._batch_size)
        for start in range(0, stop, self._batch_size):
            number = np.arange(start, start + self._batch_size)
            batch = dict(self._rows(np.minimum(number, stop - 1), np.zeros_like(number)))
            batch["sequences"] = np.where(number[:, None] < stop, batch["sequences"], 0)
            yield batch

    def _rows(self, row_B: np.ndarray, epoch_B: np.ndarray) -> Batch:
        """Words that stay, moved together; "sequences" tells documents apart and is 0 where a row is at its end."""
        length, config = self._config.length, self._config
        at_BL = row_B[:, None] * length + np.arange(length)
        real_BL = at_BL < len(self._tokens_T)
        at_BL = np.minimum(at_BL, len(self._tokens_T) - 1)
        tokens_BL = self._tokens_T[at_BL].astype(np.int64)
        key_BL = stream(self._seed, epoch_B[:, None], at_BL)
        stays_BL = real_BL & (uniform(key_BL) < self._stays_V[tokens_BL])
        order_BL = np.argsort(~stays_BL, axis=1, kind="stable")
        tokens_BL, key_BL, at_BL, stays_BL = (
            np.take_along_axis(x, order_BL, axis=1) for x in (tokens_BL, key_BL, at_BL, stays_BL)
        )
        document_BL = np.searchsorted(self._ends, at_BL, side="right")
        draws_BLK = uniform(key_BL[..., None], 2 + np.arange(config.num_negatives))
        return {
            "tokens": tokens_BL.astype(np.int32),
            "sequences": np.where(stays_BL, 1 + document_BL, 0).astype(np.int32),
            "reach": (1 + integers(key_BL, 1, config.window)).astype(np.int32),
            "negatives": np.searchsorted(self._noise_V, draws_BLK, side="right").astype(np.int32),
        }
