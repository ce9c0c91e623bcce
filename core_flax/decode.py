"""Generation, greedy or by chance, with any model that has the methods which ``core_flax/cache.py`` describes.

``begin`` takes in the prompts, ``proceed`` adds tokens until every row has ended, or as many as wanted, so that they
can be shown one by one. Each is compiled once for a shape.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from core_flax.sampling import GREEDY, Sampling, draw
from core_flax.types import Array, Params


@flax.struct.dataclass
class Generation:
    """How far B rows have come.

    Attributes:
      tokens_BL: what has been generated, a stop token included; 0 beyond.
      num_tokens_B: how many of them are real.
      log_probs_B: sum of the natural logarithms of the probabilities that the model gave them, before temperature and
        filters.
      ended_B: True where a stop token or the limit has been reached.
      limit_B: tokens that a row may have at most.
      last_B: the token to be read next.
      keys_B: a jax.random key for each row, or None.
      cache: what has been read.
    """

    tokens_BL: Array
    num_tokens_B: Array
    log_probs_B: Array
    ended_B: Array
    limit_B: Array
    last_B: Array
    keys_B: Array | None
    cache: Any


@partial(jax.jit, static_argnames=("model", "length"))
def begin(
    model: nn.Module,
    params: Params,
    cache: Any,
    prompts_BL: Array,
    num_prompt_B: Array | None = None,
    limit_B: Array | None = None,
    keys_B: Array | None = None,
    *,
    length: int,
) -> Generation:
    """Reads the prompts.

    Args:
      model: a module with ``extend`` and ``logits``.
      params: its parameters.
      cache: an empty one, or one that has read a source, with room for a row's prompt and what it may generate.
      prompts_BL: tokens that each row begins with, one at least (``<s>``, a target language, a text), padded on the
        right with anything.
      num_prompt_B: how many of them are real; None: all.
      limit_B: tokens that each row may generate; None: ``length``.
      keys_B: a key for each row (``row_keys``), for sampling; what a row generates depends on no other row's.
      length: size of the result; no limit may exceed it.
    """
    batch_size, most = prompts_BL.shape
    num_read_B = (jnp.full(batch_size, most) if num_prompt_B is None else num_prompt_B) - 1
    most_B = jnp.full(batch_size, length) if limit_B is None else limit_B
    if most > 1:
        cache = _extend(model, params, prompts_BL[:, :-1], cache, num_read_B)[1]
    return Generation(
        tokens_BL=jnp.zeros((batch_size, length), jnp.int32),
        num_tokens_B=jnp.zeros(batch_size, jnp.int32),
        log_probs_B=jnp.zeros(batch_size),
        ended_B=most_B <= 0,
        limit_B=most_B.astype(jnp.int32),
        last_B=jnp.take_along_axis(prompts_BL, num_read_B[:, None], axis=1)[:, 0].astype(jnp.int32),
        keys_B=keys_B,
        cache=cache,
    )


@partial(jax.jit, static_argnames=("model", "sampling", "stop"), donate_argnames="generation")
def proceed(
    model: nn.Module,
    params: Params,
    generation: Generation,
    num_steps: Array | int,
    *,
    sampling: Sampling = GREEDY,
    stop: tuple[int, ...] = (),
    allowed_V: Array | None = None,
) -> Generation:
    """The generation with ``num_steps`` more tokens in every row that has not ended; what is given is used up.

    Args:
      model: as in ``begin``.
      params: likewise.
      generation: how far it is.
      num_steps: how many tokens to add at most.
      sampling: how they are chosen; if by chance, the generation must have keys.
      stop: tokens with which a row ends.
      allowed_V: bool; False for tokens that must not come. None: all may.
    """
    assert sampling.temperature == 0 or generation.keys_B is not None, "sampling needs keys"

    parts = in_parts(model, params)

    def goes_on(carry: tuple[Array, Generation]) -> Array:
        return (carry[0] < num_steps) & ~jnp.all(carry[1].ended_B)

    def step(carry: tuple[Array, Generation]) -> tuple[Array, Generation]:
        return carry[0] + 1, _step(model, parts, carry[1], sampling, stop, allowed_V)

    return jax.lax.while_loop(goes_on, step, (jnp.int32(0), generation))[1]


def generate(
    model: nn.Module,
    params: Params,
    cache: Any,
    prompts_BL: Array,
    num_prompt_B: Array | None = None,
    limit_B: Array | None = None,
    keys_B: Array | None = None,
    *,
    length: int,
    sampling: Sampling = GREEDY,
    stop: tuple[int, ...] = (),
    allowed_V: Array | None = None,
) -> Generation:
    """``begin`` and ``proceed`` to the end; arguments are theirs."""
    generation = begin(model, params, cache, prompts_BL, num_prompt_B, limit_B, keys_B, length=length)
    return proceed(model, params, generation, length, sampling=sampling, stop=stop, allowed_V=allowed_V)


def row_keys(seed: int, numbers_B: Array) -> Array:
    """A key for each row by its number among all rows, so that batches may hold any of them."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers_B)


