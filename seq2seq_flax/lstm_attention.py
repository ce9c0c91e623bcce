"""LSTMs with global attention and input feeding (Luong, Pham and Manning 2015, arXiv 1508.04025)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from core_flax.cache import Shared
from core_flax.layers import Dropout, linear
from core_flax.recurrent import LSTMWeights, lstm_step, state_after, uniform, zero_state
from core_flax.types import Array
from seq2seq_flax.attention import LOOKED_AT, cross_mask
from seq2seq_flax.config import LSTMAttentionConfig
from seq2seq_flax.interface import Drawn, EncoderDecoder
from seq2seq_flax.recurrent import (
    DIRECTIONS,
    Directions,
    Encoder,
    States,
    hidden_of,
    last_states,
    starts_of,
    states_to_start,
)
from seq2seq_flax.scores import ScoreWeights, attend, probabilities


@flax.struct.dataclass
class Carry:
    """What the decoder hands from token to token, [B, F], or has had after each of several, [B, L, F].

    Attributes:
      states: of each layer.
      mixed: what attention made of the token: the "attentional vector" (equation 5).
    """

    states: States
    mixed: Array


@flax.struct.dataclass
class AttentionCache:
    """What decoding carries from step to step; the first dim of every array is the row (see core_flax.cache)."""

    carry: Any
    """The decoder's own."""
    source: Shared
    """(Keys [B, M, F], memory [B, M, F], True at tokens of the source [B, M])."""


class FeedingDecoder(nn.Module):
    """LSTM layers, attention of the last one's state, and its result fed to the first one with the next token."""

    config: LSTMAttentionConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config, init = self.config, uniform(self.config.init_limit)
        lstm = partial(LSTMWeights, config.width, config.forget_bias, init, self.dtype)
        self.layers = [lstm() for _ in range(config.num_layers)]
        self.attention = ScoreWeights(config.score, config.width, init, self.dtype)
        self.mixer = self.param("mixer_kernel", init, (2 * config.width, config.width))
        self.dropout, self.inner_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def keys(self, memory_BMF: Array) -> Array:
        """What states are compared with, [B, M, F]: computed once for a source."""
        return self.attention.keys(memory_BMF)

    def __call__(
        self,
        x_BLF: Array,
        source: tuple[Array, Array],
        mask_BLM: Array,
        initial: Carry,
        starts_BL: Array,
        begin: Carry | None,
        drawn: Drawn,
    ) -> Carry:
        """What is carried after each token.

        Args:
          x_BLF: embedded tokens.
          source: keys and memory, [B, M, F] both.
          mask_BLM: True where a token may look.
          initial: what is carried to the first token.
          starts_BL: True at tokens that begin a sentence, to which ``begin`` is carried instead.
          begin: [B, L, F], looked at there alone.
          drawn: for dropout.
        """
        outer_D4F, weights = self._weights()
        bias_4F = weights.biases[0]
        gates_BL4F = linear(self.dropout(x_BLF, **drawn), outer_D4F).astype(jnp.float32) + bias_4F

        def step(carry: Carry, now: Any) -> tuple[Carry, Carry]:
            gates_B4F, mask_BM, starts_B, begin_BF, kept_BNF = now
            if begin_BF is not None:
                carry = jax.tree.map(lambda new, old: jnp.where(starts_B[:, None], new, old), begin_BF, carry)
            carry = _step(weights, carry, gates_B4F, source, mask_BM, kept_BNF)
            return carry, carry

        sequence = gates_BL4F, mask_BLM, starts_BL, begin, self._kept(x_BLF, drawn)
        sequence = jax.tree.map(lambda x: x.swapaxes(0, 1), sequence)
        carried = jax.tree.map(lambda x: x.swapaxes(0, 1), jax.lax.scan(step, initial, sequence)[1])
        if self.is_mutable_collection(LOOKED_AT):
            query_BLF = carried.states[-1].hidden
            self.sow(LOOKED_AT, "probs", probabilities(query_BLF, source[0], mask_BLM, weights.additive))
        return carried

    def _weights(self) -> tuple[Array, "_Weights"]:
        """(kernel [D, 4, F] of embedded tokens, what steps need)."""
        width, feeds = self.config.width, self.config.input_feeding
        layers = [layer(2 * width if feeds and not number else width) for number, layer in enumerate(self.layers)]
        inputs, recurrent, biases = zip(*layers, strict=True)
        inner = [inputs[0][width:], *inputs[1:]]
        kernels = [jnp.concatenate(both) for both in zip(inner, recurrent, strict=True)]
        return inputs[0][:width], _Weights(kernels, biases, self.mixer.astype(self.dtype), self.attention.additive())

    def _kept(self, x_BLF: Array, drawn: Drawn) -> Array | None:
        """Factors [B, L, N, F] of what each layer reads from within a step: drawn for all steps at once."""
        if drawn["deterministic"] or not self.config.dropout:
            return None
        shape = (*x_BLF.shape[:2], self.config.num_layers, self.config.width)
        return self.inner_dropout(jnp.ones(shape, self.dtype), **drawn)


