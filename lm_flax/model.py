"""GPT-2 as published (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax.numpy as jnp

from core_flax import cache as caches
from core_flax import kernels, sharding
from core_flax.attention import SelfAttention
from core_flax.cache import KeyValueCache
from core_flax.config import check_range
from core_flax.layers import (
    Dropout,
    Embedding,
    FeedForward,
    Norm,
    Remat,
    gelu_tanh,
    layer_params,
    layers_per_turn,
    materialised,
    remat,
    unstack,
)
from core_flax.types import Array, Params, UserError


@dataclass(frozen=True)
class GPT2Config:
    """The architecture: GPT-2's with these sizes."""

    vocab_size: int = 50257
    """Entries of the token embedding, which is the output layer as well. Left at the preset's, it becomes the size of
    the data's vocabulary; a larger one pads the table."""
    num_layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Width of the hidden states."""
    num_heads: int = 12
    """Attention heads per block; must divide width."""
    mlp_width: int = 3072
    """Width of the feed-forward layer."""
    max_length: int = 1024
    """Positions the model can take: rows of the position embedding."""
    dropout: float = 0.1
    """Share dropped from the embeddings and from the output of every sublayer."""
    attention_dropout: float = 0.1
    """Share dropped from attention probabilities."""
    init_stddev: float = 0.02
    """Standard deviation of the normal that kernels and embeddings start from; of projections that are added to the
    hidden states divided by the root of their number, 2 x num_layers."""
    norm_epsilon: float = 1e-5
    """Term added to the variance in layer normalisation."""
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
        check_range("model", self, "dropout", "attention_dropout", least=0, below=1)
        check_range("model", self, "init_stddev", "norm_epsilon", above=0)
        if self.width % self.num_heads:
            raise UserError(f"--model.num-heads {self.num_heads} does not divide --model.width {self.width}")

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
        """Of the projections that are added to the hidden states (section 2.3)."""
        return nn.initializers.normal(self.init_stddev * (2 * self.num_layers) ** -0.5)


class GPT2Block(nn.Module):
    """One pre-norm Transformer block: norm before each sublayer, nothing after the addition."""

    config: GPT2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, KeyValueCache | None],
        layer: Array | int,
        mask: Array | kernels.Mask,
        row_B: Array | None,
        deterministic: bool,
    ):
        """Maps (hidden states [B, L, D], cache) to the same and None: a carry and no output, as nn.scan wants it."""
        config, (x_BLD, cache) = self.config, carry
        norm = partial(Norm, epsilon=config.norm_epsilon, use_fast_variance=False, dtype=self.dtype)
        dropout = partial(Dropout(config.dropout), row_B=row_B, deterministic=deterministic)

        attention = SelfAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_width=config.head_width,
            dropout_rate=config.attention_dropout,
            kernel_init=config.kernel_init,
            out_init=config.out_init,
            dtype=self.dtype,
            name="attention",
        )
        mixed_BLD, cache = attention(
            norm(name="attention_norm")(x_BLD), mask, cache, layer, row_B=row_B, deterministic=deterministic
        )
        x_BLD = materialised(x_BLD + dropout(mixed_BLD))

        mlp = FeedForward(config.mlp_width, gelu_tanh, config.kernel_init, self.dtype, config.out_init, name="mlp")
        x_BLD = materialised(x_BLD + dropout(mlp(norm(name="mlp_norm")(x_BLD))))
        return (sharding.constrain(x_BLD, "batch", "sequence", "width"), cache), None


class GPT2(nn.Module):
    """Token and position embedding, N blocks (scanned, their parameters stacked), a last norm; tied output layer.

    Its methods beside ``__call__`` are those that ``core_flax.cache`` describes.

    Attributes:
      config: the architecture.
      dtype: type of the computation; parameters are float32.
    """

    config: GPT2Config = GPT2Config()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        table = partial(Embedding, width=config.width, embedding_init=config.kernel_init, dtype=self.dtype)
        self.token = table(config.vocab_size)
        self.position = table(config.max_length)
        self.dropout = Dropout(config.dropout)
        unroll = layers_per_turn(config.unroll, config.num_layers)
        block = remat(GPT2Block, config.remat, unroll, static=(5,))
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast, nn.broadcast)),  # Flax's annotation knows ints alone
            length=config.num_layers,
            unroll=unroll,
        )(config, self.dtype)
        self.norm = Norm(epsilon=config.norm_epsilon, use_fast_variance=False, dtype=self.dtype)

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
          positions_BL: each token's place in its sequence, below max_length; None: its place in the row.
          sequences_BL: equal where tokens are of one sequence, which alone see each other. None: a row is a sequence.
          row_B: the example's number in the global batch, for dropout; None: 0, 1, 2 ...
          deterministic: False applies dropout and needs the rng "dropout".

        Returns:
          Hidden states [B, L, D], from each of which ``logits`` predicts the token after.
        """
        length = tokens_BL.shape[1]
        if positions_BL is None:
            assert length <= self.config.max_length, f"length {length} exceeds max_length {self.config.max_length}"
            positions_BL = jnp.arange(length)
        mask = kernels.causal(sequences_BL).for_layers(length, length)
        return self._read(tokens_BL, positions_BL, mask, None, row_B, deterministic)[0]

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
        # Padding may stand beyond the last position; it must have some embedding, and nobody looks at it.
        positions_BL = jnp.minimum(cache.positions(length), self.config.max_length - 1)
        x_BLD, cache = self._read(tokens_BL, positions_BL, cache.mask(length), cache, None, True)
        return x_BLD, cache.advance(length if num_tokens_B is None else num_tokens_B)

    def logits(self, x: Array) -> Array:
        """Scores [..., V] of the next token, float32, for hidden states [..., D]."""
        return self.token.logits(x)

    @nn.nowrap
    def output_table(self, params: Mapping[str, Any]) -> Array:
        """The parameter [V, D] whose product with hidden states is ``logits``, for losses that compute it in chunks."""
        return params["token"]["embedding"]

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
        x_BLD = self.token(tokens_BL) + self.position(positions_BL)
        x_BLD = self.dropout(x_BLD, row_B=row_B, deterministic=deterministic)
        x_BLD = sharding.constrain(x_BLD, "batch", "sequence", "width")
        if cache is None:
            layers = jnp.arange(self.config.num_layers)
            (x_BLD, _), _ = self.layers((x_BLD, None), layers, mask, row_B, deterministic)
        else:
            # Layer by layer rather than scanned: a scan would copy the cache of all layers for each.
            for number in range(self.config.num_layers):
                params = layer_params(self.layers.variables["params"], number)
                block = GPT2Block(self.config, self.dtype, parent=None)
                (x_BLD, cache), _ = block.apply({"params": params}, (x_BLD, cache), number, mask, row_B, deterministic)
        return self.norm(x_BLD), cache


def flops_per_example(config: GPT2Config, length: int) -> float:
    """Operations of one training sequence, forward and backward: six for each weight that a position meets.

    Counted are the matrix products alone, with attention over the whole length although half of it is masked; look-ups,
    norms, the optimizer and what remat computes again are not (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    width = config.width
    weights = config.num_layers * (4 * width * width + 2 * width * config.mlp_width) + width * config.vocab_size
    attention = config.num_layers * 2 * length * width
    return 6.0 * length * (weights + attention)
