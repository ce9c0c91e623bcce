"""The LSTM: gates in one product, inputs mapped for the whole sequence at once, several sequences to a row."""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from core_flax import sharding
from core_flax.layers import linear
from core_flax.types import Array


@flax.struct.dataclass
class LSTMState:
    """What an LSTM carries from token to token, or what it carried after each of several.

    Attributes:
      hidden: [B, F], or [B, L, F]: one after each token; what the layer above reads.
      cell: likewise, float32 always: it is a sum over all the tokens before.
    """

    hidden: Array
    cell: Array


def zero_state(batch_size: int, width: int, dtype: jnp.dtype = jnp.float32) -> LSTMState:
    """The state [B, F] before anything is read."""
    return LSTMState(jnp.zeros((batch_size, width), dtype), jnp.zeros((batch_size, width)))


def states_at(states_BLF: Any, positions_BP: Array) -> Any:
    """Of the states after each token (LSTMState, or any pytree of [B, L, ...]) those at some positions, [B, P, ...]."""
    rows_B1 = jnp.arange(len(positions_BP))[:, None]
    return jax.tree.map(lambda x: x[rows_B1, positions_BP], states_BLF)


def state_after(states_BLF: Any, initial_BF: Any, num_tokens_B: Array | None) -> Any:
    """The state [B, F] after the first tokens of each row, as many as are real; None: all; 0: the initial one."""
    if num_tokens_B is None:
        return jax.tree.map(lambda x: x[:, -1], states_BLF)
    last_BP = jnp.maximum(num_tokens_B - 1, 0)[:, None]

    def choose(read: Array, before: Array) -> Array:
        return jnp.where(num_tokens_B.reshape(-1, *(1,) * (before.ndim - 1)) > 0, read[:, 0], before)

    return jax.tree.map(choose, states_at(states_BLF, last_BP), initial_BF)


def uniform(limit: float) -> nn.initializers.Initializer:
    """Initialiser: uniform between -limit and limit."""

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class LSTMWeights(nn.Module):
    """The parameters of an LSTM layer; its gates are input, forget, cell and output, in this order.

    Attributes:
      width: F, of hidden state and cell.
      forget_bias: what is added to the forget gate's bias at the start. 0: as published (Gers et al. 2000); 1: keeps
        what was read (Jozefowicz et al. 2015, "An Empirical Exploration of Recurrent Network Architectures").
      param_init: initialiser of kernels and bias.
      dtype: type of the products; parameters, gates and cell are float32.
    """

    width: int
    forget_bias: float
    param_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_width: int) -> tuple[Array, Array, Array]:
        """Returns (kernel of inputs [D, 4, F], recurrent kernel [F, 4, F], bias [4, F]) for D = ``input_width``."""
        return self.weights(input_width)

    def weights(self, input_width: int) -> tuple[Array, Array, Array]:
        """As __call__, for use inside a compact method of a subclass."""

        def bias_init(key: Array, shape: tuple[int, ...]) -> Array:
            return self.param_init(key, shape, jnp.float32) + jnp.array([0.0, self.forget_bias, 0.0, 0.0])[:, None]

        kernels = [
            self.param(name, self.param_init, (width, 4, self.width), jnp.float32).astype(self.dtype)
            for name, width in (("input_kernel", input_width), ("recurrent_kernel", self.width))
        ]
        # Wherever its parts are stored, the loop wants the whole: it would be collected anew at every step.
        kernels[1] = sharding.constrain(kernels[1], "width", "small", "width")
        return kernels[0], kernels[1], self.param("bias", bias_init, (4, self.width))


def lstm_step(gates_B4F: Array, cell_BF: Array, dtype: jnp.dtype) -> LSTMState:
    """The next state, from the gates before their nonlinearities and the cell (Hochreiter and Schmidhuber 1997).

    With the forget gate of Gers et al. 2000 and without peepholes (Zaremba et al. 2014, arXiv 1409.2329, section 3).
    """
    enter, forget, _, leave = (jax.nn.sigmoid(gates_B4F[:, number]) for number in range(4))
    cell_BF = forget * cell_BF + enter * jnp.tanh(gates_B4F[:, 2])
    return LSTMState((leave * jnp.tanh(cell_BF)).astype(dtype), cell_BF)


