"""The Transformer as published (Vaswani et al. 2017, arXiv 1706.03762): encoder, decoder, and decoding bit by bit."""

from functools import partial
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from core_flax import kernels, sharding
from core_flax.attention import MultiHeadAttention, SelfAttention, padding_mask
from core_flax.cache import KeyValueCache, Shared, init_cache
from core_flax.layers import Dropout, Linear, Norm, gelu, layer_params, layers_per_turn, remat, unstack
from core_flax.types import Array, Params
from seq2seq_flax.attention import LOOKED_AT, CrossAttention
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.interface import Drawn, EncoderDecoder

# Glorot and Bengio 2010: keeps variances through square maps, and is what the reference implementation has.
KERNEL_INIT = nn.initializers.glorot_uniform()

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": gelu}


def positions_of(positions_BL: Array, width: int) -> Array:
    """Sinusoidal positions [B, L, D], float32 (section 3.5), all sines before all cosines.

    The paper has them in turn, which is the same but for the order of the model's dims.
    """
    frequencies = 10000.0 ** -(jnp.arange(width // 2) / (width // 2))
    angles = positions_BL[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class FeedForward(nn.Module):
    """Position-wise feed-forward network (section 3.3) with dropout after its nonlinearity."""

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, *, row_B: Array | None = None, deterministic: bool = True) -> Array:
        """Maps [B, L, D] to [B, L, D]."""
        linear = partial(Linear, kernel_init=KERNEL_INIT, dtype=self.dtype)
        activation = ACTIVATIONS[self.config.activation]
        hidden_BLF = activation(linear((self.config.mlp_width,), name="up")(x_BLD))
        hidden_BLF = sharding.constrain(hidden_BLF, "batch", "length", "mlp")
        dropout = Dropout(self.config.activation_dropout)
        hidden_BLF = dropout(hidden_BLF, row_B=row_B, deterministic=deterministic)
        return linear((x_BLD.shape[-1],), name="down")(hidden_BLF)


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward network, each added to its input and normalised (post-norm)."""

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: Array, mask: kernels.Mask, row_B: Array | None, deterministic: bool):
        """Maps hidden states [B, L, D] to ([B, L, D], None): a carry and no output, as nn.scan wants it."""
        config, drawn = self.config, Drawn(row_B=row_B, deterministic=deterministic)
        attention = MultiHeadAttention(
            config.num_heads, config.attention_dropout, KERNEL_INIT, self.dtype, name="attention"
        )
        mixed_BLD = attention(x_BLD, x_BLD, mask, **drawn)
        norm = partial(Norm, epsilon=config.norm_epsilon, use_fast_variance=False, dtype=self.dtype)
        x_BLD = norm(name="attention_norm")(x_BLD + Dropout(config.dropout)(mixed_BLD, **drawn))
        mixed_BLD = FeedForward(config, self.dtype, name="mlp")(x_BLD, **drawn)
        x_BLD = norm(name="mlp_norm")(x_BLD + Dropout(config.dropout)(mixed_BLD, **drawn))
        return sharding.constrain(x_BLD, "batch", "sequence", "width"), None


class DecoderBlock(nn.Module):
    """Self-attention, attention to the source and feed-forward network, each added to its input and normalised."""

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config, head_width = self.config, self.config.width // self.config.num_heads
        self.self_attention = SelfAttention(
            config.num_heads,
            config.num_heads,
            head_width,
            dropout_rate=config.attention_dropout,
            kernel_init=KERNEL_INIT,
            dtype=self.dtype,
        )
        self.cross_attention = CrossAttention(
            config.width, config.num_heads, config.attention_dropout, KERNEL_INIT, self.dtype
        )
        self.mlp = FeedForward(config, self.dtype)
        norm = partial(Norm, epsilon=config.norm_epsilon, use_fast_variance=False, dtype=self.dtype)
        self.self_attention_norm, self.cross_attention_norm, self.mlp_norm = norm(), norm(), norm()
        self.dropouts = [Dropout(config.dropout) for _ in range(3)]

    def __call__(
        self, x_BLD: Array, given: tuple[Array, kernels.Mask, kernels.Mask], row_B: Array | None, deterministic: bool
    ) -> tuple[Array, None]:
        """Maps hidden states [B, L, D], given (memory [B, M, D], mask of self- and mask of cross-attention)."""
        memory_BMD, self_mask, mask = given
        x_BLD, _ = self.read(x_BLD, self.keys_values(memory_BMD), self_mask, mask, None, 0, row_B, deterministic)
        return sharding.constrain(x_BLD, "batch", "sequence", "width"), None

    def keys_values(self, memory_BMD: Array) -> tuple[Array, Array]:
        """Keys and values [B, H, M, K] of the attention to the source: they depend on that alone."""
        return self.cross_attention.keys_values(memory_BMD)

    def read(
        self,
        x_BLD: Array,
        keys_values: tuple[Array, Array],
        self_mask: Array | kernels.Mask,
        mask: Array | kernels.Mask,
        cache: KeyValueCache | None,
        layer: int,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, KeyValueCache | None]:
        """Hidden states [B, L, D] of tokens after those of the cache, if there is one, and the cache with them."""
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        mixed_BLD, cache = self.self_attention(x_BLD, self_mask, cache, layer, **drawn)
        x_BLD = self.self_attention_norm(x_BLD + self.dropouts[0](mixed_BLD, **drawn))
        mixed_BLD = self.cross_attention(x_BLD, keys_values, mask, **drawn)
        x_BLD = self.cross_attention_norm(x_BLD + self.dropouts[1](mixed_BLD, **drawn))
        x_BLD = self.mlp_norm(x_BLD + self.dropouts[2](self.mlp(x_BLD, **drawn), **drawn))
        return x_BLD, cache


@flax.struct.dataclass
class DecoderCache:
    """What decoding carries from step to step; the first dim of every array is the row (see core_flax.cache)."""

    own: KeyValueCache
    """Keys and values of the target tokens that the decoder has read."""
    source: Shared
    """(Each layer's keys and values of the source, [B, H, M, K] both; True at its tokens, [B, M]): computed once."""


class Transformer(EncoderDecoder):
    """Encoder and decoder, each as it comes out of its last block."""

    config: TransformerConfig = TransformerConfig()

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        # Rows have a norm of about 1: times sqrt(D) they are inputs of variance 1, as they are, they give such logits.
        self.embeddings = self.make_tables(nn.initializers.normal(config.width**-0.5))
        if config.output_bias:
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (config.vocab_size,))
        self.encoder, self.decoder = _Stack(EncoderBlock, config, self.dtype), _Stack(DecoderBlock, config, self.dtype)
        self.source_dropout, self.target_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def encode(
        self,
        source_BM: Array,
        sequences_BM: Array,
        *,
        positions_BM: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Hidden states [B, M, D] of sources; arguments are those of ``__call__``."""
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        x_BMD = self.source_dropout(self._embed("source", source_BM, positions_BM), **drawn)
        mask = kernels.packed(sequences_BM).for_layers(source_BM.shape[1], source_BM.shape[1])
        return self.encoder(x_BMD, mask, row_B, deterministic)

    def decode(
        self,
        memory_BMD: Array,
        source_sequences_BM: Array,
        target_BL: Array,
        sequences_BL: Array,
        *,
        positions_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Hidden states [B, L, D] of targets, all positions at once; arguments are those of ``__call__``."""
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        x_BLD = self.target_dropout(self._embed("target", target_BL, positions_BL), **drawn)
        length, memory = target_BL.shape[1], memory_BMD.shape[1]
        own = kernels.causal(sequences_BL).for_layers(length, length)
        cross = kernels.Mask(sequences_BL, source_sequences_BM).for_layers(length, memory)
        given = (memory_BMD, own, cross)
        return self.decoder(x_BLD, given, row_B, deterministic)

    def logits(self, x: Array) -> Array:
        """Scores [..., V], float32, for hidden states [..., D]."""
        logits = super().logits(x)
        return logits + self.output_bias if self.config.output_bias else logits

    def start(self, source_BM: Array, valid_BM: Array, length: int) -> DecoderCache:
        """Encodes sources, one to a row, and makes room for ``length`` target tokens a row.

        Args:
          source_BM: token ids, ``</s>`` included.
          valid_BM: True at real tokens.
          length: target tokens, ``<s>`` included, that a row will be given at most.
        """
        config, memory_BMD = self.config, self.encode(source_BM, valid_BM.astype(jnp.int32))
        keys_values = [self._layer(number, "keys_values", memory_BMD) for number in range(config.num_layers)]
        head_width = config.width // config.num_heads
        own = init_cache(len(source_BM), config.num_layers, config.num_heads, length, head_width, self.dtype)
        return DecoderCache(own, Shared((keys_values, valid_BM)))

    def extend(
        self, tokens_BL: Array, cache: DecoderCache, num_tokens_B: Array | None = None
    ) -> tuple[Array, DecoderCache]:
        """Reads more target tokens of each row: ([B, L, D], the cache with them), as core_flax.cache describes."""
        length, own = tokens_BL.shape[1], cache.own
        x_BLD, self_mask = self._embed("target", tokens_BL, own.positions(length)), own.mask(length)
        keys_values, valid_BM = cache.source.value
        mask = padding_mask(valid_BM)
        # Layer by layer rather than scanned: a scan would copy the cache of all layers for each.
        for number in range(self.config.num_layers):
            x_BLD, own = self._layer(number, "read", x_BLD, keys_values[number], self_mask, mask, own, number)
        own = own.advance(length if num_tokens_B is None else num_tokens_B)
        return x_BLD, DecoderCache(own, cache.source)

    @nn.nowrap
    def unstack(self, params: Params) -> Params:
        """The parameters with the decoder's layers in parts, as decoding wants them."""
        layers = unstack(params["decoder"]["layers"], self.config.num_layers)
        return {**params, "decoder": {**params["decoder"], "layers": layers}}

    def _layer(self, number: int, method: str, *arguments: Any) -> Any:
        """A method of one layer of the decoder, with its part of the stacked parameters."""
        params = layer_params(self.decoder.variables["params"]["layers"], number)
        return DecoderBlock(self.config, self.dtype, parent=None).apply({"params": params}, *arguments, method=method)

    def _embed(self, which: str, tokens_BL: Array, positions_BL: Array | None) -> Array:
        if positions_BL is None:
            positions_BL = jnp.arange(tokens_BL.shape[1])[None]
        embedded_BLD = self.table(which)(tokens_BL)
        if self.config.scale_embeddings:
            embedded_BLD *= self.config.width**0.5
        x_BLD = embedded_BLD + positions_of(positions_BL, self.config.width).astype(self.dtype)
        return sharding.constrain(x_BLD, "batch", "sequence", "width")


class _Stack(nn.Module):
    """N blocks, scanned, their parameters stacked."""

    block: type[nn.Module]
    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Array, given: Any, row_B: Array | None, deterministic: bool) -> Array:
        unroll = layers_per_turn(self.config.unroll, self.config.num_layers)
        layers = nn.scan(
            remat(self.block, self.config.remat, unroll),
            variable_axes={"params": 0, LOOKED_AT: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, nn.broadcast),  # Flax's annotation knows ints alone
            length=self.config.num_layers,
            unroll=unroll,
        )(self.config, self.dtype, name="layers")
        x_BLD, _ = layers(x_BLD, given, row_B, deterministic)
        return x_BLD


def flops_per_row(config: TransformerConfig, source_length: int, target_length: int) -> float:
    """Operations of one row, forward and backward: six for each weight that a position meets.

    Counted are the matrix products alone, with attention over whole rows, causal or not.
    """
    square, mlp = config.width * config.width, 2 * config.width * config.mlp_width
    encoder = source_length * (4 * square + mlp + 2 * source_length * config.width)
    own = 4 * square + mlp + 2 * target_length * config.width
    cross = target_length * (2 * square + 2 * source_length * config.width) + source_length * 2 * square
    output = target_length * config.width * config.vocab_size
    return 6.0 * (config.num_layers * (encoder + target_length * own + cross) + output)
