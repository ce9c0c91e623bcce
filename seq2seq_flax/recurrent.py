"""LSTM to LSTM (Sutskever, Vinyals and Le 2014, arXiv 1409.3215), and what it shares with models that attend.

In rows of several pairs an LSTM forgets all where a sentence begins, in the direction in which it reads; the decoder of
a sentence begins with the state after the last token that the encoder has read of the source of the same number.
Padding stands on the right and is to the encoder a sentence of its own.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax.layers import Dropout
from core_flax.recurrent import LSTM, LSTMState, state_after, states_at, uniform
from core_flax.types import Array
from seq2seq_flax.attention import cross_mask
from seq2seq_flax.config import LSTMSeq2SeqConfig
from seq2seq_flax.interface import Drawn, EncoderDecoder

Directions = dict[str, LSTMState]
"""The states of a layer, [B, M, F] each, by the direction in which it reads: "forward" or "backward"."""

DIRECTIONS = {"backward": ("backward",), "forward": ("forward",), "both": ("forward", "backward")}
"""What --model.reading stands for."""

States = tuple[LSTMState, ...]
"""One for each layer."""


def starts_of(sequences_BL: Array, reverse: bool = False) -> Array:
    """True at the token of each sequence that is read first; ``reverse``: from right to left."""
    changes = sequences_BL[:, 1:] != sequences_BL[:, :-1]
    edge = jnp.ones_like(sequences_BL[:, :1], bool)
    return jnp.concatenate([changes, edge] if reverse else [edge, changes], axis=1)


class Encoder(nn.Module):
    """LSTM layers over sources, each in one direction or in both.

    Attributes:
      num_layers: N.
      width: F, of all directions together.
      directions: "forward", "backward" or both.
      dropout: share dropped from what each layer reads.
      forget_bias, init_limit, dtype: see core_flax.recurrent.
    """

    num_layers: int
    width: int
    directions: tuple[str, ...]
    dropout: float
    forget_bias: float
    init_limit: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BMF: Array, sequences_BM: Array, drawn: Drawn) -> list[Directions]:
        """The states of every layer for inputs [B, M, F]."""
        layers = []
        width = self.width // len(self.directions)
        for number in range(self.num_layers):
            x_BMF, states = Dropout(self.dropout)(x_BMF, **drawn), {}
            for direction in self.directions:
                reverse, name = direction == "backward", f"layers_{number}_{direction}"
                lstm = LSTM(width, self.forget_bias, uniform(self.init_limit), self.dtype, name=name)
                states[direction] = lstm(x_BMF, starts_BL=starts_of(sequences_BM, reverse), reverse=reverse)
            x_BMF = hidden_of(states)
            layers.append(states)
        return layers


def hidden_of(states: Directions) -> Array:
    """Hidden states [B, M, F] of all directions side by side."""
    return jnp.concatenate([each.hidden for each in states.values()], axis=-1)


def last_states(layers: list[Directions], source_sequences_BM: Array, target_sequences_BP: Array) -> States:
    """Every layer's states [B, P, F] after the whole of the sources that belong to some target tokens."""
    same_BPM = cross_mask(target_sequences_BP, source_sequences_BM)[:, 0]
    first_BP = jnp.argmax(same_BPM, axis=-1)
    last_BP = same_BPM.shape[-1] - 1 - jnp.argmax(same_BPM[..., ::-1], axis=-1)
    ends = {"forward": last_BP, "backward": first_BP}

    def side_by_side(*parts: Array) -> Array:
        return jnp.concatenate(parts, axis=-1)

    return tuple(
        jax.tree.map(side_by_side, *(states_at(states, ends[direction]) for direction, states in layer.items()))
        for layer in layers
    )


def states_to_start(layers: list[Directions], valid_BM: Array) -> States:
    """Every layer's state [B, F] after the source of each row: where its target begins."""
    rows_B1 = jnp.ones((len(valid_BM), 1), jnp.int32)
    return jax.tree.map(lambda x: x[:, 0], last_states(layers, valid_BM.astype(jnp.int32), rows_B1))


class LSTMSeq2Seq(EncoderDecoder):
    """An LSTM reads the source, by default from right to left; another one goes on from its states (section 2)."""

    config: LSTMSeq2SeqConfig = LSTMSeq2SeqConfig()

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        self.embeddings = self.make_tables(uniform(config.init_limit))
        directions = DIRECTIONS[config.reading]
        parts = config.dropout, config.forget_bias, config.init_limit, self.dtype
        self.encoder = Encoder(config.num_layers, config.width, directions, *parts)
        layer = partial(LSTM, config.width, config.forget_bias, uniform(config.init_limit), self.dtype)
        self.decoder = [layer() for _ in range(config.num_layers)]
        self.dropouts = [Dropout(config.dropout) for _ in range(config.num_layers + 1)]

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
        begin = last_states(memory, source_sequences_BM, sequences_BL)
        return self._read(target_BL, None, starts_of(sequences_BL), begin, drawn)[0]

    def start(self, source_BM: Array, valid_BM: Array, length: int) -> States:
        """Reads sources, one to a row; the states have room for any number of target tokens."""
        del length
        return states_to_start(self.encode(source_BM, valid_BM.astype(jnp.int32)), valid_BM)

    def extend(self, tokens_BL: Array, cache: States, num_tokens_B: Array | None = None) -> tuple[Array, States]:
        """Reads more target tokens of each row: ([B, L, D], the states after them)."""
        x_BLD, states = self._read(tokens_BL, cache, None, None, Drawn(row_B=None, deterministic=True))
        return x_BLD, state_after(states, cache, num_tokens_B)

    def _read(
        self, tokens_BL: Array, initial: States | None, starts_BL: Array | None, begin: States | None, drawn: Drawn
    ) -> tuple[Array, States]:
        x_BLD, states = self.table("target")(tokens_BL), []
        for number, layer in enumerate(self.decoder):
            before, first = (None if given is None else given[number] for given in (initial, begin))
            x_BLD = self.dropouts[number](x_BLD, **drawn)
            states.append(layer(x_BLD, before, starts_BL=starts_BL, start_BLF=first))
            x_BLD = states[-1].hidden
        return self.dropouts[-1](x_BLD, **drawn), tuple(states)
