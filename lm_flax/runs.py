"""A run's folder: the settings and the tokenizer it was started with, its data, its checkpoints."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from core_flax import config as configs
from core_flax import kernels, storage
from core_flax.cli import settings_of
from core_flax.distributed import first_does, only_run
from core_flax.loop import train as train_loop
from core_flax.program import check_settings, make_program
from core_flax.run import LOCK, Run, busy, holds_run, own_data, with_vocabulary
from core_flax.task import Task
from core_flax.types import UserError
from lm_flax import architectures, figures, task, tokenizers, word2vec_task
from lm_flax.config import (
    KINDS,
    AnyRun,
    ConvRun,
    GPT2Run,
    LlamaRun,
    LSTMRun,
    SpeedrunRun,
    Word2VecRun,
    check_rows,
    kind_of,
)
from lm_flax.data import TokenStore, load_tokenizer
from lm_flax.generate import print_sample
from lm_flax.prepare import PrepareConfig, prepare
from lm_flax.presets import PRESETS
from lm_flax.sharding import WORD2VEC_RULES
from lm_flax.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Options of ``lm-flax train`` beside the settings of the run: where, and on what."""

    workdir: str
    """Folder of the run, or gs://BUCKET/FOLDER: settings, checkpoints, metrics.jsonl. One that is there is resumed."""
    data: str | None = None
    """Folder made by lm-flax prepare; None: that of the run to resume, or the text that Python ships,
    prepared under the workdir as characters, for word vectors as words."""
    explain_kernels: bool = False
    """Tell in which way attention is computed here, and why in no faster one."""


@dataclass(frozen=True, kw_only=True)
class GPT2Command(Folders, GPT2Run):
    """Trains GPT-2's architecture."""


@dataclass(frozen=True, kw_only=True)
class LlamaCommand(Folders, LlamaRun):
    """Trains Llama's architecture."""


@dataclass(frozen=True, kw_only=True)
class SpeedrunCommand(Folders, SpeedrunRun):
    """Trains the architecture that learns fast."""


@dataclass(frozen=True, kw_only=True)
class ConvCommand(Folders, ConvRun):
    """Trains convolutions."""


@dataclass(frozen=True, kw_only=True)
class LSTMCommand(Folders, LSTMRun):
    """Trains an LSTM."""


@dataclass(frozen=True, kw_only=True)
class Word2VecCommand(Folders, Word2VecRun):
    """Trains word vectors."""


TrainCommand = GPT2Command | LlamaCommand | SpeedrunCommand | ConvCommand | LSTMCommand | Word2VecCommand
COMMANDS: dict[type[AnyRun], type] = {
    GPT2Run: GPT2Command,
    LlamaRun: LlamaCommand,
    SpeedrunRun: SpeedrunCommand,
    ConvRun: ConvCommand,
    LSTMRun: LSTMCommand,
    Word2VecRun: Word2VecCommand,
}
"""The class of the command by that of the settings."""


def load_run(workdir: str | Path) -> tuple[Run[Any], Tokenizer]:
    """A run, or an imported model, and its tokenizer. Raises UserError if the folder holds neither."""
    run = Run.load(workdir, KINDS, tokenizer_file=str, start_id=int | None, end_id=int | None)
    file = run.facts["tokenizer_file"]
    tokenizer = tokenizers.load(run.workdir / file, run.facts["end_id"])
    run.check_tokenizer(file, tokenizer.fingerprint)
    return run, tokenizer


def load_lm(workdir: str | Path) -> tuple[Run[Any], Tokenizer]:
    """As load_run, a model that predicts the next token. Raises UserError if it is none."""
    run, tokenizer = load_run(workdir)
    if isinstance(run.config, Word2VecRun):
        raise UserError(f"{run.workdir} holds word vectors, which predict no text; see analogies and neighbours")
    return run, tokenizer


def num_parameters(config: AnyRun) -> int:
    """Parameters of a run's model, without making any."""
    if isinstance(config, Word2VecRun):
        return 2 * config.model.vocab_size * config.model.width
    return architectures.num_parameters(config.model)


def make_task(config: Any, train: TokenStore, held_out: TokenStore | None, end_id: int | None) -> Task:
    """The task of a run, whichever it is. Raises UserError as those do."""
    if isinstance(config, Word2VecRun):
        return word2vec_task.make_task(config, train, held_out)
    return task.make_task(config, train, held_out, end_id)


