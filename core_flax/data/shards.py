"""Records on disk: ArrayRecord shards of one split, written in order and read at random, and an index of rows."""

import contextlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from core_flax.data.folder import check_file, describe_file
from core_flax.types import UserError

SHARD_BYTES = 256 << 20
# One record a chunk, so that reading a record unpacks that record only.
_WRITER_OPTIONS = "group_size:1,zstd:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """ArrayRecord raises RuntimeError where writing fails; to the rest of this code that is an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split("; at byte")[0]) from error


class ShardWriter:
    """Writes the records of one split in the order given, as ``SPLIT-00000-of-00002.arrayrecord`` and so on."""

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = directory, split
        self._shards: list[tuple[Path, int]] = []  # path and number of records
        self._writer: ArrayRecordWriter | None = None
        self._path, self._size, self._records = directory, 0, 0

    def append(self, data: bytes) -> None:
        """Write a record. Raises OSError if the disk refuses."""
        if self._size + len(data) > SHARD_BYTES:
            self._close_shard()
        writer = self._writer or self._open_shard()
        with _disk_errors():
            writer.write(data)
        self._size += len(data)
        self._records += 1

    def _open_shard(self) -> ArrayRecordWriter:
        self._path = self._directory / f"{self._split}-{len(self._shards):05d}.arrayrecord.partial"
        self._size = self._records = 0
        self._writer = ArrayRecordWriter(str(self._path), _WRITER_OPTIONS)
        return self._writer

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        with _disk_errors():
            self._writer.close()
        self._writer = None
        reader = ArrayRecordReader(str(self._path), _READER_OPTIONS)
        num_records = reader.num_records()
        reader.close()
        if num_records != self._records:  # a full disk, say
            raise OSError(f"{self._path} holds {num_records} of {self._records} records")
        self._shards.append((self._path, num_records))

    def finish(self) -> dict[str, dict[str, Any]]:
        """Complete the shards. Returns the files as a manifest lists them."""
        self._close_shard()
        files = {}
        for number, (partial, num_records) in enumerate(self._shards):
            path = self._directory / f"{self._split}-{number:05d}-of-{len(self._shards):05d}.arrayrecord"
            partial.rename(path)
            files[path.name] = describe_file(path) | {"records": num_records}
        return files

    def abort(self) -> None:
        """Close the files without completing them, whatever state they are in."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()


class IndexWriter:
    """Writes rows of int32, one after another, that become the array file ``SPLIT.index.npy``."""

    def __init__(self, directory: Path, split: str, num_columns: int) -> None:
        self._path, self._num_columns, self._num_rows = directory / f"{split}.index.npy", num_columns, 0
        self._partial = (directory / f"{split}.index.partial").open("wb")

    def append(self, rows: np.ndarray) -> None:
        """Write rows, int [n, columns]."""
        assert rows.shape[1:] == (self._num_columns,)
        self._partial.write(rows.astype("<i4").tobytes())
        self._num_rows += len(rows)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Complete the file. Returns it as a manifest lists it."""
        self._partial.close()
        partial = Path(self._partial.name)
        with self._path.open("wb") as file, partial.open("rb") as rows:
            header = {"descr": "<i4", "fortran_order": False, "shape": (self._num_rows, self._num_columns)}
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(rows, file)
        partial.unlink()
        return {self._path.name: describe_file(self._path)}

    def abort(self) -> None:
        """Close the file without completing it."""
        with contextlib.suppress(OSError):
            self._partial.close()


class ShardReader:
    """Random access to the records of one split. Threads may share it."""

    def __init__(self, directory: Path, split: str, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises UserError if a shard that the manifest's ``files`` list is missing or has another size."""
        self._directory = directory
        self._shards = [name for name in sorted(files) if name.startswith(f"{split}-")]
        for name in self._shards:
            check_file(directory, name, files)
        self._first_record = np.cumsum([0, *(files[name]["records"] for name in self._shards)])
        self._local = threading.local()

    def read(self, numbers: np.ndarray) -> list[bytes]:
        """The records with these numbers, an int array [n], in that order. Raises UserError if a shard is damaged."""
        shards = np.searchsorted(self._first_record, numbers, side="right") - 1
        records: list[bytes] = [b""] * len(numbers)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            try:
                found = self._reader(int(shard)).read((numbers[rows] - self._first_record[shard]).tolist())
            except RuntimeError as error:  # what ArrayRecord raises when a checksum does not match
                path = self._directory / self._shards[shard]
                raise UserError(f"{path} is damaged ({error}); run prepare again with --overwrite") from error
            for row, record in zip(rows, found, strict=True):
                records[row] = record
        return records

    def _reader(self, shard: int) -> ArrayRecordReader:
        """The reader of a shard, opened when first used; each thread has its own."""
        readers = self._local.__dict__.setdefault("readers", {})
        if shard not in readers:
            readers[shard] = ArrayRecordReader(str(self._directory / self._shards[shard]), _READER_OPTIONS)
        return readers[shard]
