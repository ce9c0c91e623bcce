"""Pretraining examples: next-sentence pairs and masked words, each a pure function of (seed, epoch, index).

As in BERT (arXiv 1810.04805, section 3.1 and appendix A.2), with one difference: pairs and masks are not drawn once
and stored but drawn anew each epoch. Where an example begins is drawn too, so that in time every sentence opens one.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from core_flax.config import check_range
from core_flax.data import order
from core_flax.data.records import Passages, PassageStore
from core_flax.text.wordpiece import WordPiece
from core_flax.types import Batch, RowNumbers, UserError

_EVAL_SEED = 20181011
"""Held-out examples are the same in every run, whatever its seed."""


_Spans = tuple[np.ndarray, np.ndarray]
"""Where each example's tokens begin and end."""


class _Draw(enum.IntEnum):
    """What a draw decides: the low bits of its counter; the high bits are the position in the sequence, if any."""

    PHASE = 0
    RANDOM_NEXT = enum.auto()
    OTHER_SLOT = enum.auto()
    OTHER_START = enum.auto()
    IS_SHORT = enum.auto()
    SHORT_TARGET = enum.auto()
    SENTENCES_IN_A = enum.auto()
    CUT_FRONT_A = enum.auto()
    CUT_FRONT_B = enum.auto()
    MASK = enum.auto()
    REPLACEMENT = enum.auto()
    RANDOM_TOKEN = enum.auto()

    def at(self, position: np.ndarray) -> np.ndarray:
        """The counter of this decision at each position."""
        return self.value + 16 * position


@dataclass(frozen=True)
class InputsConfig:
    """What a pretraining example looks like. Defaults are those of BERT, at its shorter length."""

    length: int = 128
    """Tokens of an example, [CLS] and two [SEP] included; shorter ones are padded."""
    max_predictions: int = 20
    """Masked tokens per example, at most."""
    long_from_step: int | None = None
    """Step from which on examples are of the model's full length (--model.max-length), with max_predictions in
    proportion; None: never. The paper trains the last tenth of the steps so."""
    mask_rate: float = 0.15
    """Share of an example's tokens that are to be predicted."""
    short_rate: float = 0.1
    """Share of examples that aim at a random shorter length."""
    random_next_rate: float = 0.5
    """Share of examples whose second half is from a random other document."""
    whole_word: bool = False
    """Mask all pieces of a word or none of them."""
    num_workers: int = 0
    """Processes that make batches; 0: threads of the training process."""

    FREE: ClassVar = frozenset({"num_workers"})

    def __post_init__(self) -> None:
        """Raises UserError on values that make no example."""
        check_range("inputs", self, "length", least=8)
        # The length less three special tokens.
        check_range("inputs", self, "max_predictions", least=1, most=self.length - 3)
        check_range("inputs", self, "mask_rate", above=0, below=1)
        check_range("inputs", self, "short_rate", "random_next_rate", least=0, most=1)
        check_range("inputs", self, "long_from_step", "num_workers", least=0)


