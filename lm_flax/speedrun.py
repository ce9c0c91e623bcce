"""A GPT with what has been shown to train faster per token.

Rotary positions; queries and keys normalised (Henry et al. 2020, arXiv 2010.04245; without a learned scale, as in
Jordan et al. 2024, "modded-nanogpt"); projections that are added to the hidden states begin at zero (Zhang et al. 2019,
arXiv 1901.09321, section 3); norms without parameters; a soft cap on the logits (Gemma Team 2024, arXiv 2408.00118,
section 2). With it go Muon and a warmup-stable-decay schedule, which are settings of a run
(``presets.gpt_speedrun``). What each is worth: docs/results/gpt_speedrun_pieces.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import cache as caches
from core_flax import kernels, sharding
from core_flax.attention import SelfAttention
from core_flax.cache import KeyValueCache
from core_flax.config import check_range
from core_flax.layers import (
    Dropout,
    Embedding,
    Linear,
    Remat,
    gelu_tanh,
    layer_params,
    layers_per_turn,
    materialised,
    remat,
    unstack,
)
from core_flax.rotary import Rotation, rotate, rotation
from core_flax.types import Array, Params, UserError


@dataclass(frozen=True)
class SpeedrunConfig:
    """The architecture: a GPT's with these sizes."""

    vocab_size: int = 50257
    """Entries of the token embedding and of the output layer. Left at the preset's, it becomes the size of the data's
    vocabulary; a larger one pads the tables."""
    num_layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Width of the hidden states."""
    num_heads: int = 6
    """Attention heads per block; must divide width."""
    mlp_width: int = 3072
    """Width of the feed-forward layer."""
    activation: Literal["gelu", "squared_relu"] = "gelu"
    """Its nonlinearity. squared_relu: max(0, x)^2 (So et al. 2021, arXiv 2109.08668, section 4), which others chose for
    larger models; where it was measured here, GELU learned more."""
    max_length: int = 1024
    """Tokens a sequence may have. No parameter depends on it."""
    rope_theta: float = 10000.0
    """Base of the rotary angles: the larger, the slower the slowest turn."""
    dropout: float = 0.0
    """Share dropped from the embeddings and from the output of every sublayer."""
    soft_cap: float = 30.0
    """Logits are soft_cap x tanh(logits / soft_cap): none is larger."""
    embedding_stddev: float = 1.0
    """Standard deviation of the normal that the embedding starts from. (Its rows are normalised when they are read.)"""
    remat: Remat = "elementwise"
    """What the backward pass computes again rather than keep in memory: nothing, all but the matrix products, or each
    block from its input. Changes results by rounding at most."""
    unroll: int | None = None
    """Layers computed by one turn of the loop over them: more means fewer copies and longer to compile. None: one; on a
    CPU all. Changes results by rounding at most."""

    FREE: ClassVar = frozenset({"remat", "unroll"})

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "mlp_width", "max_length")
        check_range("model", self, *sizes, "unroll", least=1)
        check_range("model", self, "soft_cap", "embedding_stddev", above=0)
        check_range("model", self, "rope_theta", above=1)
        check_range("model", self, "dropout", least=0, below=1)
        if self.width % (2 * self.num_heads):
            raise UserError(
                f"--model.width {self.width} must divide by --model.num-heads {self.num_heads} into heads of even "
                "width, as rotary positions need"
            )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads


def normalised(x: Array) -> Array:
    """x [..., D] divided by its root mean square, in float32: a norm without parameters."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu_tanh,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}
"""SpeedrunConfig.activation."""

_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform within 1 / sqrt(inputs), as torch's linear layers begin, and so the code that this follows."""
_out_init = nn.initializers.zeros
"""Of the projections that are added to the hidden states."""


class SpeedrunBlock(nn.Module):
    """One pre-norm Transformer block without biases, whose sublayers begin as nothing."""

    config: SpeedrunConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, KeyValueCache | None],
        layer: Array | int,
        mask: Array | kernels.Mask,
        rotation: Rotation,
        row_B: Array | None,
        deterministic: bool,
    ):
        """Maps (hidden states [B, L, D], cache) to the same and None: a carry and no output, as nn.scan wants it."""
        config, (x_BLD, cache) = self.config, carry
        dropout = partial(Dropout(config.dropout), row_B=row_B, deterministic=deterministic)
        attention = SelfAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_width=config.head_width,
            use_bias=False,
            kernel_init=_kernel_init,
            out_init=_out_init,
            dtype=self.dtype,
            name="attention",
        )
        mixed_BLD, cache = attention(
            normalised(x_BLD), mask, cache, layer, prepare=lambda heads: rotate(normalised(heads), rotation)
        )
        x_BLD = materialised(x_BLD + dropout(mixed_BLD))
        up = Linear((config.mlp_width,), _kernel_init, self.dtype, use_bias=False, name="up")
        down = Linear((config.width,), _out_init, self.dtype, use_bias=False, name="down")
        activation = ACTIVATIONS[config.activation]
        hidden_BLF = sharding.constrain(activation(up(normalised(x_BLD))), "batch", "length", "mlp")
        x_BLD = materialised(x_BLD + dropout(down(hidden_BLF)))
        return (sharding.constrain(x_BLD, "batch", "sequence", "width"), cache), None


