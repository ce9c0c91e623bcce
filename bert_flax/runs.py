"""A run's folder: the settings and the vocabulary it was started with, its data, its checkpoints."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import jax

from bert_flax.config import BertConfig, PretrainConfig
from bert_flax.model import BertForPreTraining
from bert_flax.prepare import PrepareConfig, prepare
from bert_flax.presets import OWN_TEXT_VOCAB_SIZE, PRESETS
from bert_flax.pretrain import make_task
from bert_flax.sharding import PARAM_RULES
from core_flax import config as configs
from core_flax import kernels, storage
from core_flax.cli import settings_of
from core_flax.data.records import Manifest, PassageStore
from core_flax.distributed import first_does, only_run
from core_flax.loop import train
from core_flax.program import check_settings, make_program
from core_flax.run import LOCK, Run, busy, holds_run, on_all_held_out, own_data, with_vocabulary
from core_flax.run import evaluate as run_evaluate
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError

KIND = "bert_flax.pretrain"
VOCAB = "vocab.txt"


@dataclass(frozen=True, kw_only=True)
class PretrainCommand(PretrainConfig):
    """Options of ``bert-flax pretrain``: where, on what, and every setting of the run."""

    workdir: str
    """Folder of the run, or gs://BUCKET/FOLDER: settings, checkpoints, metrics.jsonl. One that is there is resumed."""
    data: str | None = None
    """Folder made by bert-flax prepare; None: that of the run to resume, or the text that Python ships, prepared under
    the workdir."""
    explain_kernels: bool = False
    """Tell in which way attention is computed here, and why in no faster one."""


def load_run(workdir: str | Path) -> tuple[Run[PretrainConfig], WordPiece]:
    """A run and its vocabulary. Raises UserError if the folder holds no pretraining run."""
    run = Run.load(workdir, {KIND: PretrainConfig}, lowercase=bool)
    vocabulary = WordPiece.load(run.workdir / VOCAB, run.facts["lowercase"])
    run.check_tokenizer(VOCAB, vocabulary.fingerprint)
    return run, vocabulary


def num_parameters(model: BertConfig) -> int:
    """Parameters of the model with its pretraining heads, without making any."""
    ids = jax.ShapeDtypeStruct((1, 8), "int32")
    shapes = jax.eval_shape(
        BertForPreTraining(model).init, jax.random.key(0), ids, ids, jax.ShapeDtypeStruct((1, 8), bool), ids
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def pretrain(command: PretrainCommand, preset_name: str, given: Collection[str]) -> None:
    """Start the run, or resume it.

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
    asked = dataclasses.replace(settings_of(command, PretrainConfig), optimizer=optimizer, schedule=schedule)
    check_model(asked)
    check_settings(asked, PARAM_RULES)
    with only_run(workdir / LOCK, busy(workdir)):
        old = load_run(workdir)[0] if holds_run(workdir, command.data) else None
        if old:
            data = old.data_folder(command.data)
        else:
            data = _own_text(workdir) if command.data is None else storage.local_folder("--data", command.data)
        store = PassageStore(data, "train")
        vocabulary = WordPiece.load(data / VOCAB, store.manifest.lowercase)
        config = with_vocabulary(asked, "--model.vocab-size" in given, vocabulary.num_tokens)
        facts = {"lowercase": vocabulary.lowercase}
        run = Run(workdir, KIND, config, data.absolute(), store.manifest.content, vocabulary.fingerprint, facts)
        if old:
            old.check_continued_by(run, preset_name)
        task = make_task(config, store, _held_out(data), vocabulary)
        program = make_program(task, config)  # refuses what does not fit the devices before anything is written
        run.save(VOCAB, vocabulary.save)
        with kernels.explained(command.explain_kernels):
            train(task, config, program, workdir)


def _own_text(workdir: Path) -> Path:
    data = own_data(workdir)
    own = PrepareConfig(("python:docs",), str(data), vocab_size=OWN_TEXT_VOCAB_SIZE, valid_fraction=0.05)

    def make() -> None:
        if not (data / "manifest.json").exists():
            workdir.mkdir(parents=True, exist_ok=True)
            prepare(own)

    first_does(make)
    return data


def check_model(config: PretrainConfig) -> None:
    """Raises UserError if the model cannot read what the settings ask for."""
    if config.inputs.length > config.model.max_length:
        raise UserError(
            f"--inputs.length {config.inputs.length} exceeds --model.max-length {config.model.max_length}, "
            "the positions that the model has"
        )
    if config.model.num_segments < 2:
        raise UserError(
            f"--model.num-segments {config.model.num_segments}: pretraining reads pairs of texts; give 2 or more"
        )


def _held_out(data: Path) -> PassageStore | None:
    return PassageStore(data, "valid") if Manifest.load(data).splits["valid"].passages else None


def evaluate(workdir: str, data: str | None, step: int | None) -> None:
    """Print held-out losses and accuracies of a checkpoint, beside the unigram baseline."""
    run, vocabulary = load_run(workdir)
    folder = run.data_folder(data).absolute()
    store, held_out = PassageStore(folder, "train"), _held_out(folder)
    if store.manifest.fingerprint != vocabulary.fingerprint:
        raise UserError(f"data folder {folder} was made with another tokenizer than the run in {run.workdir}")
    if held_out is None:
        raise UserError(f"{folder} holds out nothing: prepare it with --valid-fraction above 0")
    task = make_task(on_all_held_out(run.config), store, held_out, vocabulary)
    print_held_out(*run_evaluate(run, task.evaluators["held_out"], step))


def print_held_out(metrics: dict[str, float], step: int) -> None:
    """The table at the end of a run."""
    print(f"held out, step {step:<12}    loss   accuracy")
    print(f"masked tokens            {metrics['mlm_loss']:8.4f}   {metrics['mlm_accuracy']:8.1%}")
    print(f"  unigram baseline       {metrics['unigram_loss']:8.4f}   {metrics['unigram_accuracy']:8.1%}")
    print(f"next sentence            {metrics['next_sentence_loss']:8.4f}   {metrics['next_sentence_accuracy']:8.1%}")
