"""A run's folder: the settings and the vocabulary it was started with, its data, its checkpoints."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from bert_flax.config import BertConfig, PretrainConfig
from bert_flax.model import BertForPreTraining
from bert_flax.prepare import PrepareConfig, prepare
from bert_flax.presets import OWN_TEXT_VOCAB_SIZE, PRESETS
from bert_flax.pretrain import make_task
from bert_flax.sharding import PARAM_RULES
from core_flax import config as configs
from core_flax.checkpoint import load_params
from core_flax.config import MeshConfig
from core_flax.data.records import Manifest, PassageStore
from core_flax.evaluate import make_evaluate
from core_flax.lock import only_writer
from core_flax.loop import train
from core_flax.program import check_settings, make_program
from core_flax.sharding import make_mesh, replicated
from core_flax.text.wordpiece import WordPiece
from core_flax.types import Params, UserError

KIND = "bert_flax.pretrain"
CONFIG, VOCAB = "config.json", "vocab.txt"


@dataclass(frozen=True, kw_only=True)
class PretrainCommand(PretrainConfig):
    """Options of ``bert-flax pretrain``: where, on what, and every setting of the run."""

    workdir: str
    """Folder of the run: settings, checkpoints, metrics.jsonl. A run that is there already is resumed."""
    data: str | None = None
    """Folder made by bert-flax prepare; None: that of the run to resume, or the text that Python ships, prepared under
    the workdir."""

    @classmethod
    def of(cls, config: PretrainConfig) -> "PretrainCommand":
        """A preset as defaults; the workdir has none."""
        return cls(**_fields(config), workdir=tyro.MISSING)

    @property
    def config(self) -> PretrainConfig:
        """The settings alone."""
        return PretrainConfig(**{name: getattr(self, name) for name in _fields(PretrainConfig())})


def _fields(config: PretrainConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(PretrainConfig)}


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it."""

    workdir: Path
    config: PretrainConfig
    vocabulary: WordPiece
    data: Path
    content: str
    """Manifest.content of the data."""

    @classmethod
    def load(cls, workdir: str) -> "Run":
        """Raises UserError if the folder holds no pretraining run."""
        folder = _local("--workdir", workdir)
        stored = configs.load(folder / CONFIG, KIND, data=str, content=str, tokenizer=str, lowercase=bool)
        vocabulary = WordPiece.load(folder / VOCAB, stored["lowercase"])
        if vocabulary.fingerprint != stored["tokenizer"]:
            raise UserError(f"{folder / VOCAB} is not the vocabulary that this run was started with; put it back")
        config = configs.load_config(folder / CONFIG, PretrainConfig, stored)
        return cls(folder, config, vocabulary, folder.absolute() / stored["data"], stored["content"])

    def params(self, step: int | None = None, sharding: jax.sharding.Sharding | None = None) -> tuple[Params, int]:
        """(parameters, step) of a checkpoint, the newest if step is None; on the first device without a sharding."""
        return load_params(self.workdir / "checkpoints", step, sharding)

    def save(self) -> None:
        """Write vocabulary and settings; config.json last, since it makes the folder a run.

        Raises:
          UserError: the disk is full, or does not let us write there.
        """
        with configs.writing(self.workdir):
            self.workdir.mkdir(parents=True, exist_ok=True)
        home = self.workdir.absolute()  # the folder of a run may be moved, with the data that is in it
        data = self.data.relative_to(home) if self.data.is_relative_to(home) else self.data
        with configs.replacing(self.workdir / VOCAB) as partial:
            self.vocabulary.save(partial)
        configs.save(
            self.workdir / CONFIG,
            KIND,
            self.config,
            data=str(data),
            content=self.content,
            tokenizer=self.vocabulary.fingerprint,
            lowercase=self.vocabulary.lowercase,
        )


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
    workdir = _local("--workdir", command.workdir)
    optimizer = configs.with_optimizer_of(command.optimizer, PRESETS[preset_name]().optimizer, given)
    asked = dataclasses.replace(command.config, optimizer=optimizer)
    _check_model(asked)
    check_settings(asked, PARAM_RULES)
    with only_writer(workdir / "run.lock", f"another run is writing to {workdir}; stop it or give another --workdir"):
        old = Run.load(command.workdir) if (workdir / CONFIG).exists() else None
        data = _given_or_own(old, command.data) if old or command.data is not None else _own_text(workdir)
        store = PassageStore(data, "train")
        vocabulary = WordPiece.load(data / VOCAB, store.manifest.lowercase)
        config = _with_vocabulary(asked, "--model.vocab-size" in given, vocabulary)
        run = Run(workdir, config, vocabulary, data.absolute(), store.manifest.content)
        if old:
            _check_resumable(old, run, preset_name)
        task = make_task(config, store, _held_out(data), vocabulary)
        program = make_program(task, config)  # refuses what does not fit the devices before anything is written
        run.save()
        train(task, config, program, workdir)