class Speedrun(nn.Module):
    """Token embedding, N blocks (scanned, their parameters stacked), an output layer of its own.

    Its methods beside ``__call__`` are those that ``core_flax.cache`` describes.

    Attributes:
      config: the architecture.
      dtype: type of the computation; parameters are float32.
    """

    config: SpeedrunConfig = SpeedrunConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        table_init = nn.initializers.normal(config.embedding_stddev)
        self.token = Embedding(config.vocab_size, config.width, table_init, self.dtype)
        self.head = Embedding(config.vocab_size, config.width, nn.initializers.zeros, self.dtype)
        self.dropout = Dropout(config.dropout)
        unroll = layers_per_turn(config.unroll, config.num_layers)
        self.layers = nn.scan(
            remat(SpeedrunBlock, config.remat, unroll, static=(6,)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (0, *(nn.broadcast,) * 4)),  # Flax's annotation knows ints alone
            length=config.num_layers,
            unroll=unroll,
        )(config, self.dtype)

    def __call__(
        self,
        tokens_BL: Array,
        *,
        positions_BL: Array | None = None,
        sequences_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Reads sequences, one to a row or several; as GPT2 does.

        Args:
          tokens_BL: token ids.
          positions_BL: each token's place in its sequence; None: its place in the row.
          sequences_BL: equal where tokens are of one sequence, which alone see each other. None: a row is a sequence.
          row_B: the example's number in the global batch, for dropout; None: 0, 1, 2 ...
          deterministic: False applies dropout and needs the rng "dropout".

        Returns:
          Hidden states [B, L, D], from each of which ``logits`` predicts the token after.
        """
        length = tokens_BL.shape[1]
        if positions_BL is None:
            assert length <= self.config.max_length, f"length {length} exceeds max_length {self.config.max_length}"
            positions_BL = jnp.arange(length)[None]
        mask = kernels.causal(sequences_BL).for_layers(length, length)
        x_BLD, _ = self._read(tokens_BL, positions_BL, mask, None, row_B, deterministic)
        if self.is_initializing():
            self.logits(x_BLD)  # creates the output layer
        return x_BLD

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """An empty cache for ``length`` tokens a row, max_length at most."""
        config = self.config
        assert length <= config.max_length, f"length {length} exceeds max_length {config.max_length}"
        return caches.init_cache(batch_size, config.num_layers, config.num_heads, length, config.head_width, self.dtype)

    def extend(
        self, tokens_BL: Array, cache: KeyValueCache, num_tokens_B: Array | None = None
    ) -> tuple[Array, KeyValueCache]:
        """Reads more tokens of each row: ([B, L, D], the cache with them)."""
        length = tokens_BL.shape[1]
        x_BLD, cache = self._read(tokens_BL, cache.positions(length), cache.mask(length), cache, None, True)
        return x_BLD, cache.advance(length if num_tokens_B is None else num_tokens_B)

    def logits(self, x: Array) -> Array:
        """Scores [..., V] of the next token, float32, for hidden states [..., D]."""
        cap = self.config.soft_cap
        return cap * jnp.tanh(self.head.logits(x) / cap)

    @nn.nowrap
    def output_table(self, params: Mapping[str, Any]) -> Array:
        """The parameter [V, D] whose product with hidden states are the logits before the cap, for chunked losses."""
        return params["head"]["embedding"]

    @nn.nowrap
    def unstack(self, params: Params) -> Params:
        """The parameters with the layers in parts, as decoding wants them."""
        return {**params, "layers": unstack(params["layers"], self.config.num_layers)}

    def _read(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        mask: Array | kernels.Mask,
        cache: Any,
        row_B: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Any]:
        x_BLD = self.dropout(normalised(self.token(tokens_BL)), row_B=row_B, deterministic=deterministic)
        x_BLD = sharding.constrain(x_BLD, "batch", "sequence", "width")
        angles = rotation(positions_BL, self.config.head_width, self.config.rope_theta)
        if cache is None:
            layers = jnp.arange(self.config.num_layers)
            (x_BLD, _), _ = self.layers((x_BLD, None), layers, mask, angles, row_B, deterministic)
        else:
            # Layer by layer rather than scanned: a scan would copy the cache of all layers for each.
            for number in range(self.config.num_layers):
                params = layer_params(self.layers.variables["params"], number)
                block = SpeedrunBlock(self.config, self.dtype, parent=None)
                (x_BLD, cache), _ = block.apply(
                    {"params": params}, (x_BLD, cache), number, mask, angles, row_B, deterministic
                )
        return normalised(x_BLD), cache


def flops_per_example(config: SpeedrunConfig, length: int) -> float:
    """Operations of one training sequence, forward and backward; counted as in lm_flax.model."""
    width = config.width
    weights = config.num_layers * (4 * width * width + 2 * width * config.mlp_width) + width * config.vocab_size
    return 6.0 * length * (weights + config.num_layers * 2 * length * width)
