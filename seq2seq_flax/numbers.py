"""Numbers in words, in two languages or more: pairs to learn translation from that need no download (num2words).

A translation is right or wrong as a whole, so it is scored by exact match; and a number that was not trained on has
parts that were, so a model that has learned the languages can translate it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from num2words import num2words

from core_flax.distributed import first_does
from core_flax.run import own_data
from core_flax.types import UserError
from seq2seq_flax.prepare import PrepareConfig, prepare

LANGUAGES = ("en", "de")
"""Those of the demonstration: German has units before tens, and writes a number as one word."""
HELD_OUT = "numbers.held_out"
"""Files beside the demonstration's prepared folder, one of each language."""
_ALWAYS = 100
"""Numbers below this are all trained on: they are what others are made of."""
_NUM_TRAINED, _NUM_HELD_OUT, _VOCAB_SIZE = 12_000, 500, 300


def in_words(number: int, language: str) -> str:
    """The number as its language writes it. Raises UserError if num2words does not know the language."""
    try:
        return num2words(number, lang=language).strip()
    except NotImplementedError as error:
        raise UserError(f"num2words cannot write numbers in the language {language!r}") from error


def draw(count: int, held_out: int, seed: int = 0, digits: int = 6) -> tuple[list[int], list[int]]:
    """(numbers to train on, held-out numbers), without a number in common.

    Lengths from three digits on are drawn alike, and a number that came before is drawn anew: so of the 900 numbers of
    three digits there are fewer. Those to train on also have all numbers of one and two digits.

    Args:
      count: how many to train on; those of one or two digits come on top.
      held_out: how many to hold out.
      seed: of the drawing.
      digits: the longest have so many.

    Raises:
      ValueError: there are not so many numbers of three digits and more.
    """
    if count + held_out > 10**digits - _ALWAYS:
        raise ValueError(f"{count} + {held_out} numbers of 3 to {digits} digits: there are not so many")
    source = np.random.default_rng(seed)
    found: dict[int, None] = {}
    while len(found) < count + held_out:
        length = int(source.integers(3, digits + 1))
        found[int(source.integers(10 ** (length - 1), 10**length))] = None
    numbers = list(found)
    return [*range(_ALWAYS), *numbers[held_out:]], numbers[:held_out]


def write(path: Path, numbers: Sequence[int], language: str) -> str:
    """Write numbers in words, one a line; returns the path as text."""
    path.write_text("".join(f"{in_words(number, language)}\n" for number in numbers), encoding="utf-8")
    return str(path)


def own_numbers(workdir: Path) -> Path:
    """The prepared folder of the demonstration under a run's folder, made if it is not there."""
    data = own_data(workdir)

    def make() -> None:
        if (data / "manifest.json").exists():
            return
        workdir.mkdir(parents=True, exist_ok=True)
        trained, held_out = draw(_NUM_TRAINED, _NUM_HELD_OUT)
        train = [write(workdir / f"numbers.train.{language}", trained, language) for language in LANGUAGES]
        valid = [write(workdir / f"{HELD_OUT}.{language}", held_out, language) for language in LANGUAGES]
        # All characters get a piece, however rare: without the one of zwölf no twelve could be said.
        sizes = {"vocab_size": _VOCAB_SIZE, "character_coverage": 1.0}
        prepare(PrepareConfig(str(data), train=tuple(train), valid=tuple(valid), **sizes))

    first_does(make)
    return data


def held_out_files(data: Path) -> list[Path] | None:
    """The held-out numbers in each of the demonstration's languages; None if the data are not the demonstration's."""
    files = [data.parent / f"{HELD_OUT}.{language}" for language in LANGUAGES]
    return files if all(file.is_file() for file in files) else None
