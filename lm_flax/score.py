"""``lm-flax score``: how probable a model finds the lines of a file, each as a text by itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import tyro

from core_flax.config import check_range
from core_flax.data import corpora
from core_flax.run import Run
from core_flax.types import Array, Params, UserError
from lm_flax.generate import Generator
from lm_flax.tokenizers import Tokenizer

_LEAST_LENGTH = 16
"""Rows are padded to this, or to twice, four times ... as much: few shapes to compile."""


@dataclass(frozen=True)
class ScoreCommand:
    """Prints for every line of a file its log-probability (nats), its number of tokens, and the line, between tabs.

    That of a text that begins so: that the line ends there is not in it.
    """

    file: tyro.conf.Positional[str]
    """File of plain text, also gzipped (.gz); - is the standard input."""
    workdir: str
    """Folder of a training run, or an imported model."""
    long: Literal["refuse", "slide"] = "refuse"
    """A line of more tokens than the model can take: refuse, or slide: score it half a context at a time, from the half
    before."""
    batch_size: int = 16
    """Lines that are scored together."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "batch_size", least=1)


def run_command(command: ScoreCommand, run: Run[Any], tokenizer: Tokenizer) -> None:
    """Score the file. Raises UserError if it cannot be read, or a line cannot be scored."""
    lines = [text for _, text in corpora.read_lines(command.file)]
    if not lines:
        raise UserError(f"{command.file} holds no text; give another file")
    generator = Generator.of(run, tokenizer, command.step)
    encoded = [_encode(generator, text, f"{command.file}:{number}") for number, text in enumerate(lines, 1)]
    most = generator.context
    for number, ids in enumerate(encoded, 1):
        if most is not None and len(ids) > most and command.long == "refuse":
            raise UserError(
                f"{command.file}:{number} has {len(ids)} tokens, and the model can take {most}; shorten it, or give "
                "--long slide"
            )
    for start in range(0, len(lines), command.batch_size):
        part = slice(start, start + command.batch_size)
        scores = log_probs(generator, encoded[part], command.batch_size)
        for text, ids, score in zip(lines[part], encoded[part], scores, strict=True):
            print(f"{score:.4f}\t{len(ids)}\t{text}")


def _encode(generator: Generator, text: str, where: str) -> np.ndarray:
    try:
        return generator.tokenizer.encode(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def log_probs(generator: Generator, texts: Sequence[np.ndarray], batch_size: int = 16) -> list[float]:
    """The log-probability, in nats, of each text's tokens after the token that stands before every text."""
    before, most, sums = generator.first_token, generator.context, np.zeros(len(texts))
    rows = [(number, *row) for number, ids in enumerate(texts) for row in _rows(before, ids, most)]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        length = _LEAST_LENGTH
        while length < max(len(labels) for _, _, labels, _ in part):
            length *= 2
        length = length if generator.context is None else min(length, generator.context)
        tokens_BL, labels_BL, counts_BL = np.zeros((3, batch_size, length), np.int32)
        for place, (_, tokens, labels, num_known) in enumerate(part):
            tokens_BL[place, : len(tokens)], labels_BL[place, : len(labels)] = tokens, labels
            counts_BL[place, num_known : len(labels)] = 1
        told_B = np.asarray(_score(generator.model, generator.params, tokens_BL, labels_BL, counts_BL), np.float64)
        np.add.at(sums, [number for number, *_ in part], told_B[: len(part)])
    return sums.tolist()


def _rows(before: np.ndarray, ids: np.ndarray, most: int | None) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(tokens read, tokens predicted, how many of them an earlier row has scored) of a text, in rows that fit."""
    read, length = np.concatenate([before, ids[:-1]]), len(ids) if most is None else most
    step = max(1, length // 2)
    for start in range(0, max(1, len(ids) - length // 2), step):
        yield read[start : start + length], ids[start : start + length], length - step if start else 0


@partial(jax.jit, static_argnums=0)
def _score(model: Any, params: Params, tokens_BL: Array, labels_BL: Array, counts_BL: Array) -> Array:
    x_BLD = model.apply({"params": params}, tokens_BL)

    def one(row: tuple[Array, Array, Array]) -> Array:  # the scores of one row at a time are in memory
        x_LD, labels_L, counts_L = row
        logits_LV = model.apply({"params": params}, x_LD, method="logits")
        told_LV = jax.nn.log_softmax(logits_LV, axis=-1)
        return jax.numpy.sum(jax.numpy.take_along_axis(told_LV, labels_L[:, None], axis=1)[:, 0] * counts_L)

    return jax.lax.map(one, (x_BLD, labels_BL, counts_BL))
