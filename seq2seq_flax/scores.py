"""Attention of a recurrent decoder: how well each token of a source fits a state, and the mean that follows."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax.layers import linear
from core_flax.types import Array

Score = Literal["dot", "general", "additive"]


class ScoreWeights(nn.Module):
    """The parameters of a score.

    Attributes:
      score: dot and general: Luong et al. 2015 (arXiv 1508.04025, section 3.1); additive: Bahdanau et al. 2015 (arXiv
        1409.0473, appendix A.1.2).
      width: F, of states, memory and, if the score is additive, of its hidden layer.
      param_init: initialiser.
      dtype: type of the computation; parameters are float32.
    """

    score: Score
    width: int
    param_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameters."""
        square = self.width, self.width
        if self.score != "dot":
            self.memory_kernel = self.param("memory_kernel", self.param_init, square)
        if self.score == "additive":
            self.query_kernel = self.param("query_kernel", self.param_init, square)
            self.scale = self.param("scale", self.param_init, (self.width,))

    def keys(self, memory_BMF: Array) -> Array:
        """What states are compared with, [B, M, F]: computed once for a source."""
        return memory_BMF if self.score == "dot" else linear(memory_BMF, self.memory_kernel.astype(self.dtype))

    def additive(self) -> tuple[Array, Array] | None:
        """(kernel of the states [F, F], weights of the hidden layer [F]) if the score is additive."""
        if self.score != "additive":
            return None
        return self.query_kernel.astype(self.dtype), self.scale.astype(self.dtype)


def attend(
    query_BF: Array, keys_BMF: Array, values_BMF: Array, mask_BM: Array, additive: tuple[Array, Array] | None
) -> tuple[Array, Array]:
    """The mean of the values, weighted by how well their keys fit the queries.

    Args:
      query_BF: states. Their rows may be a multiple of the rows of all else, as core_flax.cache says of forks.
      keys_BMF: by ScoreWeights.keys.
      values_BMF: the memory itself.
      mask_BM: True where a query may look.
      additive: by ScoreWeights.additive.

    Returns:
      (context [B, F], probabilities [B, M], float32).
    """
    query_BPF = query_BF.reshape(len(keys_BMF), -1, query_BF.shape[-1])
    probs_BPM = probabilities(query_BPF, keys_BMF, mask_BM[:, None], additive)
    context_BPF = jnp.einsum("BPM,BMF->BPF", probs_BPM.astype(values_BMF.dtype), values_BMF)
    return context_BPF.reshape(query_BF.shape), probs_BPM.reshape(len(query_BF), -1)


def probabilities(query_BPF: Array, keys_BMF: Array, mask_BPM: Array, additive: tuple[Array, Array] | None) -> Array:
    """How much several queries look at each token [B, P, M], float32; the rest as in ``attend``."""
    score = _product_scores if additive is None else _additive_scores
    scores_BPM = score(query_BPF, keys_BMF, additive)
    return jax.nn.softmax(jnp.where(mask_BPM, scores_BPM, jnp.finfo(jnp.float32).min), axis=-1)


def _product_scores(query_BPF: Array, keys_BMF: Array, additive: Any) -> Array:
    return jnp.einsum("BPF,BMF->BPM", query_BPF, keys_BMF, preferred_element_type=jnp.float32)


# The hidden layer is computed again in the backward pass: to keep [B, M, F] of every step would take the most memory.
@jax.checkpoint
def _additive_scores(query_BPF: Array, keys_BMF: Array, additive: tuple[Array, Array]) -> Array:
    kernel, scale = additive
    hidden_BPMF = jnp.tanh(linear(query_BPF, kernel)[:, :, None] + keys_BMF[:, None])
    return jnp.einsum("BPMF,F->BPM", hidden_BPMF, scale, preferred_element_type=jnp.float32)
