"""A Transformer of later make: norms before sublayers, RMSNorm, rotary positions, gated feed-forward networks.

Pre-norm: Xiong et al. 2020 (arXiv 2002.04745); the rest as in Llama (Touvron et al. 2023, arXiv 2302.13971), here with
an encoder and dropout. Rotary positions turn queries and keys of self-attention; attention to the source has none, as
places in two languages have no distance.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import kernels, sharding
from core_flax.attention import SelfAttention, padding_mask
from core_flax.cache import KeyValueCache, Shared, init_cache
from core_flax.layers import (
    Dropout,
    GatedFeedForward,
    RMSNorm,
    layer_params,
    layers_per_turn,
    materialised,
    remat,
    unstack,
)
from core_flax.rotary import Rotation, rotate, rotation
from core_flax.types import Array, Params
from seq2seq_flax.attention import LOOKED_AT, CrossAttention
from seq2seq_flax.config import ModernConfig
from seq2seq_flax.interface import Drawn, EncoderDecoder
from seq2seq_flax.model import KERNEL_INIT, DecoderCache


def _self_attention(config: ModernConfig, dtype: jnp.dtype) -> SelfAttention:
    return SelfAttention(
        config.num_heads,
        config.num_heads,
        config.width // config.num_heads,
        use_bias=False,
        dropout_rate=config.attention_dropout,
        kernel_init=KERNEL_INIT,
        dtype=dtype,
    )


def _feed_forward(config: ModernConfig, dtype: jnp.dtype) -> GatedFeedForward:
    return GatedFeedForward(config.mlp_width, jax.nn.silu, KERNEL_INIT, dtype, dropout_rate=config.activation_dropout)


def _turned(turn: Rotation) -> Callable[[Array], Array]:
    return lambda heads: rotate(heads, turn)


class EncoderBlock(nn.Module):
    """Self-attention and gated feed-forward network, each of what is normalised, added to what is not."""

    config: ModernConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config, norm = self.config, partial(RMSNorm, epsilon=self.config.norm_epsilon, dtype=self.dtype)
        self.attention, self.attention_norm = _self_attention(config, self.dtype), norm()
        self.mlp, self.mlp_norm = _feed_forward(config, self.dtype), norm()
        self.dropouts = [Dropout(config.dropout) for _ in range(2)]

    def __call__(
        self, x_BLD: Array, given: tuple[kernels.Mask, Rotation], row_B: Array | None, deterministic: bool
    ) -> tuple[Array, None]:
        """Maps hidden states [B, L, D], given (mask, rotation of the positions)."""
        (mask, turn), drawn = given, Drawn(row_B=row_B, deterministic=deterministic)
        mixed_BLD, _ = self.attention(self.attention_norm(x_BLD), mask, prepare=_turned(turn), **drawn)
        x_BLD = materialised(x_BLD + self.dropouts[0](mixed_BLD, **drawn))
        x_BLD = materialised(x_BLD + self.dropouts[1](self.mlp(self.mlp_norm(x_BLD), **drawn), **drawn))
        return sharding.constrain(x_BLD, "batch", "sequence", "width"), None


class DecoderBlock(nn.Module):
    """Self-attention, attention to the source and gated feed-forward network, likewise."""

    config: ModernConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config, norm = self.config, partial(RMSNorm, epsilon=self.config.norm_epsilon, dtype=self.dtype)
        self.self_attention, self.self_attention_norm = _self_attention(config, self.dtype), norm()
        self.cross_attention = CrossAttention(
            config.width, config.num_heads, config.attention_dropout, KERNEL_INIT, self.dtype, use_bias=False
        )
        self.cross_attention_norm = norm()
        self.mlp, self.mlp_norm = _feed_forward(config, self.dtype), norm()
        self.dropouts = [Dropout(config.dropout) for _ in range(3)]

    def __call__(
        self,
        x_BLD: Array,
        given: tuple[Array, kernels.Mask, kernels.Mask, Rotation],
        row_B: Array | None,
        deterministic: bool,
    ) -> tuple[Array, None]:
        """Maps hidden states [B, L, D], given (memory [B, M, D], masks of self- and cross-attention, rotation)."""
        memory_BMD, self_mask, mask, turn = given
        keys_values = self.keys_values(memory_BMD)
        x_BLD, _ = self.read(x_BLD, keys_values, self_mask, mask, turn, None, 0, row_B, deterministic)
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
        turn: Rotation,
        cache: KeyValueCache | None,
        layer: int,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, KeyValueCache | None]:
        """Hidden states [B, L, D] of tokens after those of the cache, if there is one, and the cache with them."""
        drawn = Drawn(row_B=row_B, deterministic=deterministic)
        normed_BLD = self.self_attention_norm(x_BLD)
        mixed_BLD, cache = self.self_attention(normed_BLD, self_mask, cache, layer, prepare=_turned(turn), **drawn)
        x_BLD = materialised(x_BLD + self.dropouts[0](mixed_BLD, **drawn))
        mixed_BLD = self.cross_attention(self.cross_attention_norm(x_BLD), keys_values, mask, **drawn)
        x_BLD = materialised(x_BLD + self.dropouts[1](mixed_BLD, **drawn))
        x_BLD = materialised(x_BLD + self.dropouts[2](self.mlp(self.mlp_norm(x_BLD), **drawn), **drawn))
        return x_BLD, cache


class ModernTransformer(EncoderDecoder):
    """Encoder and decoder, each with a last norm."""

    config: ModernConfig = ModernConfig()

    def setup(self) -> None:
        """Creates the submodules."""
        config, norm = self.config, partial(RMSNorm, epsilon=self.config.norm_epsilon, dtype=self.dtype)
        # As in the Transformer: times sqrt(D) rows are inputs of variance 1, as they are, they give such logits.
        self.embeddings = self.make_tables(nn.initializers.normal(config.width**-0.5))
        self.encoder, self.encoder_norm = self._stack(EncoderBlock), norm()
        self.decoder, self.decoder_norm = self._stack(DecoderBlock), norm()
        self.source_dropout, self.target_dropout = Dropout(config.dropout), Dropout(config.dropout)

    def _stack(self, block: type[nn.Module]) -> nn.Module:
        config = self.config
        unroll = layers_per_turn(config.unroll, config.num_layers)
        return nn.scan(
            remat(block, config.remat, unroll),
            variable_axes={"params": 0, LOOKED_AT: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, nn.broadcast),  # Flax's annotation knows ints alone
            length=config.num_layers,
            unroll=unroll,
        )(config, self.dtype)

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
        x_BMD = self.source_dropout(self._embed("source", source_BM), row_B=row_B, deterministic=deterministic)
        memory = source_BM.shape[1]
        given = kernels.packed(sequences_BM).for_layers(memory, memory), self._rotation(positions_BM, memory)
        return self.encoder_norm(self.encoder(x_BMD, given, row_B, deterministic)[0])

    def decode(
        self,
        memory: Array,
        source_sequences_BM: Array,
        target_BL: Array,
        sequences_BL: Array,
        *,
        positions_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Hidden states [B, L, D] of targets, all positions at once; arguments are those of ``__call__``."""
        x_BLD = self.target_dropout(self._embed("target", target_BL), row_B=row_B, deterministic=deterministic)
        length = target_BL.shape[1]
        own = kernels.causal(sequences_BL).for_layers(length, length)
        cross = kernels.Mask(sequences_BL, source_sequences_BM).for_layers(length, source_sequences_BM.shape[1])
        given = memory, own, cross, self._rotation(positions_BL, length)
        return self.decoder_norm(self.decoder(x_BLD, given, row_B, deterministic)[0])

    def start(self, source_BM: Array, valid_BM: Array, length: int) -> DecoderCache:
        """Encodes sources, one to a row, and makes room for ``length`` target tokens a row, ``<s>`` included."""
        config, memory_BMD = self.config, self.encode(source_BM, valid_BM.astype(jnp.int32))
        pairs = tuple(self._layer(number, "keys_values", memory_BMD) for number in range(config.num_layers))
        head_width = config.width // config.num_heads
        own = init_cache(len(source_BM), config.num_layers, config.num_heads, length, head_width, self.dtype)
        return DecoderCache(own, Shared((pairs, valid_BM)))

    def extend(
        self, tokens_BL: Array, cache: DecoderCache, num_tokens_B: Array | None = None
    ) -> tuple[Array, DecoderCache]:
        """Reads more target tokens of each row: ([B, L, D], the cache with them)."""
        length, own = tokens_BL.shape[1], cache.own
        pairs, valid_BM = cache.source.value
        masks = own.mask(length), padding_mask(valid_BM)
        x_BLD, turn = self._embed("target", tokens_BL), self._rotation(own.positions(length), length)
        # Layer by layer rather than scanned: a scan would copy the cache of all layers for each.
        for number in range(self.config.num_layers):
            x_BLD, own = self._layer(number, "read", x_BLD, pairs[number], *masks, turn, own, number)
        own = own.advance(length if num_tokens_B is None else num_tokens_B)
        return self.decoder_norm(x_BLD), DecoderCache(own, cache.source)

    @nn.nowrap
    def unstack(self, params: Params) -> Params:
        """The parameters with the decoder's layers in parts, as decoding wants them."""
        return {**params, "decoder": unstack(params["decoder"], self.config.num_layers)}

    def _layer(self, number: int, method: str, *arguments: Any) -> Any:
        """A method of one layer of the decoder, with its part of the stacked parameters."""
        params = layer_params(self.decoder.variables["params"], number)
        return DecoderBlock(self.config, self.dtype, parent=None).apply({"params": params}, *arguments, method=method)

    def _embed(self, which: str, tokens_BL: Array) -> Array:
        x_BLD = self.table(which)(tokens_BL) * self.config.width**0.5
        return sharding.constrain(x_BLD, "batch", "sequence", "width")

    def _rotation(self, positions_BL: Array | None, length: int) -> Rotation:
        positions_BL = jnp.arange(length)[None] if positions_BL is None else positions_BL
        return rotation(positions_BL, self.config.width // self.config.num_heads, self.config.rope_theta)
