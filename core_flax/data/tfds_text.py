"""Text of a dataset in TensorFlow Datasets, read without TensorFlow."""

from collections.abc import Iterator

from core_flax.types import UserError


def read_texts(spec: str) -> Iterator[str]:
    """The field ``text`` of every example of ``NAME[/CONFIG][:SPLIT]`` (split: train unless given), in order."""
    raise UserError(f"tfds:{spec} not supported yet")


def identify(spec: str) -> dict[str, str | int]:
    """What tells this dataset from another version of it."""
    raise UserError(f"tfds:{spec} not supported yet")
