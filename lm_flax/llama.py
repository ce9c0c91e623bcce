"""Llama (Touvron et al. 2023, arXiv 2302.13971 and 2307.09288): RMSNorm, rotary positions, SwiGLU, grouped queries."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import cache as caches
from core_flax import kernels, sharding
from core_flax.attention import SelfAttention
from core_flax.cache import KeyValueCache
from core_flax.config import check_range
from core_flax.layers import (
    Embedding,
    GatedFeedForward,
    Remat,
    RMSNorm,
    layer_params,
    layers_per_turn,
    materialised,
    remat,
    unstack,
)
from core_flax.rotary import Rotation, rotate, rotation
from core_flax.types import Array, Params, UserError


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture: Llama's with these sizes."""

    vocab_size: int = 32000
    """Entries of the token embedding. Left at the preset's, it becomes the size of the data's vocabulary; a larger one
    pads the table."""
    num_layers: int = 32
    """Transformer blocks."""
    width: int = 4096
    """Width of the hidden states."""
    num_heads: int = 32
    """Heads of queries per block; must divide width."""
    num_kv_heads: int = 32
    """Heads of keys and values per block, each shared by as many heads of queries; must divide num_heads."""
    mlp_width: int = 11008
    """Width of the feed-forward layer."""
    max_length: int = 4096
    """Tokens a sequence may have. No parameter depends on it."""
    rope_theta: float = 10000.0
    """Base of the rotary angles: the larger, the slower the slowest turn."""
    tied: bool = False
    """Whether the token embedding is the output layer as well."""
    init_stddev: float = 0.02
    """Standard deviation of the normal that kernels and embeddings start from; of projections that are added to the
    hidden states divided by the root of their number, 2 x num_layers."""
    norm_epsilon: float = 1e-5
    """Term added to the mean square in RMS normalisation."""
    remat: Remat = "elementwise"
    """What the backward pass computes again rather than keep in memory: nothing, all but the matrix products, or each
    block from its input. Changes results by rounding at most."""
    unroll: int | None = None
    """Layers computed by one turn of the loop over them: more means fewer copies and longer to compile. None: one; on a
    CPU all. Changes results by rounding at most."""

    FREE: ClassVar = frozenset({"remat", "unroll"})

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "mlp_width", "max_length")
        check_range("model", self, *sizes, "unroll", least=1)
        check_range("model", self, "init_stddev", "norm_epsilon", above=0)
        check_range("model", self, "rope_theta", above=1)
        if self.width % self.num_heads:
            raise UserError(f"--model.num-heads {self.num_heads} does not divide --model.width {self.width}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"--model.num-kv-heads {self.num_kv_heads} does not divide --model.num-heads {self.num_heads}"
            )
        if self.head_width % 2:
            raise UserError(
                f"--model.width {self.width} over --model.num-heads {self.num_heads} makes heads of {self.head_width}; "
                "rotary positions need an even width"
            )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """Of kernels and embeddings."""
        return nn.initializers.normal(self.init_stddev)

    @property
    def out_init(self) -> nn.initializers.Initializer:
        """Of the projections that are added to the hidden states (as in GPT-2; the papers do not say)."""
        return nn.initializers.normal(self.init_stddev * (2 * self.num_layers) ** -0.5)


