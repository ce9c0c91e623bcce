"""Language models that see a window: gated convolutions, and with one layer of tanh the first neural one.

- Gated: Dauphin, Fan, Auli and Grangier 2017, "Language Modeling with Gated Convolutional Networks", arXiv 1612.08083,
  without their weight normalisation and bottlenecks; residuals are scaled as in Gehring et al. 2017, arXiv 1705.03122,
  section 3.5.
- One layer, not gated: Bengio, Ducharme, Vincent and Jauvin 2003, "A Neural Probabilistic Language Model", JMLR 3,
  section 2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import sharding
from core_flax.config import check_range
from core_flax.layers import Dropout, Embedding, Linear
from core_flax.types import Array, UserError
from lm_flax.output import BiasedOutput, output_table

Windows = tuple[Array, ...]
"""The last inputs [B, K - 1, D] of each layer, K being its kernel's width; zeros before the first token."""


@dataclass(frozen=True)
class ConvConfig:
    """The architecture: causal convolutions over token embeddings, as many layers as wanted."""

    vocab_size: int = 10_000
    """Entries of the token embedding and of the output layer. Left at the preset's, it becomes the size of the data's
    vocabulary; a larger one pads the tables."""
    num_layers: int = 6
    """Convolutions, one on the other; from the second on each is added to its input. All together see
    1 + num_layers x (kernel_width - 1) tokens."""
    embedding_width: int = 256
    """Width of the token embedding."""
    width: int = 256
    """Outputs of each layer."""
    kernel_width: int = 4
    """Tokens that a layer sees: one and those before it. (Bengio's order n counts the predicted token as well.)"""
    gated: bool = True
    """Each output times the sigmoid of another (gated linear units). False: tanh."""
    direct: bool = False
    """The embeddings that the first layer sees go to the output layer, too (Bengio's W, "direct connections")."""
    dropout: float = 0.1
    """Share dropped from the embeddings and from the output of every layer."""
    init_stddev: float = 0.1
    """Standard deviation of the normal that embedding and output layer start from; kernels keep their input's scale."""

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        sizes = ("vocab_size", "num_layers", "embedding_width", "width", "kernel_width")
        check_range("model", self, *sizes, least=1)
        check_range("model", self, "dropout", least=0, below=1)
        check_range("model", self, "init_stddev", above=0)
        if self.num_layers * (self.kernel_width - 1) == 0:
            raise UserError("--model.kernel-width 1 sees one token only; give 2 or more")

    @property
    def input_widths(self) -> tuple[int, ...]:
        """Of each layer."""
        return (self.embedding_width, *(self.width,) * (self.num_layers - 1))

    @property
    def output_width(self) -> int:
        """Of the hidden states, without the 1 at their end."""
        return self.width + (self.kernel_width * self.embedding_width if self.direct else 0)


