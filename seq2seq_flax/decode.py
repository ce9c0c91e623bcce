"""Translating many sentences at once: sorted by length, in batches of a few shapes, and put back in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from core_flax import cache as caches
from core_flax import sharding
from core_flax.beam import Beams, BeamSearch, Hypotheses, beam_search, refill, run_beams, start_beams
from core_flax.decode import Generation, begin, generate, row_keys
from core_flax.sampling import Sampling
from core_flax.types import Array, Params

_FEW_ROWS = 8
"""Fewer sentences than a batch takes become as many rows as this times powers of 8."""
_EXTRA_TOKENS = 16
"""A translation may have twice as many tokens as its source, and so many more."""


@dataclass(frozen=True)
class Hypothesis:
    """A translation.

    Attributes:
      tokens: its ids, without ``</s>``.
      score: log-probability over the length's divisor (core_flax.beam).
      is_complete: whether it ended by itself, not by the limit.
    """

    tokens: tuple[int, ...]
    score: float
    is_complete: bool


@dataclass(frozen=True)
class Draws:
    """Translations drawn by chance instead of searched for.

    Attributes:
      sampling: how a token is drawn.
      seed: of what is drawn for a sentence, with its number; nothing depends on the other sentences.
      n_best: translations to draw of each; the most probable one comes first.
    """

    sampling: Sampling
    seed: int = 0
    n_best: int = 1


def longest_target(source_length: Any) -> Any:
    """Tokens that the translation of a source of so many tokens may have, ``</s>`` included on both sides."""
    return 2 * source_length + _EXTRA_TOKENS


def translate(
    model: Any,
    params: Params,
    sources: Sequence[Sequence[int]],
    *,
    bos_id: int,
    eos_id: int,
    search: BeamSearch | Draws,
    mesh: Mesh,
    batch_size: int = 64,
    first_number: int = 0,
    banned: Sequence[int] = (),
    done: Callable[[int], object] = lambda count: None,
) -> list[list[Hypothesis]]:
    """The ``n_best`` translations of every source, the best first, in the order given.

    Args:
      model: an encoder-decoder.
      params: its parameters, on the devices of the mesh.
      sources: token ids, ``</s>`` included and, where the model has several target languages, ``<2xx>``.
      bos_id: what a translation begins after.
      eos_id: what it ends with.
      search: how to search, or to draw.
      mesh: devices, which share the sentences of a batch.
      batch_size: sentences at a time; rounded up to what the devices can share.
      first_number: number of the first source among all that are translated, for what is drawn.
      banned: tokens that never come, beside ``bos_id``: language pieces, padding of the vocabulary.
      done: told how many more sentences are done, for a progress bar.
    """
    ways = sharding.ways_of_batch(mesh)
    num_rows = _rows_for(min(batch_size, max(len(sources), 1)), batch_size, ways)
    allowed_V = np.ones(model.config.vocab_size, bool)
    allowed_V[[bos_id, *banned]] = False
    allowed_V[eos_id] = True  # in some folders of Hugging Face's a translation begins with what ends it
    order = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
    batches = (order[begin : begin + num_rows] for begin in range(0, len(order), num_rows))
    job = _Job(model, params, allowed_V, bos_id, eos_id, search, mesh, first_number)
    padded = ((numbers, _padded([sources[number] for number in numbers], num_rows, bos_id)) for numbers in batches)
    # Sentences change places among the rows of one device; from one to another they would have to be sent.
    refilled = ways == 1 and isinstance(search, BeamSearch) and search.beam_size > 1
    found: dict[int, list[Hypothesis]] = {}
    for numbers, told in (_refilled if refilled else _by_batches)(job, padded):
        tokens, lengths, scores = (sharding.fetch(x) for x in (told.tokens_BCL, told.num_tokens_BC, told.scores_BC))
        for row, number in numbers.items():
            found[number] = _hypotheses(tokens[row], lengths[row], scores[row], eos_id)
        done(len(numbers))
    return [found[number] for number in range(len(sources))]


@dataclass(frozen=True)
class _Job:
    """What is the same for all batches; attributes are arguments of ``translate``, but for those that may come."""

    model: Any
    params: Params
    allowed_V: np.ndarray
    bos_id: int
    eos_id: int
    search: BeamSearch | Draws
    mesh: Mesh
    first_number: int


_Batches = Iterable[tuple[list[int], dict[str, np.ndarray]]]
"""Numbers of sentences, and their sources in rows."""
_Told = Iterator[tuple[dict[int, int], Hypotheses]]
"""The sentence of each row that has one, and what was found for it."""


def _by_batches(job: _Job, batches: _Batches) -> _Told:
    """Batch by batch, each until its last sentence is done."""
    pending: list[tuple[dict[int, int], Hypotheses]] = []
    for numbers, batch in batches:
        num_rows, room = batch["tokens"].shape
        batch["number"] = np.resize(np.array(numbers, np.int32) + job.first_number, num_rows)
        with jax.set_mesh(job.mesh):
            placed = sharding.place_batch(batch, num_rows, job.mesh)
            length, ends = longest_target(room), {"bos_id": job.bos_id, "eos_id": job.eos_id}
            told = _translated(job.model, job.params, job.allowed_V, **placed, length=length, **ends, search=job.search)
        pending.append((dict(enumerate(numbers)), told))
        if len(pending) > 1:  # the device is at the next batch while the host reads this one
            yield pending.pop(0)
    yield from pending


def _refilled(job: _Job, batches: _Batches) -> _Told:
    """By searches that do not wait for a few rows: when half of a batch is done, the others join those of the next.

    Translations differ much in length, also those of sources of one length: a batch as a whole takes as long as its
    longest, half of it as long as the median.
    """
    waiting: _Searched | None = None
    for numbers, batch in batches:
        num_rows, room = batch["tokens"].shape
        if waiting is not None and waiting.length != longest_target(room):
            yield waiting.run(job, most_live=0)
            waiting = None
        now = _Searched.start(job, numbers, batch)
        yield now.run(job, most_live=num_rows // 2)
        if waiting is not None:
            now.take_in(job, waiting)
            waiting = None  # so that two searches are in memory at most
            yield now.run(job, most_live=num_rows // 2)
        waiting = now
    if waiting is not None:
        yield waiting.run(job, most_live=0)


@dataclass
class _Searched:
    """A search by beams, and the sentences that are still in it, by row."""

    numbers: dict[int, int]
    beams: Beams
    length: int

    @classmethod
    def start(cls, job: _Job, numbers: list[int], batch: dict[str, np.ndarray]) -> "_Searched":
        num_rows, room = batch["tokens"].shape
        length = longest_target(room)
        with jax.set_mesh(job.mesh):
            placed = sharding.place_batch(batch, num_rows, job.mesh)
            sizes: Any = {"length": length, "bos_id": job.bos_id, "search": job.search}
            return cls(dict(enumerate(numbers)), _started(job.model, job.params, **placed, **sizes), length)

    def run(self, job: _Job, most_live: int) -> tuple[dict[int, int], Hypotheses]:
        """Goes on until so many sentences are left; those that are done, by row, and what was found for them."""
        given: Any = {"search": job.search, "stop": (job.eos_id,), "allowed_V": job.allowed_V}
        with jax.set_mesh(job.mesh):
            self.beams = run_beams(job.model, job.params, self.beams, most_live, **given)
        is_done_B = np.array(self.beams.done_B)
        done = {row: number for row, number in self.numbers.items() if is_done_B[row]}
        self.numbers = {row: number for row, number in self.numbers.items() if not is_done_B[row]}
        return done, self.beams.found

    def take_in(self, job: _Job, other: "_Searched") -> None:
        """The sentences of another search, for whose rows there must be room."""
        num_rows, rows = len(self.beams.done_B), list(other.numbers)
        free = [row for row in range(num_rows) if row not in self.numbers][: len(rows)]
        nowhere = [num_rows] * (num_rows - len(free))
        with jax.set_mesh(job.mesh):
            into_B, from_B = np.array([*free, *nowhere], np.int32), np.resize(np.array([*rows, 0], np.int32), num_rows)
            self.beams = refill(self.beams, other.beams, into_B, from_B)
        self.numbers |= {row: other.numbers[theirs] for row, theirs in zip(free, rows, strict=True)}


def _rows_for(count: int, batch_size: int, ways: int) -> int:
    """Rows of a batch for so many sentences, so that few different numbers come up and the devices can share them."""
    rows = 1
    while rows < count:
        rows *= _FEW_ROWS
    return -(-min(rows, batch_size) // ways) * ways


@partial(jax.jit, static_argnames=("model", "length", "bos_id", "eos_id", "search"))
def _translated(
    model: Any,
    params: Params,
    allowed_V: Array,
    tokens: Array,
    valid: Array,
    number: Array,
    *,
    length: int,
    bos_id: int,
    eos_id: int,
    search: BeamSearch | Draws,
) -> Hypotheses:
    cache, starts_BL, limit_B = _opened(model, params, tokens, valid, length, bos_id)
    if isinstance(search, BeamSearch):
        options: Any = {"length": length, "search": search, "stop": (eos_id,), "allowed_V": allowed_V}
        return beam_search(model, params, cache, starts_BL, limit_B=limit_B, **options)

    num = search.n_best
    starts_BL, limit_B = (jnp.repeat(x, num, axis=0, total_repeat_length=num * len(x)) for x in (starts_BL, limit_B))
    keys_BC = jax.vmap(lambda key: jax.random.split(key, num))(row_keys(search.seed, number))
    options = {"length": length, "sampling": search.sampling, "stop": (eos_id,), "allowed_V": allowed_V}
    drawn = generate(model, params, caches.fork(cache, num), starts_BL, None, limit_B, keys_BC.reshape(-1), **options)
    return _by_source(drawn, num)


@partial(jax.jit, static_argnames=("model", "length", "bos_id", "search"))
def _started(
    model: Any, params: Params, tokens: Array, valid: Array, *, length: int, bos_id: int, search: BeamSearch
) -> Beams:
    cache, starts_BL, limit_B = _opened(model, params, tokens, valid, length, bos_id)
    return start_beams(begin(model, params, cache, starts_BL, limit_B=limit_B, length=length), search)


def _opened(
    model: Any, params: Params, tokens: Array, valid: Array, length: int, bos_id: int
) -> tuple[Any, Array, Array]:
    """(The cache with sources read, what translations begin after, how long each may be)."""
    cache = model.apply({"params": params}, tokens, valid, length, method="start")
    # By the sentence's own length, so that nothing depends on the batch; nobody waits for a row without a sentence.
    limit_B = jnp.where(valid.any(axis=1), longest_target(valid.sum(axis=1)), 0)
    return cache, jnp.full((len(tokens), 1), bos_id), limit_B


def _by_source(drawn: Generation, num: int) -> Hypotheses:
    """What was drawn in the ``num`` rows of each source, the most probable first."""
    tokens_BCL, lengths_BC, log_probs_BC = (
        x.reshape(-1, num, *x.shape[1:]) for x in (drawn.tokens_BL, drawn.num_tokens_B, drawn.log_probs_B)
    )
    order_BC = jnp.argsort(-log_probs_BC, axis=1)
    lengths_BC, log_probs_BC = (jnp.take_along_axis(x, order_BC, axis=1) for x in (lengths_BC, log_probs_BC))
    tokens_BCL = jnp.take_along_axis(tokens_BCL, order_BC[..., None], axis=1)
    return Hypotheses(tokens_BCL, lengths_BC, log_probs_BC, log_probs_BC)


def room_for(length: int) -> int:
    """The length to which sources are padded, so that few shapes are compiled: 8, 16, 24, 32, 48, 64, 96 ..."""
    step = max(8, 2 ** (max(length, 1).bit_length() - 2))
    return -(-length // step) * step


def _padded(sources: Sequence[Sequence[int]], num_rows: int, filler: int) -> dict[str, np.ndarray]:
    """Sources as rows of one length, padded on the right, and rows without a source after them."""
    length = room_for(max(map(len, sources)))
    tokens, valid = np.full((num_rows, length), filler, np.int32), np.zeros((num_rows, length), bool)
    for row, ids in enumerate(sources):
        tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
    return {"tokens": tokens, "valid": valid}


def _hypotheses(tokens_CL: np.ndarray, lengths_C: np.ndarray, scores_C: np.ndarray, eos_id: int) -> list[Hypothesis]:
    found = []
    for tokens_L, length, score in zip(tokens_CL, lengths_C, scores_C, strict=True):
        if length == 0:
            continue  # there were not so many
        ids = tokens_L[:length].tolist()
        complete = ids[-1] == eos_id
        found.append(Hypothesis(tuple(ids[:-1] if complete else ids), float(score), complete))
    return found
