"""The LSTM language model (Zaremba, Sutskever and Vinyals 2014, arXiv 1409.2329)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from core_flax.config import check_range
from core_flax.layers import Dropout, Embedding
from core_flax.recurrent import LSTM, LSTMState, state_after, uniform, zero_state
from core_flax.types import Array
from lm_flax.output import BiasedOutput, output_table

States = tuple[LSTMState, ...]
"""One for each layer."""


@dataclass(frozen=True)
class LSTMConfig:
    """The architecture: the paper's with these sizes."""

    vocab_size: int = 10_000
    """Entries of the token embedding and of the output layer. Left at the preset's, it becomes the size of the data's
    vocabulary; a larger one pads the tables."""
    num_layers: int = 2
    """LSTM layers."""
    width: int = 200
    """Width of embeddings, hidden states and cells."""
    dropout: float = 0.0
    """Share dropped from what goes into each layer and out of the last: never from what a layer hands to its own next
    step (section 3.1)."""
    init_limit: float = 0.1
    """Every parameter begins uniformly between minus this and this."""
    forget_bias: float = 0.0
    """Added to the bias of the forget gate at the start; 1 keeps what was read (Jozefowicz et al. 2015)."""

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        check_range("model", self, "vocab_size", "num_layers", "width", least=1)
        check_range("model", self, "dropout", least=0, below=1)
        check_range("model", self, "init_limit", above=0)
        check_range("model", self, "forget_bias")


class LSTMLanguageModel(nn.Module):
    """Token embedding, N LSTM layers, an output layer of its own, with dropout in between.

    Its methods beside ``__call__`` and ``go_on`` are those that ``core_flax.cache`` describes; its cache is ``States``.

    Attributes:
      config: the architecture.
      dtype: type of the products; parameters, gates and cells are float32.
    """

    config: LSTMConfig = LSTMConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        init = uniform(config.init_limit)
        self.token = Embedding(config.vocab_size, config.width, init, self.dtype)
        self.layers = [
            LSTM(config.width, forget_bias=config.forget_bias, param_init=init, dtype=self.dtype)
            for _ in range(config.num_layers)
        ]
        self.dropout = [Dropout(config.dropout) for _ in range(config.num_layers + 1)]
        self.head = BiasedOutput(config.vocab_size, config.width, init, init, self.dtype)

    def __call__(
        self,
        tokens_BL: Array,
        *,
        positions_BL: Array | None = None,
        sequences_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Reads sequences, one to a row or, with ``sequences_BL``, several.

        Args:
          tokens_BL: token ids.
          positions_BL: as in GPT2; nothing depends on it.
          sequences_BL: equal where tokens are of one sequence: all is forgotten in between. None: a row is a sequence.
          row_B: the example's number in the global batch, for dropout; None: 0, 1, 2 ...
          deterministic: False applies dropout and needs the rng "dropout".

        Returns:
          Hidden states [B, L, D + 1], from each of which ``logits`` predicts the token after.
        """
        starts_BL = None
        if sequences_BL is not None:
            starts_BL = jnp.pad(sequences_BL[:, 1:] != sequences_BL[:, :-1], ((0, 0), (1, 0)))
        zero = self.init_cache(tokens_BL.shape[0], 0)
        return self._read(tokens_BL, zero, starts_BL, None, row_B, deterministic)[0]

    def go_on(
        self,
        tokens_BL: Array,
        states: States,
        starts_BL: Array,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, States]:
        """Reads on from where rows were: (as __call__, the states after the last token).

        Args:
          tokens_BL: token ids.
          states: what was returned for the tokens before.
          starts_BL: True at tokens that begin a sequence: before them all is forgotten.
          row_B: as in __call__.
          deterministic: likewise.
        """
        return self._read(tokens_BL, states, starts_BL, None, row_B, deterministic)

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int) -> States:
        """The states before anything is read; they have room for any number of tokens."""
        del length
        return tuple(zero_state(batch_size, self.config.width, self.dtype) for _ in range(self.config.num_layers))

    def extend(self, tokens_BL: Array, cache: States, num_tokens_B: Array | None = None) -> tuple[Array, States]:
        """Reads more tokens of each row: ([B, L, D + 1], the states after them)."""
        return self._read(tokens_BL, cache, None, num_tokens_B, None, True)

    def logits(self, x: Array) -> Array:
        """Scores [..., V] of the next token, float32, for hidden states [..., D + 1]."""
        return self.head.logits(x)

    @nn.nowrap
    def output_table(self, params: Mapping[str, Any]) -> Array:
        """[V, D + 1], whose product with hidden states is ``logits``, for losses that compute it in chunks."""
        return output_table(params["head"])

    def _read(
        self,
        tokens_BL: Array,
        states: States,
        starts_BL: Array | None,
        num_tokens_B: Array | None,
        row_B: Array | None,
        deterministic: bool,
    ) -> tuple[Array, States]:
        drop = [partial(dropout, row_B=row_B, deterministic=deterministic) for dropout in self.dropout]
        x_BLD, following = self.token(tokens_BL), []
        for number, (layer, before) in enumerate(zip(self.layers, states, strict=True)):
            after = layer(drop[number](x_BLD), before, starts_BL=starts_BL)
            following.append(state_after(after, before, num_tokens_B))
            x_BLD = after.hidden
        return self.head(drop[-1](x_BLD)), tuple(following)


def flops_per_example(config: LSTMConfig, length: int) -> float:
    """Operations of one training sequence, forward and backward; counted as in lm_flax.model."""
    return 6.0 * length * (config.num_layers * 8 * config.width**2 + config.width * config.vocab_size)
