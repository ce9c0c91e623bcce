"""Figures of a run as TensorBoard's curves."""

import importlib
import importlib.util
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core_flax.storage import files, is_remote, writing


class TensorBoard:
    """Scalars for TensorBoard, written by the package tensorboard itself, without TensorFlow."""

    def __init__(self, directory: Path, start_step: int) -> None:
        # tensorboard.compat prefers a TensorFlow that happens to be installed, unless this module exists.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._directory = directory
        # Its file grows, which nothing in a bucket can: it is written here and copied whole.
        self._here = tempfile.TemporaryDirectory() if is_remote(directory) else None
        with writing(directory):
            self._writer = writer.EventFileWriter(self._here.name if self._here else str(directory), flush_secs=10)
        # Readers then discard what an interrupted run wrote beyond the checkpoint it is resumed from, or without any.
        self._add(start_step + 1, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of each name; a name's part before a slash groups curves."""
        scalars = [self._summary.Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._add(step, summary=self._summary.Summary(value=scalars))

    def _add(self, step: int, **content: Any) -> None:
        with writing(self._directory):
            self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))

    def sync(self) -> None:
        """See that what was added outlives this machine, if that is asked of the directory."""
        if self._here:
            with writing(self._directory):
                self._writer.flush()
            self._copy(self._here.name)

    def _copy(self, here: str) -> None:
        with writing(self._directory):
            for file in files(Path(here)):
                (self._directory / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Write what is pending and close the file."""
        with writing(self._directory):
            self._writer.close()
        if self._here:
            self._copy(self._here.name)
            self._here.cleanup()


def open_tensorboard(directory: Path, start_step: int) -> TensorBoard | None:
    """A writer into ``directory``; None if the package tensorboard is not installed."""
    return TensorBoard(directory, start_step) if importlib.util.find_spec("tensorboard") else None