def task_without_data(config: AnyRun) -> Task:
    """All of the task that settings alone decide: enough to compile its step for the shapes of ``batch_shapes``."""
    if isinstance(config, Word2VecRun):
        return word2vec_task.task_without_data(config)
    return task.task_without_data(config)


def batch_shapes(config: AnyRun, step: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch of a step."""
    if isinstance(config, Word2VecRun):
        return word2vec_task.batch_shapes(config, step)
    return task.batch_shapes(config, step)


def train(command: TrainCommand, preset_name: str, given: Collection[str]) -> None:
    """Start the run, or resume it; at its end print held-out figures and what the settings ask for as a sample.

    Args:
      command: the preset's settings, with what was asked for in their place.
      preset_name: the preset.
      given: options that stood on the command line (cli.options_given): what they say holds.

    Raises:
      UserError: the settings do not fit each other, the data, the devices, or the run that the folder holds.
    """
    workdir = storage.folder("--workdir", command.workdir)
    preset = PRESETS[preset_name]()
    optimizer = configs.with_optimizer_of(command.optimizer, preset.optimizer, given)
    schedule = configs.with_schedule_of(command.schedule, preset.schedule, given)
    asked: Any = dataclasses.replace(settings_of(command, type(preset)), optimizer=optimizer, schedule=schedule)
    check_settings(asked, _rules(asked))
    check(asked)
    with only_run(workdir / LOCK, busy(workdir)):
        old = load_run(workdir)[0] if holds_run(workdir, command.data) else None
        if old and not old.content:
            raise UserError(f"{workdir} holds an imported model, which is not trained on; give another --workdir")
        if old:
            data = old.data_folder(command.data)
        else:
            data = _own_text(workdir, asked) if command.data is None else storage.local_folder("--data", command.data)
        store, held_out, tokenizer = open_data(data)
        config = with_vocabulary(asked, "--model.vocab-size" in given, tokenizer.num_tokens)
        end_id = store.manifest.end_id  # which an imported model has named: the tokenizer alone does not know
        facts = {"tokenizer_file": tokenizer.file, **({} if end_id is None else {"end_id": end_id})}
        content = store.manifest.content
        run = Run(workdir, kind_of(config), config, data.absolute(), content, tokenizer.fingerprint, facts)
        if old:
            old.check_continued_by(run, preset_name)
        made = make_task(config, store, held_out, tokenizer.end_id)
        program = make_program(made, config)  # refuses what does not fit the devices before anything is written
        run.save(tokenizer.file, tokenizer.save)
        with kernels.explained(command.explain_kernels):
            metrics = train_loop(made, config, program, workdir)
    if isinstance(config, Word2VecRun):
        return

    def show() -> None:
        if held_out:
            figures.print_table(metrics, f"held out, step {config.train.num_steps}", store, held_out, tokenizer)
            if config.train.eval_batches:
                some = f"the first {config.train.eval_batches} batches"
                print(f"(the model's of {some}; lm-flax evaluate --workdir {workdir} reads all)")
        if config.sample_tokens:
            print_sample(run, tokenizer, config.sample_tokens)

    first_does(show)  # the others wait: one that left would be taken for lost


def check(config: AnyRun) -> None:
    """Raises UserError if the settings do not fit each other, whichever kind of run they are of."""
    if not isinstance(config, Word2VecRun):
        check_rows(config)


def _rules(config: Any) -> Any:
    if isinstance(config, Word2VecRun):
        return WORD2VEC_RULES
    return architectures.ARCHITECTURES[type(config.model)].rules


def open_data(folder: Path) -> tuple[TokenStore, TokenStore | None, Tokenizer]:
    """The text to train on, the text held out if there is any, and the tokenizer of a prepared folder."""
    train, held_out = TokenStore(folder, "train"), TokenStore(folder, "valid")
    return train, held_out if held_out.info.tokens else None, load_tokenizer(folder, train.manifest)


def _own_text(workdir: Path, config: AnyRun) -> Path:
    data, kind = own_data(workdir), "word" if isinstance(config, Word2VecRun) else "char"
    own = PrepareConfig(("python:docs",), str(data), tokenizer=kind, held_out="documents")

    def make() -> None:
        if not (data / "manifest.json").exists():
            workdir.mkdir(parents=True, exist_ok=True)
            prepare(own)

    first_does(make)
    return data
