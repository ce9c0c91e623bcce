"""A training run's folder: the settings and tokenizer it was started with, its data, its checkpoints.

Each family says what is its own (which tokenizer, which data); what such a folder is, and when it may go on, is here.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Generic, TypeVar

import jax
from tqdm import tqdm

from core_flax import config as configs
from core_flax import storage
from core_flax.checkpoint import load_params
from core_flax.config import RunConfig
from core_flax.distributed import agree, all_have, first_does, first_tells, is_seen
from core_flax.evaluate import make_evaluate
from core_flax.sharding import flat_mesh, replicated
from core_flax.task import Evaluator
from core_flax.types import Batch, Params, UserError

CONFIG, CHECKPOINTS, LOCK = "config.json", "checkpoints", "run.lock"

C = TypeVar("C", bound=RunConfig)


def holds_run(workdir: Path, data: str | None = None) -> bool:
    """Whether a folder holds a run, to all processes. Every process must come here.

    Args:
      workdir: the folder.
      data: the option --data, on which it depends as well what a process does next.

    Raises:
      UserError: to this process it does not, but to the first, or the other way round; or not all were given --data.
    """
    all_have({"option --data": "none" if data is None else "given"})
    is_there = (workdir / CONFIG).exists
    holds = bool(first_tells(lambda: "a run" if is_there() else ""))
    if not is_seen(lambda: is_there() == holds):
        raise not_shared(workdir)
    return holds


def not_shared(workdir: Path) -> UserError:
    """What is to be said where a process does not find what the first has written."""
    return UserError(
        f"--workdir {workdir} is not the same folder for all processes: process {jax.process_index()} does not find "
        "in it what the first one does; give one that they share, or one in a bucket (gs://)"
    )


@dataclass(frozen=True)
class Run(Generic[C]):
    """What a run's folder says of it.

    Attributes:
      workdir: the folder.
      kind: what is trained, such as "bert_flax.pretrain".
      config: its settings.
      data: the prepared folder that it is trained on.
      content: fingerprint of what that folder holds.
      tokenizer: fingerprint of its tokenizer.
      facts: what else the family notes of a run, as JSON values.
      averaged: how many checkpoints of another run this is the mean of; None: it is a run.
    """

    workdir: Path
    kind: str
    config: C
    data: Path
    content: str
    tokenizer: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    averaged: int | None = None

    @classmethod
    def load(cls, workdir: str | Path, kinds: Mapping[str, type[C]], **facts: type | UnionType) -> "Run[C]":
        """The run in a folder.

        Args:
          workdir: the folder.
          kinds: the class of the settings, by kind of run.
          facts: types of what the family notes; with None among them, of what it may not have noted.

        Raises:
          UserError: the folder holds none of these kinds of run, or it is damaged.
        """
        folder = storage.folder("--workdir", str(workdir))
        stored = configs.load(
            folder / CONFIG, kinds, data=str, content=str, tokenizer=str, averaged=int | None, **facts
        )
        return cls(
            workdir=folder,
            kind=stored["kind"],
            config=configs.load_config(folder / CONFIG, kinds[stored["kind"]], stored),
            data=Path(stored["data"]) if storage.is_remote(folder) else folder.absolute() / stored["data"],
            content=stored["content"],
            tokenizer=stored["tokenizer"],
            facts={name: stored[name] for name in facts},
            averaged=stored["averaged"],
        )

    def save(self, tokenizer_file: str, write_tokenizer: Callable[[Path], None]) -> None:
        """Write tokenizer and settings; config.json last, since it makes the folder a run. The first process does.

        Raises:
          UserError: the disk is full, or does not let us write there.
        """
        all_have({"data": self.content, "tokenizer": self.tokenizer, "settings": repr(self.config)})
        first_does(lambda: self._save(tokenizer_file, write_tokenizer))
        if not is_seen((self.workdir / CONFIG).is_file):
            raise not_shared(self.workdir)
        agree("")  # nothing else is written unless all of them see it

    def _save(self, tokenizer_file: str, write_tokenizer: Callable[[Path], None]) -> None:
        storage.make_folder(self.workdir)
        home = storage.absolute(self.workdir)  # the folder of a run may be moved, with the data that is in it
        data = self.data.relative_to(home) if self.data.is_relative_to(home) else self.data
        with storage.replacing(self.workdir / tokenizer_file) as partial:
            write_tokenizer(partial)
        about = {"data": str(data), "content": self.content, "tokenizer": self.tokenizer}
        configs.save(self.workdir / CONFIG, self.kind, self.config, **about, **self.facts)

    def check_tokenizer(self, file: str, fingerprint: str) -> None:
        """Raises UserError if a tokenizer read from the folder is not the one the run was started with."""
        if fingerprint != self.tokenizer:
            raise UserError(f"{self.workdir / file} is not the tokenizer that this run was started with; put it back")

    def params(self, step: int | None = None, sharding: jax.sharding.Sharding | None = None) -> tuple[Params, int]:
        """(parameters, step) of a checkpoint, the newest if step is None; on the first device without a sharding."""
        return load_params(self.workdir / CHECKPOINTS, step, sharding)

    def data_folder(self, given: str | None) -> Path:
        """The folder of the data: the one given, else the run's. Raises UserError if that is not there."""
        if given is not None:
            return storage.local_folder("--data", given)
        if not self.content:
            raise UserError(f"{self.workdir} holds an imported model, which has no data of its own; give --data")
        if not self.data.is_dir():
            where = f"data folder {self.data}, which {self.workdir / CONFIG} names, is not there"
            raise UserError(f"{where}; give its new place with --data")
        return self.data

    def check_continued_by(self, new: "Run[C]", preset_name: str) -> None:
        """Raises UserError if ``new``, which is to go on in the same folder, is another run."""
        if self.averaged is not None:
            raise UserError(
                f"{self.workdir} is the mean of {self.averaged} checkpoints, which is not trained on; give the "
                "--workdir of their run"
            )
        if self.kind != new.kind:
            raise UserError(f"{self.workdir} holds a run of {self.kind}, not of {new.kind}; give another --workdir")
        if self.tokenizer != new.tokenizer:
            raise UserError(
                f"data folder {new.data} was made with another tokenizer than the run in {self.workdir}; "
                f"give the data it was started with ({self.data}) or another --workdir"
            )
        if self.content != new.content:
            raise UserError(
                f"data folder {new.data} holds other text than the run in {self.workdir} was started with; "
                f"give {self.data} or another --workdir"
            )
        changed = configs.differences(self.config, new.config)
        if changed:
            raise UserError(
                f"{self.workdir} holds a run with other settings, which these cannot continue: {'; '.join(changed)}; "
                f"where no option was given, these are preset {preset_name}'s; give the run's own preset and settings, "
                "or another --workdir"
            )


