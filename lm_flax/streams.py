"""Truncated back-propagation: a text as parallel streams that a recurrent model reads on and on, a stretch a step.

The text is cut into as many streams as a batch has rows; step after step each row reads its stream's next stretch, with
the state that it had after the one before (``Task.carry``). So gradients reach back over a stretch, what is remembered
over all of a stream (Zaremba et al. 2014, arXiv 1409.2329, section 4.1). A batch is a pure function of the step, and
the state is part of the train state: a run that is resumed goes on as if it had not stopped. Imports no jax.
"""

from collections.abc import Iterator

import numpy as np

from core_flax.types import Batch, RowNumbers, UserError


class Streams:
    """Batches of a text's stretches; every token of it is predicted once an epoch.

    Args:
      tokens_T: the text.
      before: the token that the text's first is predicted from; None: none is.
      starts_T: True at the tokens of the text before which all is to be forgotten; None: at none.
      num_rows: streams, which is rows of a batch.
      length: tokens of a stretch.

    Raises:
      UserError: the text has fewer tokens than streams.
    """

    def __init__(
        self, tokens_T: np.ndarray, before: int | None, starts_T: np.ndarray | None, num_rows: int, length: int
    ) -> None:
        self._tokens_T, self._starts_T = tokens_T, starts_T
        self._before, self._num_rows, self._length = before, num_rows, length
        self._num_predicted = len(tokens_T) - (before is None)
        if self._num_predicted < num_rows:
            raise UserError(
                f"a text of {len(tokens_T)} tokens, to train on or held out, is too short for {num_rows} streams: "
                "prepare more, or take fewer rows (train's --train.batch-size, evaluate's --batch-size)"
            )
        self._per_row = -(-self._num_predicted // num_rows)

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return -(-self._per_row // self._length)

    def make_batch(self, step: int, rows: RowNumbers) -> Batch:
        """The given rows of the batch of a step.

        "tokens" are read and "labels" predicted, where "weights" is 1 and not 0 (beyond a stream's end); before
        "starts", which the first token of each stream is in every epoch, all is forgotten.
        """
        at_BL = step % self.num_steps * self._length + np.arange(self._length)[None]
        predicted_BL = np.asarray(rows)[:, None] * self._per_row + at_BL
        real_BL = (at_BL < self._per_row) & (predicted_BL < self._num_predicted)
        # Which token of the text is read; -1 is the one before the text.
        read_BL = np.where(real_BL, predicted_BL, 0) - (self._before is not None)
        tokens_BL = np.where(read_BL < 0, self._before or 0, self._tokens_T[np.maximum(read_BL, 0)])
        starts_BL = np.broadcast_to(at_BL == 0, real_BL.shape)
        if self._starts_T is not None:
            starts_BL = starts_BL | ((read_BL >= 0) & self._starts_T[np.maximum(read_BL, 0)])
        return {
            "tokens": tokens_BL.astype(np.int32),
            "labels": self._tokens_T[read_BL + 1].astype(np.int32),
            "weights": real_BL.astype(np.float32),
            "starts": starts_BL & real_BL,
        }

    def in_order(self, num_batches: int = 0) -> Iterator[Batch]:
        """One epoch, or its first batches."""
        for step in range(min(self.num_steps, num_batches or self.num_steps)):
            yield self.make_batch(step, range(self._num_rows))
