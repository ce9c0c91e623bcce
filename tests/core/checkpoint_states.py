"""States to save and compare, and what opens a folder of checkpoints for a test: for the tests of checkpoints."""

import contextlib
import functools
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig
from core_flax.snapshot import named_leaves
from core_flax.state import TrainState

OPTIMIZER = optax.named_chain(
    ("clip", optax.clip_by_global_norm(1.0)),
    ("adam", optax.scale_by_adam()),
    ("decay", optax.add_decayed_weights(0.1, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))),
    ("rate", optax.scale_by_schedule(lambda step: 1.0)),
)


@functools.partial(jax.jit, static_argnums=1)
def make_state(step, width=16):
    """A state that is a function of its step, with bits that are no number among its bits."""
    key = jax.random.fold_in(jax.random.key(0), step)
    params = {
        "encoder": {"kernel": jax.random.normal(key, (8, width, 4)), "bias": jnp.zeros(4).at[1].set(-0.0)},
        "scale": jnp.full(width, step, jnp.float32).at[0].set(jnp.nan),
    }
    state = TrainState(jnp.asarray(step, jnp.int32), params, OPTIMIZER.init(params))
    grads = jax.tree.map(lambda x: jnp.nan_to_num(x) * 0.01 + 0.125, params)
    return state.replace(opt_state=OPTIMIZER.update(grads, state.opt_state, params)[1])


ABSTRACT = jax.eval_shape(make_state, 0)


def bits(tree):
    return {name: np.asarray(x).tobytes() for name, x in named_leaves(tree).items()}


def assert_same(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    assert bits(state) == bits(other)


@contextlib.contextmanager
def opening(folder):
    """Gives what makes Checkpoints in the folder, closed after it; what they say is in the attribute ``said``."""
    made = []

    def make(keep_last=3, keep_best=0, where=folder):
        said = []
        made.append(Checkpoints(where, CheckpointConfig(keep_last=keep_last, keep_best=keep_best), said.append))
        return namedtuple("Opened", "checkpoints said")(made[-1], said)

    yield make
    for checkpoints in made:
        checkpoints.close()


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(make_state(step))
    checkpoints.wait()