class LSTM(LSTMWeights):
    """One layer that reads sequences from left to right, or from right to left. Attributes: see LSTMWeights."""

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x_BLD: Array,
        initial_BF: LSTMState | None = None,
        *,
        starts_BL: Array | None = None,
        start_BLF: LSTMState | None = None,
        reverse: bool = False,
    ) -> LSTMState:
        """The states [B, L, F] after each token.

        Args:
          x_BLD: inputs.
          initial_BF: state before the first token that is read; None: zero.
          starts_BL: True at tokens that begin a sequence: before reading these, all is forgotten. (Read from right to
            left, a sequence begins at its last token.) None: at none, so that the row goes on from ``initial_BF``.
          start_BLF: the state that such sequences begin with, looked at where ``starts_BL``; None: zero.
          reverse: read from right to left.
        """
        kernel, recurrent, bias = self.weights(x_BLD.shape[-1])
        # Time before rows, as the loop wants it: the narrower x is turned around, not what it is mapped to.
        projected_LB4F = linear(x_BLD.swapaxes(0, 1), kernel).astype(jnp.float32) + bias
        initial_BF = initial_BF or zero_state(len(x_BLD), self.width, self.dtype)
        if starts_BL is None:
            starts_BL = jnp.zeros(x_BLD.shape[:2], bool)
        start_LBF = jax.tree.map(lambda x: x.swapaxes(0, 1), start_BLF)
        states_LBF = _read(reverse, projected_LB4F, recurrent, initial_BF, starts_BL.T, start_LBF)
        states = jax.tree.map(lambda x: x.swapaxes(0, 1), states_LBF)
        return jax.tree.map(lambda x: sharding.constrain(x, "batch", "length", "width"), states)


def _loop(
    reverse: bool,
    projected_LB4F: Array,
    recurrent_F4F: Array,
    initial_BF: LSTMState,
    starts_LB: Array,
    start_LBF: LSTMState | None,
) -> tuple[LSTMState, Array]:
    """The states after each step, and the hidden states before each, [L, B, F] all of them."""

    def step(state: LSTMState, now: tuple[Array, Array, LSTMState | None]) -> tuple[LSTMState, tuple[LSTMState, Array]]:
        projected_B4F, starts_B, start_BF = now
        begin = jax.tree.map(jnp.zeros_like, state) if start_BF is None else start_BF
        state = jax.tree.map(lambda new, old: jnp.where(starts_B[:, None], new.astype(old.dtype), old), begin, state)
        gates_B4F = projected_B4F + linear(state.hidden, recurrent_F4F).astype(jnp.float32)
        following = lstm_step(gates_B4F, state.cell, state.hidden.dtype)
        return following, (following, state.hidden)

    sequence = projected_LB4F, starts_LB, start_LBF
    # One step to a turn: several are no faster, and on a CPU slower (8: up to twice the time).
    return jax.lax.scan(step, initial_BF, sequence, reverse=reverse)[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(reverse: bool, projected: Array, recurrent: Array, initial: LSTMState, starts: Array, start: Any) -> Any:
    """The states of _loop; the gradient of the recurrent kernel is one product over all steps, not a sum of many."""
    return _loop(reverse, projected, recurrent, initial, starts, start)[0]


def _forward(reverse: bool, projected: Array, recurrent: Array, initial: LSTMState, starts: Array, start: Any) -> Any:
    def loop(projected: Array, initial: LSTMState, start: Any) -> tuple[LSTMState, Array]:
        return _loop(reverse, projected, recurrent, initial, starts, start)

    states, pull_back, hidden_LBF = jax.vjp(loop, projected, initial, start, has_aux=True)
    return states, (pull_back, hidden_LBF, recurrent)


def _backward(reverse: bool, kept: Any, gradients: LSTMState) -> Any:
    pull_back, hidden_LBF, recurrent_F4F = kept
    projected, initial, start = pull_back(gradients)
    kernel = jnp.einsum("LBD,LBGF->DGF", hidden_LBF, projected.astype(hidden_LBF.dtype))
    return projected, kernel.astype(recurrent_F4F.dtype), initial, None, start


_read.defvjp(_forward, _backward)
