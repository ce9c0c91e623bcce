"""Text of a dataset in TensorFlow Datasets (TFDS), read without TensorFlow.

TFDS looks for datasets in ``$TFDS_DATA_DIR``, else in ``~/tensorflow_datasets``. Only the file format array_record can
be read without TensorFlow, so a dataset that is not there yet is downloaded and stored in that format.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from core_flax.types import UserError

FIELD = "text"


def read_texts(spec: str) -> Iterator[str]:
    """The field ``text`` of every example of ``NAME[/CONFIG][:SPLIT]`` (split: train unless given), in order.

    Raises:
        UserError: there is no such dataset, configuration, split or field, or it is stored in another file format.
    """
    for (text,) in _read(spec, (FIELD,)):
        yield text


def read_translations(spec: str, source: str, target: str) -> Iterator[list[str]]:
    """[source, target] of every example of a translation data set, ``NAME[/CONFIG][:SPLIT]``, in order.

    Args:
        spec: the data set.
        source: its language (field) to translate from.
        target: its language to translate into.

    Raises:
        UserError: as ``read_texts``.
    """
    return _read(spec, (source, target))


def languages(spec: str) -> tuple[str, str]:
    """What a translation data set says is translated into what. Nothing is downloaded. Raises UserError if neither."""
    keys = find_builder(spec).info.supervised_keys
    if keys is None or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
        raise UserError(f"tfds:{spec} does not say what is translated into what; name the languages with --pair")
    return keys


def _read(spec: str, fields: Sequence[str]) -> Iterator[list[str]]:
    """These fields of every example, in order."""
    builder, split = _open(spec, fields)
    try:
        examples = builder.as_data_source(split=split)
    except ValueError as error:
        raise UserError(f"tfds:{spec}: {_first_line(error)}") from error
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{spec} is stored in {builder.data_path} as {builder.info.file_format.value}, which only TensorFlow "
            "reads; store it as array_record (tfds build --file_format=array_record)"
        ) from error
    for number in range(len(examples)):
        example = examples[number]
        try:
            yield [example[field].decode() for field in fields]
        except UnicodeDecodeError as error:
            raise UserError(f"tfds:{spec} example {number} is not UTF-8 at byte {error.start}") from error


def identify(spec: str, fields: Sequence[str] = (FIELD,)) -> dict[str, str | int]:
    """What tells this dataset, which has these fields, from another version of it."""
    builder, split = _open(spec, fields)
    sizes = sum(info.num_bytes for info in builder.info.splits.values())
    return {"dataset": builder.info.full_name, "split": split, "bytes": int(sizes)}


def _open(spec: str, fields: Sequence[str]) -> tuple[Any, str]:
    """The builder of the dataset, which is stored on this machine now, and the split. It has these fields."""
    import tensorflow_datasets as tfds  # takes a moment, and few need it

    builder = find_builder(spec)
    name, _, split = spec.partition(":")
    present = list(cast(Any, builder.info.features) or [])
    missing = [field for field in fields if field not in present]
    if missing:
        raise UserError(f"tfds:{spec} has no field {missing[0]!r} (it has {', '.join(present)})")
    try:
        if not builder.is_prepared():
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:
        raise cannot_be_had(spec, error) from error
    return builder, split or "train"


def find_builder(spec: str) -> Any:
    """The builder of the dataset, which may not be stored here."""
    import tensorflow_datasets as tfds

    name, _, _ = spec.partition(":")
    if not re.fullmatch(r"\w+", name.split("/")[0]):
        raise UserError(f"tfds:{name} is not the name of a dataset; write tfds:NAME[/CONFIG][:SPLIT]")
    try:
        _import_builder(Path(str(tfds.__file__)).parent, name.split("/")[0])
        return tfds.builder(name)
    except Exception as error:
        raise cannot_be_had(spec, error) from error


def cannot_be_had(spec: str, error: Exception) -> UserError:
    """What to say of whatever went wrong in TFDS or in the code of a builder, which may raise anything."""
    return UserError(
        f"tfds:{spec} cannot be had: {_first_line(error)} (datasets are looked for in $TFDS_DATA_DIR, and only "
        "those that TFDS prepares without TensorFlow can be downloaded here)"
    )


def _import_builder(package: Path, name: str) -> None:
    """Import the module that defines a dataset: it is known to TFDS then, which would import it with TensorFlow."""
    module = name.removesuffix("_translate")  # the data sets of WMT are defined in modules with shorter names
    for path in (*package.glob(f"*/{module}.py"), *package.glob(f"*/{name}/{name}.py")):
        importlib.import_module(".".join((package.name, *path.relative_to(package).with_suffix("").parts)))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
