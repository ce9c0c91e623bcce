"""GNMT (Wu et al. 2016, arXiv 1609.08144): deep LSTMs with residual connections, attention from the bottom layer.

All layers of the decoder but the first read whole sentences at once: what attention finds depends on the states of the
first alone. The decoder begins with states of zero, so that it knows the source by attention only.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax.cache import Shared
from core_flax.layers import Dropout, linear
from core_flax.recurrent import LSTM, LSTMState, LSTMWeights, lstm_step, state_after, uniform, zero_state
from core_flax.types import Array
from seq2seq_flax.attention import LOOKED_AT, cross_mask
from seq2seq_flax.config import GNMTConfig
from seq2seq_flax.interface import Drawn, EncoderDecoder
from seq2seq_flax.lstm_attention import AttentionCache
from seq2seq_flax.recurrent import Encoder, States, hidden_of, starts_of
from seq2seq_flax.scores import ScoreWeights, attend, probabilities

FIRST_RESIDUAL = 2
"""Number of the first layer, counted from 0, whose input is added to its output (section 3.1, figure 1)."""


class GNMTEncoder(nn.Module):
    """A layer that reads in both directions, then layers from left to right (sections 3.1 and 3.2)."""

    config: GNMTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BMF: Array, sequences_BM: Array, drawn: Drawn) -> Array:
        """Maps embedded sources [B, M, F] to the memory [B, M, F]."""
        config, starts_BM = self.config, starts_of(sequences_BM)
        shape = config.dropout, config.forget_bias, config.init_limit, self.dtype
        bottom = Encoder(1, 2 * config.width, ("forward", "backward"), *shape, name="bottom")
        x = hidden_of(bottom(x_BMF, sequences_BM, drawn)[0])
        for number in range(1, config.num_layers):
            lstm = LSTM(
                config.width, config.forget_bias, uniform(config.init_limit), self.dtype, name=f"layers_{number}"
            )
            read = lstm(Dropout(config.dropout)(x, **drawn), starts_BL=starts_BM).hidden
            x = read + x if number >= FIRST_RESIDUAL else read
        return x


class AttendingLayer(nn.Module):
    """The decoder's first layer, which reads each token beside what attention finds by its state before that token."""

    config: GNMTConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config, init = self.config, uniform(self.config.init_limit)
        self.lstm = LSTMWeights(config.width, config.forget_bias, init, self.dtype)
        self.attention = ScoreWeights("additive", config.width, init, self.dtype)
        self.dropout, self.inner_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def keys(self, memory_BMF: Array) -> Array:
        """What states are compared with, [B, M, F]: computed once for a source."""
        return self.attention.keys(memory_BMF)

    def __call__(
        self,
        x_BLF: Array,
        source: tuple[Array, Array],
        mask_BLM: Array,
        initial_BF: LSTMState,
        starts_BL: Array,
        drawn: Drawn,
    ) -> tuple[LSTMState, Array]:
        """(States after each token, contexts found before it), [B, L, F].

        Args:
          x_BLF: embedded tokens.
          source: keys and memory, [B, M, F] both.
          mask_BLM: True where a token may look.
          initial_BF: the state before the first token.
          starts_BL: True at tokens that begin a sentence: before them all is forgotten.
          drawn: for dropout.
        """
        width = self.config.width
        inputs, recurrent, bias_4F = self.lstm(2 * width)
        gates_BL4F = linear(self.dropout(x_BLF, **drawn), inputs[:width]).astype(jnp.float32) + bias_4F
        kernel, additive = jnp.concatenate([inputs[width:], recurrent]), self.attention.additive()

        def step(state: LSTMState, now: Any) -> tuple[LSTMState, tuple[LSTMState, Array]]:
            gates_B4F, mask_BM, starts_B, kept_BF = now
            state = jax.tree.map(lambda x: jnp.where(starts_B[:, None], jnp.zeros_like(x), x), state)
            context_BF, _ = attend(state.hidden, *source, mask_BM, additive)
            inside = jnp.concatenate([context_BF * kept_BF, state.hidden], axis=-1)
            gates_B4F += linear(inside, kernel).astype(jnp.float32)
            state = lstm_step(gates_B4F, state.cell, self.dtype)
            return state, (state, context_BF)

        kept_BLF = self.inner_dropout(jnp.ones_like(x_BLF), **drawn)
        sequence = jax.tree.map(lambda x: x.swapaxes(0, 1), (gates_BL4F, mask_BLM, starts_BL, kept_BLF))
        found = jax.tree.map(lambda x: x.swapaxes(0, 1), jax.lax.scan(step, initial_BF, sequence)[1])
        if self.is_mutable_collection(LOOKED_AT):
            before_BLF = jnp.concatenate([initial_BF.hidden[:, None], found[0].hidden[:, :-1]], axis=1)
            query_BLF = jnp.where(starts_BL[..., None], 0, before_BLF)
            self.sow(LOOKED_AT, "probs", probabilities(query_BLF, source[0], mask_BLM, additive))
        return found


