"""The output layer with a bias, which language models had before theirs was the embedding."""

import flax.linen as nn
import jax.numpy as jnp

from core_flax import sharding
from core_flax.types import Array, Params


class BiasedOutput(nn.Module):
    """A table [V, D] and a bias [V].

    The bias is the table's column for an input that is always 1. So models with this layer end their hidden states with
    a 1, and a loss that multiplies hidden states by a table computes what it should without knowing of biases.

    Attributes:
      num_entries: V.
      width: D, of the hidden states without the 1.
      table_init: initialiser of the table.
      bias_init: of the bias.
      dtype: type of the products; parameters are float32.
    """

    num_entries: int
    width: int
    table_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameters."""
        self.embedding = self.param("embedding", self.table_init, (self.num_entries, self.width))
        self.bias = self.param("bias", self.bias_init, (self.num_entries,))

    def __call__(self, x_BLD: Array) -> Array:
        """Hidden states [B, L, D] with the 1 at their end."""
        return jnp.concatenate([x_BLD, jnp.ones((*x_BLD.shape[:-1], 1), x_BLD.dtype)], axis=-1)

    def logits(self, x: Array) -> Array:
        """Scores [..., V], float32, of hidden states [..., D + 1]."""
        table = output_table({"embedding": self.embedding, "bias": self.bias}).astype(self.dtype)
        table = sharding.gather_table(table, "vocab_logits")
        return jnp.einsum("...D,VD->...V", x.astype(self.dtype), table, preferred_element_type=jnp.float32)


def output_table(params: Params) -> Array:
    """[V, D + 1]: what hidden states with a 1 are multiplied by, from the parameters of a BiasedOutput."""
    return jnp.concatenate([params["embedding"], params["bias"][:, None]], axis=1)
