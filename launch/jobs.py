"""What all schedulers need of a job, and how it is written and submitted."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core_flax import storage
from core_flax.types import UserError


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
      commands: what is run, one after another, in the folder of the file.
    """

    file: str
    content: str
    commands: tuple[tuple[str, ...], ...]


def submit(job: Job, options: JobOptions) -> None:
    """Writes the job's file and runs its commands, or prints all that with ``--dry-run``.

    Raises:
      UserError: the file cannot be written, a program is not installed, or it failed.
    """
    path = Path(options.output) / job.file
    if options.dry_run:
        print(f"# {path}\n{job.content}\n# commands, in {options.output}")
        print("\n".join(shlex.join(command) for command in job.commands))
        return
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(job.content, encoding="utf-8")
    print(f"wrote {path}", flush=True)
    for command in job.commands:
        _run(command, path.parent)


def _run(command: Sequence[str], folder: Path) -> None:
    print(shlex.join(command), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, cwd=folder, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not installed here; run this where it is, or see --dry-run") from error
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed with exit status {done.returncode}")