def _local(option: str, folder: str) -> Path:
    """The folder that an option names. Raises UserError if it names none, or one that is not a local file's."""
    if not folder:
        raise UserError(f"{option} is empty; give a folder")
    if "://" in folder:
        raise UserError(f"{option} {folder}: only local folders can be read and written yet; mount it, or copy it")
    return Path(folder)


def _given_or_own(run: Run | None, data: str | None) -> Path:
    """The folder of the data: the one given, else the run's. Raises UserError if the run's has been moved."""
    if data is not None:
        return _local("--data", data)
    assert run
    if not run.data.is_dir():
        raise UserError(
            f"data folder {run.data}, which {run.workdir / CONFIG} names, is not there; give its new place with --data"
        )
    return run.data


def _own_text(workdir: Path) -> Path:
    data = workdir / "data"
    if not (data / "manifest.json").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        prepare(
            PrepareConfig(input=("python:docs",), output=str(data), vocab_size=OWN_TEXT_VOCAB_SIZE, valid_fraction=0.05)
        )
    return data


def _with_vocabulary(config: PretrainConfig, is_given: bool, vocabulary: WordPiece) -> PretrainConfig:
    """The settings with the vocabulary's size, unless a size was asked for."""
    size = config.model.vocab_size if is_given else vocabulary.num_tokens
    if size < vocabulary.num_tokens:
        raise UserError(
            f"--model.vocab-size {size} is smaller than the data's vocabulary of {vocabulary.num_tokens} tokens"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _check_resumable(old: Run, new: Run, preset_name: str) -> None:
    if old.vocabulary.fingerprint != new.vocabulary.fingerprint:
        raise UserError(
            f"data folder {new.data} was made with another tokenizer than the run in {old.workdir}; "
            f"give the data it was started with ({old.data}) or another --workdir"
        )
    if old.content != new.content:
        raise UserError(
            f"data folder {new.data} holds other text than the run in {old.workdir} was started with; "
            f"give {old.data} or another --workdir"
        )
    changed = configs.differences(old.config, new.config)
    if changed:
        raise UserError(
            f"{old.workdir} holds a run with other settings, which these cannot continue: {'; '.join(changed)}; "
            f"where no option was given, these are preset {preset_name}'s; give the run's own preset and settings, or "
            "another --workdir"
        )


def _check_model(config: PretrainConfig) -> None:
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
    run = Run.load(workdir)
    run = dataclasses.replace(run, data=_given_or_own(run, data).absolute())
    store, held_out = PassageStore(run.data, "train"), _held_out(run.data)
    if store.manifest.fingerprint != run.vocabulary.fingerprint:
        raise UserError(f"data folder {run.data} was made with another tokenizer than the run in {run.workdir}")
    if held_out is None:
        raise UserError(f"{run.data} holds out nothing: prepare it with --valid-fraction above 0")
    task = make_task(run.config, store, held_out, run.vocabulary)
    # On any number of devices, whatever the run had: as many as divide a batch, parameters whole on each.
    portion = run.config.train.batch_size // run.config.train.num_microbatches
    num_devices = math.gcd(portion, jax.device_count())
    mesh = make_mesh(MeshConfig(), jax.devices()[:num_devices])
    params, step = run.params(step, replicated(mesh))
    metrics = make_evaluate(task.evaluators["held_out"], mesh)(params)
    print_held_out(metrics, step)


def print_held_out(metrics: dict[str, float], step: int) -> None:
    """The table at the end of a run."""
    print(f"held out, step {step:<12}    loss   accuracy")
    print(f"masked tokens            {metrics['mlm_loss']:8.4f}   {metrics['mlm_accuracy']:8.1%}")
    print(f"  unigram baseline       {metrics['unigram_loss']:8.4f}   {metrics['unigram_accuracy']:8.1%}")
    print(f"next sentence            {metrics['next_sentence_loss']:8.4f}   {metrics['next_sentence_accuracy']:8.1%}")
