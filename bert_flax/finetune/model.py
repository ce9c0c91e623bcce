"""The two shapes of a fine-tuned BERT (arXiv 1810.04805, section 4, figure 4): scores of sequences or of tokens.

Sequences lie several to a row; see ``batches.PackedUnits`` for the arrays.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bert_flax.finetune.tasks import TaskSpec
from bert_flax.model import BertConfig, BertEncoder
from core_flax.layers import Dropout, Linear
from core_flax.types import Array, Batch


class BertForSequences(nn.Module):
    """Scores each sequence from its pooled [CLS]: classes, one number, or one score per choice.

    Attributes:
      config: the encoder.
      num_outputs: scores per sequence.
      dtype: type of the computation; parameters are float32.
    """

    config: BertConfig
    num_outputs: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        self.encoder = BertEncoder(self.config, self.dtype)
        self.dropout = Dropout(self.config.dropout)
        self.head = Linear((self.num_outputs,), kernel_init=self.config.kernel_init, dtype=self.dtype)

    def __call__(self, batch: Batch, *, row_B: Array | None = None, deterministic: bool = True) -> Array:
        """Returns float32 [R, S, C, num_outputs]; what stands where there is no unit means nothing."""
        first_RSC = batch["first_tokens"]
        first_RT = first_RSC.reshape(len(first_RSC), -1)
        rows = _rows(batch, row_B, deterministic)
        pooled_RTD = self.encoder.pool(self.encoder.at(first_RT, batch["tokens"], batch["segments"], **rows))
        scores_RTO = self.head(self.dropout(pooled_RTD, row_B=row_B, deterministic=deterministic))
        return scores_RTO.astype(jnp.float32).reshape(*first_RSC.shape, self.num_outputs)


class BertForTokens(nn.Module):
    """Scores each token: the start and the end of an answer, or tags. Attributes as in BertForSequences.

    The pooler is part of the parameters, as it is of the encoder's, and gets no gradient.
    """

    config: BertConfig
    num_outputs: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the submodules."""
        self.encoder = BertEncoder(self.config, self.dtype)
        self.dropout = Dropout(self.config.dropout)
        self.head = Linear((self.num_outputs,), kernel_init=self.config.kernel_init, dtype=self.dtype)

    def __call__(self, batch: Batch, *, row_B: Array | None = None, deterministic: bool = True) -> Array:
        """Returns float32 [R, L, num_outputs]."""
        x_RLD, _ = self.encoder(batch["tokens"], batch["segments"], **_rows(batch, row_B, deterministic))
        return self.head(self.dropout(x_RLD, row_B=row_B, deterministic=deterministic)).astype(jnp.float32)


def num_outputs(spec: TaskSpec) -> int:
    """Scores of a sequence (of each choice), or of a token."""
    return {"span": 2, "choice": 1, "regression": 1}.get(spec.kind, len(spec.labels))


def architecture(spec: TaskSpec) -> str:
    """What Hugging Face calls a model with the task's head."""
    names = {"span": "QuestionAnswering", "tagging": "TokenClassification", "choice": "MultipleChoice"}
    return f"BertFor{names.get(spec.kind, 'SequenceClassification')}"


def _rows(batch: Batch, row_B: Array | None, deterministic: bool) -> dict[str, Any]:
    """How the encoder is to read packed rows."""
    return {
        "positions_BL": batch["positions"],
        "sequences_BL": batch["sequences"],
        "row_B": row_B,
        "deterministic": deterministic,
    }
