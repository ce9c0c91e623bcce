"""Word vectors: skip-gram and CBOW with negative sampling.

Mikolov, Sutskever, Chen, Corrado and Dean 2013, "Distributed Representations of Words and Phrases and their
Compositionality", arXiv 1310.4546 (negative sampling, subsampling of frequent words); Mikolov, Chen, Corrado and Dean
2013, "Efficient Estimation of Word Representations in Vector Space", arXiv 1301.3781 (the two models, windows).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax.config import check_range
from core_flax.layers import Embedding
from core_flax.recurrent import uniform
from core_flax.task import MetricSums
from core_flax.types import Array, Batch, Params, Sums


@dataclass(frozen=True)
class Word2VecConfig:
    """The architecture: two tables."""

    vocab_size: int = 30_000
    """Entries of both tables. Left at the preset's, it becomes the size of the data's vocabulary; a larger one pads
    the tables."""
    method: Literal["skip_gram", "cbow"] = "skip_gram"
    """What tells a word from noise: each word around it by itself, or the mean of them all (1301.3781, section 3)."""
    width: int = 100
    """Numbers in a word's vector."""

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        check_range("model", self, "vocab_size", "width", least=1)


class Word2Vec(nn.Module):
    """The vectors of words as context (``token``, those that are wanted) and as what is told from noise (``head``).

    Attributes:
      config: the architecture.
      dtype: type of the products; parameters and scores are float32.
    """

    config: Word2VecConfig = Word2VecConfig()
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the tables; they begin as in the authors' code."""
        config = self.config
        self.token = Embedding(config.vocab_size, config.width, uniform(0.5 / config.width), self.dtype)
        self.head = Embedding(config.vocab_size, config.width, nn.initializers.zeros, self.dtype)

    def __call__(self, tokens_BL: Array, negatives_BLK: Array, around_BLW: Array) -> tuple[Array, Array]:
        """The scores of words and of noise, by what is around the words.

        Args:
          tokens_BL: words, in the order of the text.
          negatives_BLK: noise for each.
          around_BLW: whether the word W / 2, ..., 1 before or 1, ..., W / 2 behind belongs to a word's context.

        Returns:
          Skip-gram: ([B, L, W], [B, L, W, K]), by each word around. CBOW: ([B, L, 1], [B, L, 1, K]), by their mean.
        """
        context_BLWD = _around(self.token(tokens_BL), around_BLW.shape[-1] // 2)
        if self.config.method == "cbow":
            weights_BLW = around_BLW / jnp.maximum(1, jnp.sum(around_BLW, axis=-1, keepdims=True))
            context_BLWD = jnp.einsum("BLW,BLWD->BLD", weights_BLW.astype(self.dtype), context_BLWD)[:, :, None]
        scores = partial(jnp.einsum, preferred_element_type=jnp.float32)
        words_BLW = scores("BLWD,BLD->BLW", context_BLWD, self.head(tokens_BL))
        return words_BLW, scores("BLWD,BLKD->BLWK", context_BLWD, self.head(negatives_BLK))


def _around(x_BL: Array, reach: int) -> Array:
    """[B, L, 2 * reach, ...]: what stands ``reach``, ..., 1 before each place and 1, ..., ``reach`` behind it, or 0."""
    length = x_BL.shape[1]
    padded = jnp.pad(x_BL, ((0, 0), (reach, reach), *((0, 0),) * (x_BL.ndim - 2)))
    offsets = [offset for offset in range(2 * reach + 1) if offset != reach]
    return jnp.stack([padded[:, offset : offset + length] for offset in offsets], axis=2)


def context_of(batch: Batch, reach: int) -> Array:
    """[B, L, 2 * reach], bool: which of the places around a word (as in _around) belong to its context."""
    sequences_BL, reach_BL = batch["sequences"], batch["reach"]
    distances = jnp.abs(jnp.array([offset for offset in range(-reach, reach + 1) if offset]))
    # Sequences count from 1; 0 is padding, and what lies beyond the row.
    same_BLW = _around(sequences_BL, reach) == sequences_BL[..., None]
    return same_BLW & (sequences_BL > 0)[..., None] & (distances <= reach_BL[..., None])


def loss_weights(batch: Batch, config: Word2VecConfig, reach: int) -> Sums:
    """Number of (word, context) pairs; of words with a context for CBOW."""
    return {"loss": jnp.sum(_pairs(batch, config, reach)).astype(jnp.float32)}


def _pairs(batch: Batch, config: Word2VecConfig, reach: int) -> Array:
    around_BLW = context_of(batch, reach)
    return jnp.any(around_BLW, axis=-1, keepdims=True) if config.method == "cbow" else around_BLW


def word2vec_sums(model: Word2Vec, params: Params, batch: Batch, reach: int) -> tuple[Sums, MetricSums]:
    """The sum over pairs of the loss (1310.4546, equation 4), and how often a word scores above all of its noise.

    A word's noise is the same for all of its context (Ji et al. 2016, arXiv 1604.04661, section 3): the expected
    gradient is that of noise drawn for each pair. Noise that happens to be the word itself counts for nothing, as in
    the authors' code.
    """
    around_BLW, negatives_BLK = context_of(batch, reach), batch["negatives"]
    scores: Any = model.apply({"params": params}, batch["tokens"], negatives_BLK, around_BLW)
    words_BLW, noise_BLWK = scores
    pairs_BLW = _pairs(batch, model.config, reach)
    is_noise_BL1K = (negatives_BLK != batch["tokens"][..., None])[:, :, None]
    noise_BLW = jnp.sum(jax.nn.softplus(noise_BLWK) * is_noise_BL1K, axis=-1)
    loss = jnp.sum((jax.nn.softplus(-words_BLW) + noise_BLW) * pairs_BLW)
    above_BLW = jnp.all((words_BLW[..., None] > noise_BLWK) | ~is_noise_BL1K, axis=-1)
    total = jnp.sum(pairs_BLW).astype(jnp.float32)
    return {"loss": loss}, {"above_noise": (jnp.sum(above_BLW * pairs_BLW).astype(jnp.float32), total)}
