"""BERT as published (Devlin et al. 2018, arXiv 1810.04805): encoder, pooler, and the two pretraining heads."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax import kernels, sharding
from core_flax.attention import MultiHeadAttention
from core_flax.config import check_range
from core_flax.layers import Dropout, Embedding, FeedForward, Linear, Norm, Remat, gelu, layers_per_turn, remat
from core_flax.types import Array, UserError


@dataclass(frozen=True)
class BertConfig:
    """The architecture: BERT's with these sizes."""

    vocab_size: int = 30522
    """Entries of the token embedding. Left at the preset's, it becomes the size of the data's vocabulary; a larger one
    pads the table."""
    num_layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Width of the hidden states."""
    num_heads: int = 12
    """Attention heads per block; must divide width."""
    mlp_width: int = 3072
    """Width of the feed-forward layer."""
    max_length: int = 512
    """Positions the model can take: rows of the position embedding."""
    num_segments: int = 2
    """Segments (sentence A, sentence B): rows of the segment embedding."""
    dropout: float = 0.1
    """Share dropped from the embeddings and from the output of every sublayer."""
    attention_dropout: float = 0.1
    """Share dropped from attention probabilities."""
    init_stddev: float = 0.02
    """Standard deviation of the truncated normal that kernels and embeddings start from."""
    norm_epsilon: float = 1e-12
    """Term added to the variance in layer normalisation."""
    remat: Remat = "elementwise"
    """What the backward pass computes again rather than keep in memory: nothing, all but the matrix products, or each
    block from its input. Changes results by rounding at most."""
    unroll: int | None = None
    """Layers computed by one turn of the loop over them: more is faster on a CPU and compiles longer. None: all on a
    CPU, one elsewhere. Changes results by rounding at most."""

    FREE: ClassVar = frozenset({"remat", "unroll"})

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        sizes = ("vocab_size", "num_layers", "width", "num_heads", "mlp_width", "max_length", "num_segments")
        check_range("model", self, *sizes, "unroll", least=1)
        check_range("model", self, "dropout", "attention_dropout", least=0, below=1)
        check_range("model", self, "init_stddev", "norm_epsilon", above=0)
        if self.width % self.num_heads:
            raise UserError(f"--model.num-heads {self.num_heads} does not divide --model.width {self.width}")

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """Truncated normal, cut at two standard deviations, as in the released code."""
        return nn.initializers.truncated_normal(self.init_stddev)


class BertEmbeddings(nn.Module):
    """Sum of token, position and segment embeddings, normalised (section 3, figure 2)."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the three tables."""
        config = self.config
        table = partial(Embedding, width=config.width, embedding_init=config.kernel_init, dtype=self.dtype)
        self.token = table(config.vocab_size)
        self.position = table(config.max_length)
        self.segment = table(config.num_segments)
        self.norm = Norm(epsilon=config.norm_epsilon, use_fast_variance=False, dtype=self.dtype)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        tokens_BL: Array,
        segments_BL: Array,
        *,
        positions_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Returns [B, L, D]; without ``positions_BL`` tokens stand at 0, 1, 2 ..."""
        if positions_BL is None:
            length = tokens_BL.shape[1]
            assert length <= self.config.max_length, f"length {length} exceeds max_length {self.config.max_length}"
            positions_BL = jnp.arange(length)
        x_BLD = self.token(tokens_BL) + self.position(positions_BL) + self.segment(segments_BL)
        x_BLD = self.dropout(self.norm(x_BLD), row_B=row_B, deterministic=deterministic)
        return sharding.constrain(x_BLD, "batch", "sequence", "width")


class BertBlock(nn.Module):
    """One post-norm Transformer block: norm after each residual addition."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        mask: kernels.Mask,
        row_B: Array | None,
        deterministic: bool,
        places_BT: Array | None = None,
    ):
        """Maps hidden states [B, L, D] to ([B, L, D], None): a carry and no output, as nn.scan wants it.

        With ``places_BT`` it computes those of these places alone, [B, T, D]; the mask is then that of [T, L].
        """
        config, memory_BLD = self.config, x_BLD
        if places_BT is not None:
            x_BLD = jnp.take_along_axis(x_BLD, places_BT[..., None], axis=1)
        norm = partial(Norm, epsilon=config.norm_epsilon, use_fast_variance=False, dtype=self.dtype)
        dropout = partial(Dropout(config.dropout), row_B=row_B, deterministic=deterministic)

        attention = MultiHeadAttention(
            config.num_heads, config.attention_dropout, config.kernel_init, self.dtype, name="attention"
        )
        mixed_BLD = attention(x_BLD, memory_BLD, mask, row_B=row_B, deterministic=deterministic)
        x_BLD = norm(name="attention_norm")(x_BLD + dropout(mixed_BLD))

        mlp = FeedForward(config.mlp_width, gelu, config.kernel_init, self.dtype, name="mlp")
        x_BLD = norm(name="mlp_norm")(x_BLD + dropout(mlp(x_BLD)))
        places = "sequence" if places_BT is None else "length"  # a few places are not split
        return sharding.constrain(x_BLD, "batch", places, "width"), None