def in_parts(model: nn.Module, params: Params) -> Params:
    """The parameters as a loop over tokens wants them: on a CPU not stacked, see core_flax.cache."""
    unstack = getattr(model, "unstack", None)
    return unstack(params) if unstack is not None and jax.default_backend() == "cpu" else params


def next_logits(model: nn.Module, params: Params, last_B: Array, cache: Any, goes_on_B: Array) -> tuple[Array, Any]:
    """Scores [B, V] of the next token after reading one more in the rows that go on, and the cache with it."""
    x_BLD, cache = _extend(model, params, last_B[:, None], cache, goes_on_B.astype(jnp.int32))
    logits_BV: Any = model.apply({"params": params}, x_BLD[:, 0], method="logits")
    return logits_BV.astype(jnp.float32), cache


def _extend(model: nn.Module, params: Params, tokens_BL: Array, cache: Any, num_tokens_B: Array) -> tuple[Array, Any]:
    return model.apply({"params": params}, tokens_BL, cache, num_tokens_B, method="extend")


def _step(
    model: nn.Module,
    params: Params,
    now: Generation,
    sampling: Sampling,
    stop: tuple[int, ...],
    allowed_V: Array | None,
) -> Generation:
    """One more token for every row that has not ended."""
    goes_on_B = ~now.ended_B
    logits_BV, cache = next_logits(model, params, now.last_B, now.cache, goes_on_B)
    keys_B = None if now.keys_B is None else jax.vmap(jax.random.fold_in)(now.keys_B, now.num_tokens_B)
    masked_BV = logits_BV if allowed_V is None else jnp.where(allowed_V, logits_BV, -jnp.inf)
    token_B = jnp.where(goes_on_B, draw(masked_BV, keys_B, sampling), now.last_B)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    log_probs_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    here_BL = (jnp.arange(now.tokens_BL.shape[1]) == now.num_tokens_B[:, None]) & goes_on_B[:, None]
    num_tokens_B = now.num_tokens_B + goes_on_B
    return dataclasses.replace(
        now,
        tokens_BL=jnp.where(here_BL, token_B[:, None], now.tokens_BL),
        num_tokens_B=num_tokens_B,
        log_probs_B=now.log_probs_B + jnp.where(goes_on_B, log_probs_B, 0.0),
        ended_B=now.ended_B | is_stop(token_B, stop) | (num_tokens_B >= now.limit_B),
        last_B=token_B,
        cache=cache,
    )


def is_stop(tokens: Array, stop: tuple[int, ...]) -> Array:
    """Which of the tokens, of any shape, are among these."""
    return jnp.any(tokens[..., None] == jnp.array(stop, jnp.int32), axis=-1)