def new_folder(output: str | Path) -> Path:
    """The folder that --output names. Raises UserError if it holds something."""
    folder = storage.folder("--output", str(output))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {output} is there already, and not empty; give a new folder")
    return folder


def own_data(workdir: Path) -> Path:
    """Where a run prepares the text it brings. Raises UserError if that is in a bucket: data lie on local disks."""
    if storage.is_remote(workdir):
        raise UserError(
            f"--workdir {workdir} is in a bucket and has no data of its own; give a local folder with --data"
        )
    return workdir / "data"


def kind_of(folder: Path) -> str | None:
    """The kind of run, or of model, that a folder of ours holds; None if it is none of ours.

    Raises:
      UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder; give that of a run, or of a model on this machine (nothing is downloaded)"
        )
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # its reader says what is wrong
    kind = stored.get("kind") if isinstance(stored, dict) else None
    return kind if isinstance(kind, str) else None


def busy(workdir: Path) -> str:
    """What is said if another process writes to a run's folder (``lock.only_writer``)."""
    return f"another run is writing to {workdir}; stop it or give another --workdir"


def with_vocabulary(config: C, is_given: bool, num_tokens: int) -> C:
    """The settings with the tokenizer's number of tokens as ``model.vocab_size``, unless a size was asked for.

    Raises:
      UserError: the size asked for is smaller.
    """
    model: Any = getattr(config, "model")  # noqa: B009 (every family's config has one, RunConfig has not)
    size = model.vocab_size if is_given else num_tokens
    if size < num_tokens:
        raise UserError(f"--model.vocab-size {size} is smaller than the data's vocabulary of {num_tokens} tokens")
    return dataclasses.replace(config, **{"model": dataclasses.replace(model, vocab_size=size)})


def on_all_held_out(config: C) -> C:
    """The settings, to measure all held-out data, however little of it training looks at (``train.eval_batches``)."""
    settings: Any = config
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, eval_batches=0))


def evaluate(run: Run[Any], evaluator: Evaluator, step: int | None) -> tuple[dict[str, float], int]:
    """(metrics, step) of a checkpoint, the newest if step is None.

    On any number of devices, whatever the run had: as many as divide a batch, with the parameters whole on each.
    """
    train = run.config.train
    num_devices = math.gcd(train.batch_size // train.num_microbatches, jax.device_count())
    mesh = flat_mesh(jax.devices()[:num_devices])
    params, step = run.params(step, replicated(mesh))

    def batches() -> Iterator[Batch]:
        yield from tqdm(evaluator.batches(), desc="measuring", unit=" batches", disable=None, leave=False)

    return make_evaluate(dataclasses.replace(evaluator, batches=batches), mesh)(params), step
