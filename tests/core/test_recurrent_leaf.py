"""The LSTM against torch's, forward and gradient; several sequences to a row as each alone; and where a row stops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.recurrent import LSTM, LSTMState, state_after, states_at, uniform, zero_state

B, L, D, F = 3, 9, 5, 4
MODULE = LSTM(F, 0.0, uniform(0.6))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return MODULE.init(jax.random.key(0), normal(0, B, L, D))


@functools.partial(jax.jit, static_argnames="reverse")
def read(params, x, initial=None, starts=None, start=None, reverse=False):
    return MODULE.apply(params, x, initial, starts_BL=starts, start_BLF=start, reverse=reverse)


def weighted(states, weights):
    """A number that depends on every hidden state and on the last cells, each in its own way."""
    return (states.hidden * weights[0]).sum() + (states.cell[:, -1] * weights[1]).sum()


@pytest.mark.parametrize("reverse", [False, True])
def test_against_torch(params, reverse):
    torch = pytest.importorskip("torch")
    x, initial = normal(1, B, L, D), LSTMState(normal(2, B, F), normal(3, B, F))
    weights = normal(4, B, L, F), normal(5, B, F)
    given = params["params"]
    theirs = torch.nn.LSTM(D, F, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.tensor(np.asarray(given["input_kernel"]).reshape(D, 4 * F).T.copy()))
        theirs.weight_hh_l0.copy_(torch.tensor(np.asarray(given["recurrent_kernel"]).reshape(F, 4 * F).T.copy()))
        theirs.bias_ih_l0.copy_(torch.tensor(np.asarray(given["bias"]).reshape(4 * F).copy()))
        theirs.bias_hh_l0.zero_()
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, initial.hidden, initial.cell)]
    turned = inputs[0].flip(1) if reverse else inputs[0]
    hidden, (_, cell) = theirs(turned, (inputs[1][None], inputs[2][None]))
    hidden = hidden.flip(1) if reverse else hidden
    ((hidden * torch.tensor(weights[0])).sum() + (cell[0] * torch.tensor(weights[1])).sum()).backward()

    def objective(params, x, initial):
        states = read(params, x, initial, reverse=reverse)
        last = states.cell[:, :1] if reverse else states.cell
        return weighted(LSTMState(states.hidden, last), weights), states

    gradients, states = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(params, x, initial)
    np.testing.assert_allclose(states.hidden, hidden.detach(), atol=1e-5)
    expected = {
        "input_kernel": theirs.weight_ih_l0.grad.T.reshape(D, 4, F),
        "recurrent_kernel": theirs.weight_hh_l0.grad.T.reshape(F, 4, F),
        "bias": theirs.bias_ih_l0.grad.reshape(4, F),
    }
    for name, each in expected.items():
        np.testing.assert_allclose(gradients[0]["params"][name], each, atol=1e-5, rtol=1e-5, err_msg=name)
    for found, each in zip((gradients[1], gradients[2].hidden, gradients[2].cell), inputs, strict=True):
        np.testing.assert_allclose(found, each.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_start", [False, True])
def test_sequences_of_a_row_are_read_as_alone(params, reverse, with_start):
    """Rows of sequences of 4 + 3 + 2 tokens: states and the gradients of inputs, parameters and first states."""
    x, weights = normal(1, B, L, D), (normal(2, B, L, F), np.zeros((B, F), np.float32))
    begins, ends = np.array([0, 4, 7]), np.array([4, 7, 9])
    starts = np.zeros((B, L), bool)
    starts[:, ends - 1 if reverse else begins] = True
    start = LSTMState(normal(3, B, L, F), normal(4, B, L, F)) if with_start else None
    before = LSTMState(normal(5, B, F), normal(6, B, F))

    def together(params, x, start):
        states = read(params, x, before, starts, start, reverse)
        return weighted(states, weights), states.hidden

    def apart(params, x, start):
        parts = []
        for begin, end in zip(begins, ends, strict=True):
            first = end - 1 if reverse else begin
            initial = None if start is None else jax.tree.map(lambda s, at=first: s[:, at], start)
            parts.append(read(params, x[:, begin:end], initial, reverse=reverse).hidden)
        hidden = jnp.concatenate(parts, axis=1)
        return (hidden * weights[0]).sum(), hidden

    (found, found_hidden), (expected, hidden) = (
        jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(params, x, start) for objective in (together, apart)
    )
    np.testing.assert_allclose(found_hidden, hidden, atol=1e-6)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.abs(other).max() > 0.01


def test_part_by_part(params):
    """Each row stops where its tokens end, and one without tokens stays as it was."""
    x, num_tokens = normal(1, B, L, D), np.array([4, 0, 2])
    whole, before = read(params, x), LSTMState(normal(2, B, F), normal(3, B, F))
    state = state_after(read(params, x[:, :4], before), before, num_tokens)
    alone = read(params, x[:1, :4], jax.tree.map(lambda s: s[:1], before)), read(params, x[2:, :2], state_at(before, 2))
    for name in ("hidden", "cell"):
        found = getattr(state, name)
        np.testing.assert_array_equal(found[1], getattr(before, name)[1])
        np.testing.assert_allclose(found[0], getattr(alone[0], name)[0, -1], atol=1e-6)
        np.testing.assert_allclose(found[2], getattr(alone[1], name)[0, -1], atol=1e-6)
    first = state_after(read(params, x[:, :4]), zero_state(B, F), None)
    np.testing.assert_allclose(read(params, x[:, 4:], first).cell, whole.cell[:, 4:], atol=1e-6)
    chosen = states_at(whole, np.array([[0, 8], [3, 3], [1, 0]]))
    np.testing.assert_array_equal(chosen.hidden[1], whole.hidden[1, [3, 3]])


def state_at(states, row):
    return jax.tree.map(lambda s: s[row : row + 1], states)


def test_parameters_at_the_start():
    """Uniform within the limit, all of them; the forget gate's bias, and no other, is moved by what is asked for."""
    drawn = [
        LSTM(50, bias, uniform(0.08)).init(jax.random.key(0), normal(0, 1, 1, 60))["params"] for bias in (0.0, 1.0)
    ]
    for kernel in (drawn[0]["input_kernel"], drawn[0]["recurrent_kernel"]):
        assert 0.079 < float(kernel.max()) < 0.08 and -0.08 < float(kernel.min()) < -0.079
        assert float(kernel.std()) == pytest.approx(0.08 / 3**0.5, rel=0.02)
    moved = drawn[1]["bias"] - drawn[0]["bias"]
    np.testing.assert_allclose(moved, np.repeat([[0.0], [1.0], [0.0], [0.0]], 50, axis=1), atol=1e-6)
    assert float(jnp.abs(drawn[0]["bias"]).max()) < 0.08 and float(drawn[0]["bias"].std()) > 0.03


def test_bfloat16_keeps_a_float32_cell(params):
    x = normal(1, B, L, D)
    exact, module = read(params, x), MODULE.clone(dtype=jnp.bfloat16)
    states, gradient = jax.value_and_grad(lambda p: module.apply(p, x).hidden.astype(jnp.float32).sum())(params)
    assert states.dtype == jnp.float32 and gradient["params"]["recurrent_kernel"].dtype == jnp.float32
    rounded = module.apply(params, x)
    assert rounded.hidden.dtype == jnp.bfloat16 and rounded.cell.dtype == jnp.float32
    np.testing.assert_allclose(rounded.cell, exact.cell, atol=0.05)
