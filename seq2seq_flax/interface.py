"""What a model is to the task and to decoding, whatever its architecture."""

from typing import Any, TypedDict

import flax.linen as nn
import jax.numpy as jnp

from core_flax import sharding
from core_flax.layers import Embedding
from core_flax.types import Array

_TABLES = {
    "all": {"source": "token", "target": "token", "output": "token"},
    "target": {"source": "source", "target": "target", "output": "target"},
    "none": {"source": "source", "target": "target", "output": "output"},
}
"""Which embedding table serves as what, by how they are tied."""


class Drawn(TypedDict):
    """What every dropout wants to know."""

    row_B: Array | None
    deterministic: bool


class EncoderDecoder(nn.Module):
    """Embedding tables, and the way from two texts to scores. A model adds what lies between, in four methods:

    - ``encode(source_BM, sequences_BM, *, positions_BM, row_B, deterministic) -> memory``: what the decoder wants to
      know of the sources.
    - ``decode(memory, source_sequences_BM, target_BL, sequences_BL, *, positions_BL, row_B, deterministic) -> x_BLD``:
      hidden states of targets, all positions at once.
    - ``start(source_BM, valid_BM, length) -> cache``: reads sources, one to a row, </s> included and padded on the
      right, and makes room for ``length`` target tokens a row.
    - ``extend(tokens_BL, cache, num_tokens_B) -> (x_BLD, cache)``: as core_flax.cache describes.

    Attributes:
      config: the architecture; here its vocab_size, width and tied_embeddings matter.
      dtype: type of the computation; parameters are float32.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32

    def make_tables(self, embedding_init: nn.initializers.Initializer) -> dict[str, Embedding]:
        """The embedding tables, for ``self.embeddings``."""
        names = dict.fromkeys(_TABLES[self.config.tied_embeddings].values())
        sizes = self.config.vocab_size, self.config.width
        return {name: Embedding(*sizes, embedding_init, self.dtype) for name in names}

    def table(self, which: str) -> Embedding:
        """That of "source", "target" or "output"."""
        return self.embeddings[_TABLES[self.config.tied_embeddings][which]]

    def __call__(
        self,
        source_BM: Array,
        target_BL: Array,
        *,
        source_sequences_BM: Array,
        target_sequences_BL: Array,
        source_positions_BM: Array | None = None,
        target_positions_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Scores of every next token, with several pairs to a row or one.

        Args:
          source_BM: token ids to translate.
          target_BL: token ids of the translation, moved one to the right, after ``<s>``.
          source_sequences_BM: the number of each token's pair in its row, from 1; 0: padding, on the right.
          target_sequences_BL: likewise; a target sees the source of the same number.
          source_positions_BM: each token's place in its sentence; None: its place in the row.
          target_positions_BL: likewise.
          row_B: the row's number in the global batch, for dropout; None: 0, 1, 2 ...
          deterministic: False applies dropout and needs the rng "dropout".

        Returns:
          logits [B, L, V], float32.
        """
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        memory = self.encode(source_BM, source_sequences_BM, positions_BM=source_positions_BM, **drawn)
        x_BLD = self.decode(
            memory, source_sequences_BM, target_BL, target_sequences_BL, positions_BL=target_positions_BL, **drawn
        )
        return self.logits(x_BLD)

    def logits(self, x: Array) -> Array:
        """Scores [..., V], float32, for hidden states [..., D]."""
        logits = self.table("output").logits(x)
        return sharding.constrain(logits, "batch", "length", "vocab_logits") if logits.ndim == 3 else logits
