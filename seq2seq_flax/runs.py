"""A run's folder: the settings and the tokenizer it was started with, its data, its checkpoints."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from core_flax import config as configs
from core_flax import kernels, storage
from core_flax.cli import settings_of
from core_flax.distributed import leads, only_run
from core_flax.loop import train as run_loop
from core_flax.program import check_settings, make_program
from core_flax.run import LOCK, Run, busy, holds_run, with_vocabulary
from core_flax.sharding import make_mesh, ways_of_batch
from core_flax.task import Task
from core_flax.text.sentencepiece_model import SentencePiece
from seq2seq_flax.architectures import make_model, param_rules
from seq2seq_flax.batches import row_capacity
from seq2seq_flax.config import (
    AnyTranslateConfig,
    GNMTTranslateConfig,
    LSTMAttentionTranslateConfig,
    LSTMSeq2SeqTranslateConfig,
    ModelConfig,
    ModernTranslateConfig,
    TranslateConfig,
)
from seq2seq_flax.numbers import own_numbers
from seq2seq_flax.pairs import TOKENIZER, Manifest, PairStore
from seq2seq_flax.presets import PRESETS
from seq2seq_flax.task import init_params, make_task

KINDS: dict[str, type[AnyTranslateConfig]] = {
    "seq2seq_flax.transformer": TranslateConfig,
    "seq2seq_flax.transformer_modern": ModernTranslateConfig,
    "seq2seq_flax.lstm_seq2seq": LSTMSeq2SeqTranslateConfig,
    "seq2seq_flax.lstm_attention": LSTMAttentionTranslateConfig,
    "seq2seq_flax.gnmt": GNMTTranslateConfig,
}
"""What a run's folder says is trained -> the class of its settings."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    workdir: str
    """Folder of the run, or gs://BUCKET/FOLDER: settings, checkpoints, metrics.jsonl. One that is there is resumed."""
    data: str | None = None
    """Folder made by seq2seq-flax prepare; None: that of the run to resume, or number words in English and German, made
    under the workdir."""
    explain_kernels: bool = False
    """Tell in which way attention is computed here, and why in no faster one."""


@dataclass(frozen=True, kw_only=True)
class TransformerCommand(_Place, TranslateConfig):
    """Options of ``seq2seq-flax train`` for a Transformer."""


@dataclass(frozen=True, kw_only=True)
class ModernCommand(_Place, ModernTranslateConfig):
    """Options for a Transformer of later make."""


@dataclass(frozen=True, kw_only=True)
class LSTMSeq2SeqCommand(_Place, LSTMSeq2SeqTranslateConfig):
    """Options for LSTMs without attention."""


@dataclass(frozen=True, kw_only=True)
class LSTMAttentionCommand(_Place, LSTMAttentionTranslateConfig):
    """Options for LSTMs with attention."""


@dataclass(frozen=True, kw_only=True)
class GNMTCommand(_Place, GNMTTranslateConfig):
    """Options for a GNMT."""


TrainCommand = TransformerCommand | ModernCommand | LSTMSeq2SeqCommand | LSTMAttentionCommand | GNMTCommand
"""Options of ``seq2seq-flax train``: where, on what, and every setting of the run."""

_COMMANDS: dict[type, type[TrainCommand]] = {
    TranslateConfig: TransformerCommand,
    ModernTranslateConfig: ModernCommand,
    LSTMSeq2SeqTranslateConfig: LSTMSeq2SeqCommand,
    LSTMAttentionTranslateConfig: LSTMAttentionCommand,
    GNMTTranslateConfig: GNMTCommand,
}


def command_of(config: AnyTranslateConfig) -> type[TrainCommand]:
    """The options for training what a config describes."""
    return _COMMANDS[type(config)]


def load_run(workdir: str | Path) -> tuple[Run[Any], SentencePiece]:
    """A run and its tokenizer. Raises UserError if the folder holds no run of this family."""
    run = Run.load(workdir, KINDS, directions=list, tagged=bool)
    tokenizer = SentencePiece.load(run.workdir / TOKENIZER)
    run.check_tokenizer(TOKENIZER, tokenizer.fingerprint)
    return run, tokenizer


def num_parameters(model: ModelConfig) -> int:
    """Parameters of a model, without making any."""
    shapes = jax.eval_shape(lambda key: init_params(make_model(model), key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def train(command: TrainCommand, preset_name: str, given: Collection[str]) -> Run[Any]:
    """Start the run, or resume it; returns it.

    Args:
      command: the preset's settings, with what was asked for in their place.
      preset_name: the preset.
      given: options that stood on the command line (cli.options_given): what they say holds.

    Raises:
      UserError: the settings do not fit each other, the data, the devices, or the run that the folder holds.
    """
    workdir, preset = storage.folder("--workdir", command.workdir), PRESETS[preset_name]()
    optimizer = configs.with_optimizer_of(command.optimizer, preset.optimizer, given)
    schedule = configs.with_schedule_of(command.schedule, preset.schedule, given)
    asked = dataclasses.replace(settings_of(command, type(preset)), optimizer=optimizer, schedule=schedule)
    check_settings(asked, param_rules(asked.model))
    with only_run(workdir / LOCK, busy(workdir)):
        old = load_run(workdir)[0] if holds_run(workdir, command.data) else None
        if old:
            data = old.data_folder(command.data)
        else:
            data = own_numbers(workdir) if command.data is None else storage.local_folder("--data", command.data)
        store, tokenizer = open_data(data)
        config = with_vocabulary(asked, "--model.vocab-size" in given, tokenizer.num_tokens)
        kind = next(kind for kind, cls in KINDS.items() if cls is type(config))
        facts = {"directions": store.manifest.directions, "tagged": store.manifest.tagged}
        run = Run(workdir, kind, config, data.absolute(), store.manifest.content, tokenizer.fingerprint, facts)
        if old:
            old.check_continued_by(run, preset_name)
        row_multiple = ways_of_batch(make_mesh(config.mesh)) * config.train.num_microbatches
        task = make_task(config, store, held_out_of(data), tokenizer, row_multiple)
        program = make_program(task, config)  # refuses what does not fit the devices before anything is written
        run.save(TOKENIZER, tokenizer.save)
        if leads():
            print(_about_batches(task, config, store), flush=True)
        with kernels.explained(command.explain_kernels):
            run_loop(task, config, program, workdir)
    return run


def _about_batches(task: Task, config: AnyTranslateConfig, store: PairStore) -> str:
    """A line on the rows that a step's pairs are packed into."""
    sides = row_capacity(store, config.inputs.row_length)
    num_rows = config.train.batch_size
    padding = 1 - task.cost(0).tokens / (num_rows * sum(sides))
    return f"steps of {num_rows} rows of {sides[0]} + {sides[1]} tokens, {padding:.0%} of them padding"


def open_data(data: Path) -> tuple[PairStore, SentencePiece]:
    """The training pairs of a prepared folder, and its tokenizer. Raises UserError if it is damaged."""
    return PairStore(data, "train"), SentencePiece.load(data / TOKENIZER)


def held_out_of(data: Path) -> PairStore | None:
    """The held-out pairs of a prepared folder, if there are any."""
    return PairStore(data, "valid") if Manifest.load(data).splits["valid"].pairs else None