class ConvLanguageModel(nn.Module):
    """Token embedding, N causal convolutions, an output layer of its own.

    Its methods beside ``__call__`` are those that ``core_flax.cache`` describes; its cache is ``Windows``.

    Attributes:
      config: the architecture.
      dtype: type of the computation; parameters are float32.
    """

    config: ConvConfig = ConvConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        table_init = nn.initializers.normal(config.init_stddev)
        self.token = Embedding(config.vocab_size, config.embedding_width, table_init, self.dtype)
        # A sigmoid halves what it gates, so twice the scale keeps it (Gehring et al. 2017, section 3.5).
        kernel_init = nn.initializers.variance_scaling(4.0 if config.gated else 1.0, "fan_in", "normal")
        features = (2 if config.gated else 1, config.width)
        self.layers = [
            Linear(features, kernel_init=kernel_init, dtype=self.dtype, num_inputs=2) for _ in range(config.num_layers)
        ]
        self.dropout = [Dropout(config.dropout) for _ in range(config.num_layers + 1)]
        self.head = BiasedOutput(config.vocab_size, config.output_width, table_init, dtype=self.dtype)

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
          sequences_BL: equal where tokens are of one sequence, which alone see each other. None: a row is a sequence.
          row_B: the example's number in the global batch, for dropout; None: 0, 1, 2 ...
          deterministic: False applies dropout and needs the rng "dropout".

        Returns:
          Hidden states [B, L, D + 1], from each of which ``logits`` predicts the token after.
        """
        seen_BLK = None if sequences_BL is None else _same_sequence(sequences_BL, self.config.kernel_width)
        zero = self.init_cache(tokens_BL.shape[0], 0)
        return self._read(tokens_BL, zero, seen_BLK, None, row_B, deterministic)[0]

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int) -> Windows:
        """Windows before anything is read; they have room for any number of tokens."""
        del length
        past = self.config.kernel_width - 1
        return tuple(jnp.zeros((batch_size, past, width), self.dtype) for width in self.config.input_widths)

    def extend(self, tokens_BL: Array, cache: Windows, num_tokens_B: Array | None = None) -> tuple[Array, Windows]:
        """Reads more tokens of each row: ([B, L, D + 1], the windows that end with them)."""
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
        windows: Windows,
        seen_BLK: Array | None,
        num_tokens_B: Array | None,
        row_B: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Windows]:
        config, following = self.config, []
        drop = [partial(dropout, row_B=row_B, deterministic=deterministic) for dropout in self.dropout]
        x_BLD = embedded_BLD = drop[0](self.token(tokens_BL))
        for number, (layer, past_BMD) in enumerate(zip(self.layers, windows, strict=True)):
            following.append(_last(past_BMD, x_BLD, num_tokens_B))
            out_BLGF = layer(_windows(past_BMD, x_BLD, seen_BLK))
            out_BLGF = sharding.constrain(out_BLGF, "batch", "length", "small", "mlp")
            out_BLD = drop[number + 1](_gate(out_BLGF) if config.gated else jnp.tanh(out_BLGF[:, :, 0]))
            x_BLD = out_BLD if number == 0 else (x_BLD + out_BLD) * 0.5**0.5
            x_BLD = sharding.constrain(x_BLD, "batch", "length", "width")
        if config.direct:
            seen_BLKD = _windows(windows[0], embedded_BLD, seen_BLK)
            x_BLD = jnp.concatenate([x_BLD, seen_BLKD.reshape(*x_BLD.shape[:2], -1)], axis=-1)
        return self.head(x_BLD), tuple(following)


def _gate(x_BLGF: Array) -> Array:
    """Gated linear units (Dauphin et al. 2017, equation 1)."""
    return x_BLGF[:, :, 0] * jax.nn.sigmoid(x_BLGF[:, :, 1])


def _windows(past_BMD: Array, x_BLD: Array, seen_BLK: Array | None) -> Array:
    """[B, L, K, D]: the K inputs up to each, of which those that are not seen are zero, as those before the first are.

    A product with these is a convolution; the kernel's last entry meets the newest input.
    """
    length, together = x_BLD.shape[1], jnp.concatenate([past_BMD, x_BLD], axis=1)
    windows = jnp.stack([together[:, k : k + length] for k in range(past_BMD.shape[1] + 1)], axis=2)
    return windows if seen_BLK is None else jnp.where(seen_BLK[..., None], windows, 0)


def _same_sequence(sequences_BL: Array, kernel_width: int) -> Array:
    """[B, L, K]: whether each of the K tokens up to a token is of its sequence."""
    past_BM = jnp.broadcast_to(sequences_BL[:, :1], (len(sequences_BL), kernel_width - 1))
    return _windows(past_BM[..., None], sequences_BL[..., None], None)[..., 0] == sequences_BL[..., None]


def _last(past_BMD: Array, x_BLD: Array, num_tokens_B: Array | None) -> Array:
    """The window [B, M, D] that ends with each row's last real input."""
    num_past, together = past_BMD.shape[1], jnp.concatenate([past_BMD, x_BLD], axis=1)
    if num_tokens_B is None:
        return together[:, x_BLD.shape[1] :]
    at_BM = num_tokens_B[:, None] + jnp.arange(num_past)
    return jnp.take_along_axis(together, at_BM[..., None], axis=1)


def flops_per_example(config: ConvConfig, length: int) -> float:
    """Operations of one training sequence, forward and backward; counted as in lm_flax.model."""
    outputs = config.width * (2 if config.gated else 1)
    weights = sum(config.kernel_width * width * outputs for width in config.input_widths)
    return 6.0 * length * (weights + config.output_width * config.vocab_size)
