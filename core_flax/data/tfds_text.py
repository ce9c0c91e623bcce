"""Text of a dataset in TensorFlow Datasets (TFDS), read without TensorFlow.

TFDS looks for datasets in ``$TFDS_DATA_DIR``, else in ``~/tensorflow_datasets``. Only the file format array_record can
be read without TensorFlow, so a dataset that is not there yet is downloaded and stored in that format.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from core_flax.types import UserError

FIELD = "text"


def read_texts(spec: str) -> Iterator[str]:
    """The field ``text`` of every example of ``NAME[/CONFIG][:SPLIT]`` (split: train unless given), in order.

    Raises:
        UserError: there is no such dataset, configuration, split or field, or it is stored in another file format.
    """
    builder, split = _open(spec)
    try:
        source = builder.as_data_source(split=split)
    except ValueError as error:
        raise UserError(f"tfds:{spec}: {_first_line(error)}") from error
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{spec} is stored in {builder.data_path} as {builder.info.file_format.value}, which only TensorFlow "
            "reads; store it as array_record (tfds build --file_format=array_record)"
        ) from error
    for number in range(len(source)):
        text = source[number][FIELD]
        try:
            yield text.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"tfds:{spec} example {number} is not UTF-8 at byte {error.start}") from error


def identify(spec: str) -> dict[str, str | int]:
    """What tells this dataset from another version of it."""
    builder, split = _open(spec)
    sizes = sum(info.num_bytes for info in builder.info.splits.values())
    return {"dataset": builder.info.full_name, "split": split, "bytes": int(sizes)}


def _open(spec: str) -> tuple[Any, str]:
    """The builder of the dataset, which is stored on this machine now, and the split."""
    import tensorflow_datasets as tfds  # takes a moment, and few need it

    name, _, split = spec.partition(":")
    _import_builder(Path(tfds.__file__).parent, name.split("/")[0])
    try:
        builder = tfds.builder(name)
        fields = list(cast(Any, builder.info.features) or [])
        if FIELD in fields and not builder.is_prepared():
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:  # TFDS raises whatever went wrong in the builder's own code
        raise UserError(
            f"tfds:{spec} cannot be had: {_first_line(error)} (datasets are looked for in $TFDS_DATA_DIR, and only "
            "those that TFDS prepares without TensorFlow can be downloaded here)"
        ) from error
    if FIELD not in fields:
        raise UserError(f"tfds:{spec} has no field {FIELD!r} (it has {', '.join(fields)})")
    return builder, split or "train"


def _import_builder(package: Path, name: str) -> None:
    """Import the module that defines a dataset: it is known to TFDS then, which would import it with TensorFlow."""
    if not re.fullmatch(r"\w+", name):
        raise UserError(f"tfds:{name} is not the name of a dataset; write tfds:NAME[/CONFIG][:SPLIT]")
    for path in (*package.glob(f"*/{name}.py"), *package.glob(f"*/{name}/{name}.py")):
        importlib.import_module(".".join((package.name, *path.relative_to(package).with_suffix("").parts)))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
