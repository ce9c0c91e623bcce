"""What all schedulers need of a job, and how it is written and submitted."""

import os
import re
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from core_flax import storage
from core_flax.types import UserError

JOIN_WAIT = {"FLAX_JOIN_SECONDS": "3600"}
"""Environment of processes that a cloud starts (core_flax.distributed.WAIT): its machines may come much later than each
other, and one that gave up would end the job for good."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What every job has."""

    name: str
    """Name of the job, and of the file that is written: lower-case letters, digits and hyphens."""
    output: str = "."
    """Folder for the file that describes the job."""
    dry_run: bool = False
    """Print the file and the commands that would be run, and do nothing."""

    def __post_init__(self) -> None:
        """Raises UserError on a name that a cluster would refuse."""
        if isinstance(self.name, str) and not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise UserError(
                f"--name {self.name}: must begin with a letter, end with a letter or digit, and have nothing else than "
                "lower-case letters, digits and hyphens, 40 at most"
            )


@dataclass(frozen=True)
class Job:
    """A job, ready to be submitted.

    Attributes:
      file: name of the file that describes it.
      content: what is in it.
      command: what is run; the file's path is its last argument.
    """

    file: str
    content: str
    command: tuple[str, ...]


def submit(job: Job, options: JobOptions) -> None:
    """Writes the job's file and becomes the command that takes it, or prints both with ``--dry-run``.

    Raises:
      UserError: the file cannot be written, or the program is not installed.
    """
    path = Path(options.output) / job.file
    command = (*job.command, str(path))
    if options.dry_run:
        print(f"# {path}\n{job.content}\n# command\n{shlex.join(command)}")
        return
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(job.content, encoding="utf-8")
    print(f"wrote {path}\n{shlex.join(command)}", flush=True)
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"{command[0]} is not installed here; run this where it is, or see --dry-run")
    # In our place: a signal reaches it alone, which may have to save and to give machines back, and its exit status is
    # ours. Python ignores SIGPIPE, which would be handed on.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execv(program, command)
