"""Work that the workers of an Apache Beam pipeline do, on a cluster or on this machine, handed on in order."""

import importlib
import importlib.util
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from core_flax.types import UserError

T = TypeVar("T")
R = TypeVar("R")

PARTIAL = r"\d{5}(\.[0-9a-f]{32})?\.beam\.partial"
"""What the files are called that workers write (a regular expression)."""


def each_of(
    function: Callable[[T], Iterable[R]], items: Sequence[T], options: Sequence[str], folder: Path
) -> Iterator[Iterator[R]]:
    """What ``function`` yields for each of the items, in their order.

    Results go from the workers to this process through files in ``folder``, which are gone when they are read: so
    nobody has to hold all of them. Workers need this package, the folder under the same name, and what ``function``
    reads; it and the items are pickled.

    Args:
      function: of an item; what it yields can be pickled.
      items: each is one worker's from beginning to end.
      options: of the pipeline, as NAME=VALUE.
      folder: one that is seen by all.

    Raises:
      UserError: Beam is not installed, the options are none of its, or ``function`` raised one: the first item's.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("--beam needs the package apache-beam; install the extra [beam]: pip install -e .[beam]")
    _run(_Work(function, folder.absolute()), list(enumerate(items)), options)
    for number in range(len(items)):
        yield _read(_place(folder, number))


def _run(work: "_Work", items: Sequence[tuple[int, Any]], options: Sequence[str]) -> None:
    apache_beam: Any = importlib.import_module("apache_beam")
    pipeline_options: Any = importlib.import_module("apache_beam.options.pipeline_options")
    try:
        asked = pipeline_options.PipelineOptions([f"--{option.lstrip('-')}" for option in options])
        pipeline = apache_beam.Pipeline(options=asked)
    except (ValueError, ImportError) as error:  # no such runner, say
        raise UserError(f"--beam {' '.join(options)}: {error}") from error
    with pipeline:
        # Shuffled, so that workers share the items out, however few they are.
        _ = pipeline | apache_beam.Create(items) | apache_beam.Reshuffle() | apache_beam.Map(work)


@dataclass(frozen=True)
class _Work(Generic[T, R]):
    """What a worker does with a numbered item."""

    function: Callable[[T], Iterable[R]]
    folder: Path

    def __call__(self, numbered: tuple[int, T]) -> int:
        number, item = numbered
        if not self.folder.is_dir():
            raise RuntimeError(f"this worker does not see {self.folder}; give a folder on a file system that all share")
        # A runner may do the same twice, and at the same time: whoever is done last puts the same in place.
        partial = _place(self.folder, number, f".{uuid.uuid4().hex}")
        with partial.open("wb") as file:
            try:
                for result in self.function(item):
                    pickle.dump(result, file)
            except UserError as error:
                pickle.dump(error, file)
        os.replace(partial, _place(self.folder, number))
        return number


def _place(folder: Path, number: int, mark: str = "") -> Path:
    return folder / f"{number:05d}{mark}.beam.partial"


def _read(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        size = path.stat().st_size
        while file.tell() < size:
            result = pickle.load(file)  # from our own workers, in the folder that is being prepared: nobody else's
            if isinstance(result, UserError):
                raise result
            yield result
    path.unlink()