class LlamaBlock(nn.Module):
    """One pre-norm Transformer block: rotated attention, then the gated feed-forward network; no biases, no dropout."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, KeyValueCache | None],
        layer: Array | int,
        mask: Array | kernels.Mask,
        rotation: Rotation,
    ):
        """Maps (hidden states [B, L, D], cache) to the same and None: a carry and no output, as nn.scan wants it."""
        config, (x_BLD, cache) = self.config, carry
        norm = partial(RMSNorm, epsilon=config.norm_epsilon, dtype=self.dtype)

        attention = SelfAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_width=config.head_width,
            use_bias=False,
            kernel_init=config.kernel_init,
            out_init=config.out_init,
            dtype=self.dtype,
            name="attention",
        )
        mixed_BLD, cache = attention(
            norm(name="attention_norm")(x_BLD),
            mask,
            cache,
            layer,
            prepare=lambda heads: rotate(heads, rotation),
        )
        x_BLD = materialised(x_BLD + mixed_BLD)

        mlp = GatedFeedForward(
            config.mlp_width, jax.nn.silu, config.kernel_init, self.dtype, config.out_init, name="mlp"
        )
        x_BLD = materialised(x_BLD + mlp(norm(name="mlp_norm")(x_BLD)))
        return (sharding.constrain(x_BLD, "batch", "sequence", "width"), cache), None


class Llama(nn.Module):
    """Token embedding, N blocks (scanned, their parameters stacked), a last norm and the output layer.

    Its methods beside ``__call__`` are those that ``core_flax.cache`` describes.

    Attributes:
      config: the architecture.
      dtype: type of the computation; parameters are float32.
    """

    config: LlamaConfig = LlamaConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        self.token = Embedding(config.vocab_size, config.width, config.kernel_init, self.dtype)
        unroll = layers_per_turn(config.unroll, config.num_layers)
        self.layers = nn.scan(
            remat(LlamaBlock, config.remat, unroll, static=()),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast)),  # Flax's annotation knows ints alone
            length=config.num_layers,
            unroll=unroll,
        )(config, self.dtype)
        self.norm = RMSNorm(epsilon=config.norm_epsilon, dtype=self.dtype)
        if not config.tied:
            self.head = Embedding(config.vocab_size, config.width, config.kernel_init, self.dtype)

    def __call__(
        self,
        tokens_BL: Array,
        *,
        positions_BL: Array | None = None,
        sequences_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Reads sequences, one to a row or, with ``positions_BL`` and ``sequences_BL``, several.

        Args:
          tokens_BL: token ids.
          positions_BL: each token's place in its sequence; None: its place in the row.
          sequences_BL: equal where tokens are of one sequence, which alone see each other. None: a row is a sequence.
          row_B: as in GPT2; without dropout, nothing depends on it.
          deterministic: likewise.

        Returns:
          Hidden states [B, L, D], from each of which ``logits`` predicts the token after.
        """
        length = tokens_BL.shape[1]
        if positions_BL is None:
            assert length <= self.config.max_length, f"length {length} exceeds max_length {self.config.max_length}"
            positions_BL = jnp.arange(length)[None]
        x_BLD, _ = self._read(tokens_BL, positions_BL, kernels.causal(sequences_BL).for_layers(length, length), None)
        if self.is_initializing():
            self.logits(x_BLD)  # creates the output layer
        return x_BLD

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """An empty cache for ``length`` tokens a row, max_length at most."""
        config = self.config
        assert length <= config.max_length, f"length {length} exceeds max_length {config.max_length}"
        return caches.init_cache(
            batch_size, config.num_layers, config.num_kv_heads, length, config.head_width, self.dtype
        )

    def extend(
        self, tokens_BL: Array, cache: KeyValueCache, num_tokens_B: Array | None = None
    ) -> tuple[Array, KeyValueCache]:
        """Reads more tokens of each row: ([B, L, D], the cache with them)."""
        length = tokens_BL.shape[1]
        x_BLD, cache = self._read(tokens_BL, cache.positions(length), cache.mask(length), cache)
        return x_BLD, cache.advance(length if num_tokens_B is None else num_tokens_B)

    def logits(self, x: Array) -> Array:
        """Scores [..., V] of the next token, float32, for hidden states [..., D]."""
        return (self.token if self.config.tied else self.head).logits(x)

    @nn.nowrap
    def output_table(self, params: Mapping[str, Any]) -> Array:
        """The parameter [V, D] whose product with hidden states is ``logits``, for losses that compute it in chunks."""
        return params["token" if self.config.tied else "head"]["embedding"]

    @nn.nowrap
    def unstack(self, params: Params) -> Params:
        """The parameters with the layers in parts, as decoding wants them."""
        return {**params, "layers": unstack(params["layers"], self.config.num_layers)}

    def _read(self, tokens_BL: Array, positions_BL: Array, mask: Array | kernels.Mask, cache: Any) -> tuple[Array, Any]:
        x_BLD = sharding.constrain(self.token(tokens_BL), "batch", "length", "width")
        angles = rotation(positions_BL, self.config.head_width, self.config.rope_theta)
        if cache is None:
            layers = jnp.arange(self.config.num_layers)
            (x_BLD, _), _ = self.layers((x_BLD, None), layers, mask, angles)
        else:
            # Layer by layer rather than scanned: a scan would copy the cache of all layers for each.
            for number in range(self.config.num_layers):
                params = layer_params(self.layers.variables["params"], number)
                block = LlamaBlock(self.config, self.dtype, parent=None)
                (x_BLD, cache), _ = block.apply({"params": params}, (x_BLD, cache), number, mask, angles)
        return self.norm(x_BLD), cache


def flops_per_example(config: LlamaConfig, length: int) -> float:
    """Operations of one training sequence, forward and backward; counted as in lm_flax.model."""
    width, kv_width = config.width, config.num_kv_heads * config.head_width
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * config.mlp_width
    attention = config.num_layers * 2 * length * width
    return 6.0 * length * (config.num_layers * layer + width * config.vocab_size + attention)