class PairExamples:
    """The examples of one split of a prepared folder. Threads may share it; it can be pickled.

    A passage of T tokens gives max(1, round(T / (0.75 * (length - 3)))) examples: slots, spaced evenly over its tokens.
    An example begins with the sentence in which its slot begins; all slots of a passage are shifted by a phase that is
    drawn each epoch, up to half a slot in either direction (what would begin before the passage begins with it).

    Attributes:
        num_examples: examples per epoch.
    """

    def __init__(self, store: PassageStore, vocabulary: WordPiece, config: InputsConfig, seed: int, batch_size: int):
        if store.manifest.fingerprint != vocabulary.fingerprint:
            raise UserError(
                f"data folder {store.directory} was made with another tokenizer; run prepare again with --overwrite"
            )
        if store.info.documents < 2:
            raise UserError(
                f"data folder {store.directory} has {store.info.documents} documents in its split {store.split!r}; "
                "next-sentence pairs need at least 2: prepare more text, or another --valid-fraction"
            )
        assert int(store.num_sentences.min()) >= 2, "prepare writes passages of two sentences or more"
        self.store, self.vocabulary, self.config = store, vocabulary, config
        self.seed, self.batch_size = seed, batch_size
        slots = np.maximum(1, np.rint(store.num_tokens / (0.75 * (config.length - 3)))).astype(np.int64)
        self._first_slot = np.concatenate([[0], np.cumsum(slots)])
        self.num_examples = int(self._first_slot[-1])
        self._ordinary_ids = np.setdiff1d(np.arange(vocabulary.num_tokens), vocabulary.special_ids).astype(np.int32)
        self._continues_word = vocabulary.continues_word

    def __reduce__(self) -> tuple:
        return PairExamples, (self.store, self.vocabulary, self.config, self.seed, self.batch_size)

    def make_batch(self, step: int, rows: RowNumbers | None = None) -> Batch:
        """The batch of a training step, or some of its rows (those of one host).

        Args:
            step: from 0. Row r of step s is example number s * batch_size + r of the run; epochs follow each other
                without a gap, each in an order of its own.
            rows: rows of the global batch; None: all.

        Returns:
            The arrays that ``examples`` documents.
        """
        chosen = np.arange(self.batch_size) if rows is None else np.asarray(rows)
        epoch, position = np.divmod(step * self.batch_size + chosen.astype(np.int64), self.num_examples)
        return self.examples(order.shuffled(position, self.num_examples, self.seed, epoch), epoch)

    def examples(self, indices: np.ndarray, epoch: int | np.ndarray) -> dict[str, np.ndarray]:
        """The examples of the given numbers, as they are in the given epoch (one, or one for each).

        Returns:
            tokens: int32 [B, L], ``[CLS] A [SEP] B [SEP]`` with some tokens of A and B masked, padded with [PAD].
            segments: int32 [B, L], 1 for B and its [SEP].
            valid: bool [B, L], whether a token is real.
            masked_positions: int32 [B, P], where to predict, ascending; 0 where there is nothing to predict.
            masked_tokens: int32 [B, P], what stood there.
            masked_weights: float32 [B, P], 1 where there is something to predict.
            next_is_random: int32 [B], 1 if B is from another document than A, 0 if it follows A.
            example_weights: float32 [B], 1.
        """
        key = order.stream(self.seed, epoch, indices, 0)
        is_random = order.uniform(key, _Draw.RANDOM_NEXT) < self.config.random_next_rate
        first, second, tokens = self._segments(key, np.asarray(indices), epoch, is_random)
        batch = self._assemble(first, second, tokens)
        masked = self._mask(key, batch["tokens"], batch.pop("is_text"))
        ones = np.ones(len(key), np.float32)
        return batch | masked | {"next_is_random": is_random.astype(np.int32), "example_weights": ones}

    def _segments(
        self, key: np.ndarray, indices: np.ndarray, epoch: int | np.ndarray, is_random: np.ndarray
    ) -> tuple[_Spans, _Spans, np.ndarray]:
        """Segments A and B of each example, and the tokens that they are spans of."""
        passage = self._passage(indices)
        other_slot = self._slot_of_another_document(passage, order.uniform(key, _Draw.OTHER_SLOT))[is_random]
        other = self._passage(other_slot)
        text = self.store.read(np.concatenate([passage, other]))
        row, other_row = np.split(np.arange(len(passage) + len(other)), [len(passage)])

        # A and what follows it: sentences from the slot on until they reach the target, but two at least.
        phase = order.uniform(order.stream(self.seed, epoch, passage, 1), _Draw.PHASE) - 0.5
        last = text.first_sentence[row + 1] - 1
        start = np.minimum(self._start(text, row, passage, indices, phase), last - 1)
        begin, target = text.begin(start), self._target(key)
        stop = np.clip(np.searchsorted(text.sentence_ends, begin + target) + 1, start + 2, last + 1)
        num_sentences = 1 + order.integers(key, _Draw.SENTENCES_IN_A, stop - start - 1)
        middle, end = text.begin(start + num_sentences), text.begin(stop)

        # B if it is random: sentences of another document until A and B reach the target, but one at least. It begins
        # with no passage's first sentence, since a true B never does: that would give the answer away.
        jitter = order.uniform(key, _Draw.OTHER_START)[is_random]
        b_start = self._start(text, other_row, other, other_slot, jitter)
        b_start = np.maximum(b_start, text.first_sentence[other_row] + 1)
        b_begin, b_size = text.begin(b_start), np.maximum(1, (target - (middle - begin))[is_random])
        b_stop = np.minimum(
            np.searchsorted(text.sentence_ends, b_begin + b_size) + 1, text.first_sentence[other_row + 1]
        )
        b_spans = np.stack([middle, end])
        b_spans[:, is_random] = b_begin, text.begin(b_stop)
        return *self._truncate(key, target, (begin, middle), (b_spans[0], b_spans[1])), text.tokens

    def _passage(self, slot: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_slot, slot, side="right") - 1

    def _slot_of_another_document(self, passage: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """A slot drawn evenly from those of all documents but the passage's own (whose slots follow each other).

        Drawing slots and not documents, random second segments are as often from long documents as true ones are.
        """
        document = self.store.document[passage]
        own_begin = self._first_slot[np.searchsorted(self.store.document, document, side="left")]
        own_end = self._first_slot[np.searchsorted(self.store.document, document, side="right")]
        slot = (fraction * (self.num_examples - (own_end - own_begin))).astype(np.int64)
        return np.where(slot < own_begin, slot, slot + own_end - own_begin)

    def _start(
        self, text: Passages, row: np.ndarray, passage: np.ndarray, slot: np.ndarray, phase: np.ndarray
    ) -> np.ndarray:
        """The sentence in which a slot begins; ``row`` says which of the passages that were read is its own."""
        first, end = self._first_slot[passage], self._first_slot[passage + 1]
        num_tokens = self.store.num_tokens[passage]
        offset = ((slot - first + phase) / (end - first) * num_tokens).astype(np.int64)
        offset = np.clip(offset, 0, num_tokens - 1)
        return np.searchsorted(text.sentence_ends, text.first_token[row] + offset, side="right")

    def _target(self, key: np.ndarray) -> np.ndarray:
        """How many tokens A and B are to have together."""
        longest = self.config.length - 3
        short = 2 + order.integers(key, _Draw.SHORT_TARGET, longest - 1)
        return np.where(order.uniform(key, _Draw.IS_SHORT) < self.config.short_rate, short, longest)

    def _truncate(self, key: np.ndarray, target: np.ndarray, a: _Spans, b: _Spans) -> tuple[_Spans, _Spans]:
        """Shorten the longer of A and B until both fit; what goes is taken from both ends in a random proportion."""
        a_size, b_size = a[1] - a[0], b[1] - b[0]
        a_kept = np.minimum(a_size, np.maximum(target - b_size, (target + 1) // 2))
        b_kept = np.minimum(b_size, target - a_kept)
        a_begin = a[0] + order.integers(key, _Draw.CUT_FRONT_A, a_size - a_kept + 1)
        b_begin = b[0] + order.integers(key, _Draw.CUT_FRONT_B, b_size - b_kept + 1)
        return (a_begin, a_begin + a_kept), (b_begin, b_begin + b_kept)

    def _assemble(self, a: _Spans, b: _Spans, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """``[CLS] A [SEP] B [SEP]``, with segments and which positions are text and which are real."""
        position = np.arange(self.config.length)
        a_end = 1 + (a[1] - a[0])[:, None]  # position of the first [SEP]
        b_end = a_end + 1 + (b[1] - b[0])[:, None]  # position of the second one
        in_b, valid = position > a_end, position <= b_end
        is_text = (position > 0) & (position != a_end) & (position < b_end)
        source = position + np.where(in_b, b[0][:, None] - a_end - 1, a[0][:, None] - 1)
        special = np.where(position == 0, self.vocabulary.cls_id, self.vocabulary.sep_id)
        special = np.where(valid, special, self.vocabulary.pad_id)
        return {
            "tokens": np.where(is_text, tokens[np.where(is_text, source, 0)], special).astype(np.int32),
            "segments": (in_b & valid).astype(np.int32),
            "valid": valid,
            "is_text": is_text,
        }

    def _mask(self, key: np.ndarray, tokens: np.ndarray, is_text: np.ndarray) -> dict[str, np.ndarray]:
        """Choose what to predict, and replace 80 % of it by [MASK] and 10 % by a random token (in a copy)."""
        config = self.config
        num_text = is_text.sum(axis=1)
        wanted = np.maximum(1, np.rint(config.mask_rate * (num_text + 3)))
        wanted = np.minimum(np.minimum(wanted, config.max_predictions), num_text).astype(np.int64)
        positions = self._choose(key, tokens, is_text, wanted)
        rows, columns = np.nonzero(positions < config.length)
        at = positions[rows, columns]
        labels = tokens[rows, at]
        kind = order.uniform(key[rows], _Draw.REPLACEMENT.at(at))
        random = self._ordinary_ids[order.integers(key[rows], _Draw.RANDOM_TOKEN.at(at), len(self._ordinary_ids))]
        tokens = tokens.copy()
        tokens[rows, at] = np.where(kind < 0.8, self.vocabulary.mask_id, np.where(kind < 0.9, random, labels))
        masked = {
            "tokens": tokens,
            "masked_positions": np.zeros(positions.shape, np.int32),
            "masked_tokens": np.zeros(positions.shape, np.int32),
            "masked_weights": np.zeros(positions.shape, np.float32),
        }
        masked["masked_positions"][rows, columns] = at
        masked["masked_tokens"][rows, columns] = labels
        masked["masked_weights"][rows, columns] = 1
        return masked

    def _choose(self, key: np.ndarray, tokens: np.ndarray, is_text: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Positions to predict: int64 [B, P], ascending, ``length`` where there is none."""
        position = np.arange(self.config.length)
        priority = order.uniform(key[:, None], _Draw.MASK.at(position))
        if not self.config.whole_word:
            ranked = np.where(is_text, priority, 2.0).argsort(axis=1)
            chosen = np.broadcast_to(position < wanted[:, None], ranked.shape)
        else:
            # A word has the priority of its first piece, so a stable sort keeps its pieces together.
            inside = is_text & self._continues_word[tokens]
            inside[:, 1:] &= is_text[:, :-1]
            first_piece = np.maximum.accumulate(np.where(inside, 0, position), axis=1)
            priority = np.take_along_axis(priority, first_piece, axis=1)
            ranked = np.where(is_text, priority, 2.0).argsort(axis=1, kind="stable")
            chosen = _whole_words(np.take_along_axis(inside, ranked, axis=1), is_text.sum(axis=1), wanted)
        found = np.sort(np.where(chosen, ranked, self.config.length), axis=1)
        return found[:, : self.config.max_predictions]


def _whole_words(inside: np.ndarray, num_text: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Take words from the left as long as they fit into ``wanted``; one that does not fit is passed over.

    Args:
        inside: bool [B, L], whether a piece continues the word of the piece before it.
        num_text: int [B], how many positions from the left are pieces.
        wanted: int [B], how many pieces to take at most.

    Returns:
        bool [B, L], the pieces taken.
    """
    position = np.arange(inside.shape[1])
    is_text = position < num_text[:, None]
    word = np.cumsum(~inside, axis=1) - 1
    sizes = np.zeros(inside.shape, np.int64)
    np.add.at(sizes, (np.arange(len(inside))[:, None], word), is_text)
    taken = np.zeros(inside.shape, bool)
    left = wanted.copy()
    for number in position:
        taken[:, number] = sizes[:, number] <= left
        left -= sizes[:, number] * taken[:, number]
        if not left.any():
            break
    return np.take_along_axis(taken, word, axis=1) & is_text


def eval_batches(
    store: PassageStore,
    vocabulary: WordPiece,
    config: InputsConfig,
    batch_size: int,
    max_batches: int = 0,
    rows: RowNumbers | None = None,
) -> Iterator[Batch]:
    """Batches for evaluation: every example of the split exactly once, the same in every run.

    Args:
        store: the split, as a rule "valid".
        vocabulary: the tokenizer that the folder was made with.
        config: what an example looks like.
        batch_size: examples in a batch, over all hosts. The last batch is filled up with examples of weight 0.
        max_batches: stop after so many batches (the order is random, so they are a fair sample); 0: all.
        rows: rows of each batch to make (those of one host); None: all.

    Yields:
        Arrays as ``PairExamples.examples`` documents; rows that fill up have example_weights and masked_weights 0.
    """
    examples = PairExamples(store, vocabulary, config, _EVAL_SEED, batch_size)
    num_batches = -(-examples.num_examples // batch_size)
    for step in range(min(num_batches, max_batches) if max_batches else num_batches):
        chosen = step * batch_size + (np.arange(batch_size) if rows is None else np.asarray(rows))
        real = chosen < examples.num_examples
        indices = order.shuffled(np.where(real, chosen, 0), examples.num_examples, _EVAL_SEED)
        batch = examples.examples(indices, 0)
        batch["example_weights"] *= real
        batch["masked_weights"] *= real[:, None]
        yield batch