class GNMT(EncoderDecoder):
    """The encoder, and a decoder whose layers all read what attention found."""

    config: GNMTConfig = GNMTConfig()

    def setup(self) -> None:
        """Creates the submodules."""
        config, init = self.config, uniform(self.config.init_limit)
        self.embeddings = self.make_tables(init)
        self.encoder, self.bottom = GNMTEncoder(config, self.dtype), AttendingLayer(config, self.dtype)
        lstm = partial(LSTM, config.width, config.forget_bias, init, self.dtype)
        self.decoder = [lstm() for _ in range(config.num_layers - 1)]
        self.dropouts = [Dropout(config.dropout) for _ in range(config.num_layers)]

    def encode(
        self,
        source_BM: Array,
        sequences_BM: Array,
        *,
        positions_BM: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """The memory [B, M, F]; arguments are those of ``__call__``."""
        del positions_BM  # an LSTM counts by itself
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        return self.encoder(self.table("source")(source_BM), sequences_BM, drawn)

    def decode(
        self,
        memory_BMF: Array,
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
        mask_BLM = cross_mask(sequences_BL, source_sequences_BM)[:, 0]
        source = self.bottom.keys(memory_BMF), memory_BMF
        return self._read(target_BL, source, mask_BLM, self._zero(len(target_BL)), starts_of(sequences_BL), drawn)[0]

    def start(self, source_BM: Array, valid_BM: Array, length: int) -> AttentionCache:
        """Reads sources, one to a row; the states have room for any number of target tokens."""
        del length
        memory_BMF = self.encode(source_BM, valid_BM.astype(jnp.int32))
        return AttentionCache(self._zero(len(source_BM)), Shared((self.bottom.keys(memory_BMF), memory_BMF, valid_BM)))

    def extend(
        self, tokens_BL: Array, cache: AttentionCache, num_tokens_B: Array | None = None
    ) -> tuple[Array, AttentionCache]:
        """Reads more target tokens of each row: ([B, L, D], the cache with them)."""
        *source, valid_BM = cache.source.value
        mask_BLM = jnp.broadcast_to(valid_BM[:, None], (len(valid_BM), tokens_BL.shape[1], valid_BM.shape[1]))
        drawn, never = Drawn(row_B=None, deterministic=True), jnp.zeros(tokens_BL.shape, bool)
        x_BLD, states = self._read(tokens_BL, tuple(source), mask_BLM, cache.carry, never, drawn)
        return x_BLD, AttentionCache(state_after(states, cache.carry, num_tokens_B), cache.source)

    def _read(
        self,
        tokens_BL: Array,
        source: tuple[Array, Array],
        mask_BLM: Array,
        initial: States,
        starts_BL: Array,
        drawn: Drawn,
    ) -> tuple[Array, States]:
        embedded_BLF = self.table("target")(tokens_BL)
        bottom, context_BLF = self.bottom(embedded_BLF, source, mask_BLM, initial[0], starts_BL, drawn)
        x_BLF, states = bottom.hidden, [bottom]
        for number, layer in enumerate(self.decoder, start=1):
            inputs = self.dropouts[number - 1](jnp.concatenate([x_BLF, context_BLF], axis=-1), **drawn)
            states.append(layer(inputs, initial[number], starts_BL=starts_BL))
            x_BLF = states[-1].hidden + (x_BLF if number >= FIRST_RESIDUAL else 0)
        return self.dropouts[-1](x_BLF, **drawn), tuple(states)

    def _zero(self, batch_size: int) -> States:
        return (zero_state(batch_size, self.config.width, self.dtype),) * self.config.num_layers