class BertEncoder(nn.Module):
    """Embeddings, N blocks (scanned, their parameters stacked) and the pooler.

    Attributes:
      config: the architecture.
      dtype: type of the computation; parameters are float32.
    """

    config: BertConfig = BertConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        self.embeddings = BertEmbeddings(config, self.dtype)
        unroll = layers_per_turn(config.unroll, config.num_layers)
        block = remat(BertBlock, config.remat, unroll)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, nn.broadcast),  # Flax's annotation knows ints alone
            length=config.num_layers,
            unroll=unroll,
        )(config, self.dtype)
        self.pooler = Linear((config.width,), kernel_init=config.kernel_init, dtype=self.dtype)

    def __call__(
        self,
        tokens_BL: Array,
        segments_BL: Array | None = None,
        valid_BL: Array | None = None,
        *,
        positions_BL: Array | None = None,
        sequences_BL: Array | None = None,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array]:
        """Encodes sequences, one to a row or, with ``positions_BL`` and ``sequences_BL``, several.

        Args:
          tokens_BL: token ids.
          segments_BL: segment ids; None: all of segment 0.
          valid_BL: True at real tokens, which alone are attended to; None: all are real.
          positions_BL: each token's place in its sequence, below max_length; None: its place in the row.
          sequences_BL: equal where tokens are of one sequence, which alone see each other; then ``valid_BL`` is not
            looked at. None: a row is a sequence.
          row_B: the example's number in the global batch, for dropout; None: 0, 1, 2 ...
          deterministic: False applies dropout and needs the rng "dropout".

        Returns:
          (hidden states [B, L, D], pooled first position [B, D]).
        """
        segments_BL = jnp.zeros_like(tokens_BL) if segments_BL is None else segments_BL
        length, mask = tokens_BL.shape[1], kernels.Mask() if valid_BL is None else kernels.padding(valid_BL)
        mask = mask if sequences_BL is None else kernels.packed(sequences_BL)
        x_BLD = self.embeddings(
            tokens_BL, segments_BL, positions_BL=positions_BL, row_B=row_B, deterministic=deterministic
        )
        x_BLD, _ = self.layers(x_BLD, mask.for_layers(length, length), row_B, deterministic)
        return x_BLD, self.pool(x_BLD[:, 0])

    def at(
        self,
        places_BT: Array,
        tokens_BL: Array,
        segments_BL: Array,
        *,
        positions_BL: Array,
        sequences_BL: Array,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Hidden states [B, T, D] of a few places of packed rows: the last block computes no others.

        Of MiniLM's six layers that spares a seventh of all products, of BERT base's twelve a fourteenth. The arguments
        are those of ``__call__``, and ``places_BT`` the places in the row.
        """
        if self.is_initializing():  # creates the parameters
            x_BLD, _ = self(tokens_BL, segments_BL, positions_BL=positions_BL, sequences_BL=sequences_BL)
            return jnp.take_along_axis(x_BLD, places_BT[..., None], axis=1)
        config, length = self.config, tokens_BL.shape[1]
        drawn = {"row_B": row_B, "deterministic": deterministic}
        x_BLD = self.embeddings(tokens_BL, segments_BL, positions_BL=positions_BL, **drawn)
        unroll = layers_per_turn(config.unroll, config.num_layers)
        block = remat(BertBlock, config.remat, unroll)(config, self.dtype, parent=None)
        keys = None if deterministic else jax.random.split(self.make_rng("dropout"), config.num_layers)
        layers = self.layers.variables["params"], keys

        def apply(layer: Any, x_BLD: Array, mask: kernels.Mask, *places: Array) -> Array:
            params, key = layer
            rngs = None if key is None else {"dropout": key}
            return cast(Any, block.apply({"params": params}, x_BLD, mask, row_B, deterministic, *places, rngs=rngs))[0]

        mask = kernels.packed(sequences_BL).for_layers(length, length)
        first, last = (jax.tree.map(lambda x, part=part: x[part], layers) for part in (slice(-1), -1))
        x_BLD, _ = jax.lax.scan(lambda x, layer: (apply(layer, x, mask), None), x_BLD, first, unroll=unroll)
        own_BT = jnp.take_along_axis(sequences_BL, places_BT, axis=1)
        return apply(last, x_BLD, kernels.Mask(own_BT, sequences_BL), places_BT)

    def pool(self, x_BD: Array) -> Array:
        """Hidden states [B, ..., D] of first positions, as classifiers want them: a linear map and tanh."""
        # Said on both sides of the product: there are few rows, and XLA would rather gather them than the weights.
        return sharding.constrain(jnp.tanh(self.pooler(sharding.constrain(x_BD, "batch"))), "batch")


class MaskedLanguageHead(nn.Module):
    """Scores of the vocabulary at given positions: transform, then the token embedding as output layer, with bias."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BPD: Array, table: Embedding) -> Array:
        """Maps hidden states [B, P, D] to logits [B, P, V]."""
        config = self.config
        x_BPD = sharding.constrain(x_BPD, "batch", "length", "width")  # before and after, as in BertEncoder.pool
        x_BPD = Linear((config.width,), kernel_init=config.kernel_init, dtype=self.dtype, name="transform")(x_BPD)
        x_BPD = gelu(sharding.constrain(x_BPD, "batch", "length", "width"))
        x_BPD = Norm(epsilon=config.norm_epsilon, use_fast_variance=False, dtype=self.dtype, name="norm")(x_BPD)
        logits_BPV = table.logits(x_BPD) + self.param("bias", nn.initializers.zeros, (config.vocab_size,))
        return sharding.constrain(logits_BPV, "batch", "length", "vocab_logits")


class BertForPreTraining(nn.Module):
    """BERT with masked-language and next-sentence heads (section 3.1)."""

    config: BertConfig = BertConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        config = self.config
        self.encoder = BertEncoder(config, self.dtype)
        self.masked_language = MaskedLanguageHead(config, self.dtype)
        self.next_sentence = Linear((2,), kernel_init=config.kernel_init, dtype=self.dtype)

    def __call__(
        self,
        tokens_BL: Array,
        segments_BL: Array,
        valid_BL: Array,
        positions_BP: Array,
        *,
        row_B: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Array]:
        """Predicts the tokens at the given positions and whether segment B follows segment A.

        Args:
          tokens_BL: token ids, some of them masked.
          segments_BL: 0 for segment A, 1 for segment B.
          valid_BL: True at real tokens.
          positions_BP: which positions to predict; only these go through the vocabulary projection.
          row_B: as in BertEncoder.
          deterministic: as in BertEncoder.

        Returns:
          (logits [B, P, V], logits [B, 2] for "B follows A" and "B is random").
        """
        x_BLD, pooled_BD = self.encoder(tokens_BL, segments_BL, valid_BL, row_B=row_B, deterministic=deterministic)
        x_BPD = jnp.take_along_axis(x_BLD, positions_BP[..., None], axis=1)
        next_BC = sharding.constrain(self.next_sentence(pooled_BD), "batch")
        return self.masked_language(x_BPD, self.encoder.embeddings.token), next_BC


def flops_per_example(config: BertConfig, length: int, num_predictions: int) -> float:
    """Operations of one pretraining example, forward and backward: six for each weight that a position meets.

    Counted are the matrix products alone, with attention over the whole length; look-ups, norms, the optimizer and
    what remat computes again are not (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    width = config.width
    weights = config.num_layers * (4 * width * width + 2 * width * config.mlp_width)
    attention = config.num_layers * 2 * length * width
    heads = num_predictions * (width * width + width * config.vocab_size) + width * width + 2 * width
    return 6.0 * (length * (weights + attention) + heads)