class _Weights(NamedTuple):
    """What a step computes with: of each layer the kernel of what comes in during the step and then of its own state,
    so that one product takes both; the kernel of context and state; the parameters of an additive score."""

    kernels: Sequence[Array]
    biases: Sequence[Array]
    mixer: Array
    additive: tuple[Array, Array] | None


def _step(
    weights: _Weights,
    carry: Carry,
    gates_B4F: Array,
    source: tuple[Array, Array],
    mask_BM: Array,
    kept_BNF: Array | None,
) -> Carry:
    """One token further; ``gates_B4F`` is what the token itself adds to the gates of the first layer."""
    x_BF, states = carry.mixed, []
    for number, (state, kernel) in enumerate(zip(carry.states, weights.kernels, strict=True)):
        if kept_BNF is not None:
            x_BF *= kept_BNF[:, number]
        # Without input feeding there is no room for x in the kernel of the first layer.
        inside = jnp.concatenate([x_BF, state.hidden], axis=-1)[:, -len(kernel) :]
        outside = weights.biases[number] if number else gates_B4F
        states.append(lstm_step(linear(inside, kernel).astype(jnp.float32) + outside, state.cell, x_BF.dtype))
        x_BF = states[-1].hidden
    context_BF, _ = attend(x_BF, *source, mask_BM, weights.additive)
    mixed_BF = jnp.tanh(linear(jnp.concatenate([context_BF, x_BF], axis=-1), weights.mixer))
    return Carry(tuple(states), mixed_BF)


class LSTMAttention(EncoderDecoder):
    """The encoder of LSTMSeq2Seq; a decoder that starts from its last states and attends to all of its last layer's.

    The score may be Bahdanau's as well. (His decoder attends before its step rather than after it.)
    """

    config: LSTMAttentionConfig = LSTMAttentionConfig()

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        self.embeddings = self.make_tables(uniform(config.init_limit))
        parts = config.dropout, config.forget_bias, config.init_limit, self.dtype
        self.encoder = Encoder(config.num_layers, config.width, DIRECTIONS[config.reading], *parts)
        self.decoder = FeedingDecoder(config, self.dtype)
        self.dropout = Dropout(config.dropout)

    def encode(
        self,
        source_BM: Array,
        sequences_BM: Array,
        *,
        positions_BM: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> list[Directions]:
        """States of every layer after each source token; arguments are those of ``__call__``."""
        del positions_BM  # an LSTM counts by itself
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        return self.encoder(self.table("source")(source_BM), sequences_BM, drawn)

    def decode(
        self,
        memory: list[Directions],
        source_sequences_BM: Array,
        target_BL: Array,
        sequences_BL: Array,
        *,
        positions_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Hidden states [B, L, D] of targets, all positions at once; arguments are those of ``__call__``."""
        del positions_BL
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        embedded_BLF = self.table("target")(target_BL)
        begin = Carry(last_states(memory, source_sequences_BM, sequences_BL), jnp.zeros_like(embedded_BLF))
        mask_BLM = cross_mask(sequences_BL, source_sequences_BM)[:, 0]
        starts_BL, initial = starts_of(sequences_BL), self._zero_carry(len(target_BL))
        carried = self.decoder(embedded_BLF, self._source(memory), mask_BLM, initial, starts_BL, begin, drawn)
        return self.dropout(carried.mixed, **drawn)

    def start(self, source_BM: Array, valid_BM: Array, length: int) -> AttentionCache:
        """Reads sources, one to a row; the states have room for any number of target tokens."""
        del length
        memory = self.encode(source_BM, valid_BM.astype(jnp.int32))
        carry = Carry(states_to_start(memory, valid_BM), self._zero_carry(len(source_BM)).mixed)
        return AttentionCache(carry, Shared((*self._source(memory), valid_BM)))

    def extend(
        self, tokens_BL: Array, cache: AttentionCache, num_tokens_B: Array | None = None
    ) -> tuple[Array, AttentionCache]:
        """Reads more target tokens of each row: ([B, L, D], the cache with them)."""
        *source, valid_BM = cache.source.value
        mask_BLM = jnp.broadcast_to(valid_BM[:, None], (len(valid_BM), tokens_BL.shape[1], valid_BM.shape[1]))
        drawn, never = Drawn(row_B=None, deterministic=True), jnp.zeros(tokens_BL.shape, bool)
        embedded_BLF = self.table("target")(tokens_BL)
        carried = self.decoder(embedded_BLF, tuple(source), mask_BLM, cache.carry, never, None, drawn)
        return carried.mixed, AttentionCache(state_after(carried, cache.carry, num_tokens_B), cache.source)

    def _source(self, memory: list[Directions]) -> tuple[Array, Array]:
        memory_BMF = hidden_of(memory[-1])
        return self.decoder.keys(memory_BMF), memory_BMF

    def _zero_carry(self, batch_size: int) -> Carry:
        zero = zero_state(batch_size, self.config.width, self.dtype)
        return Carry((zero,) * self.config.num_layers, zero.hidden)
