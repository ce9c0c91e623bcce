"""Models to translate with: a run's, a folder of Hugging Face's, or what ``seq2seq-flax import-hf`` made of one.

An imported folder has config.json, Marian's vocabulary and one checkpoint, as a run's has, and nothing of an optimizer.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from core_flax import config as configs
from core_flax import storage
from core_flax.checkpoint import Checkpoints, load_params
from core_flax.config import CheckpointConfig
from core_flax.params import count
from core_flax.run import CHECKPOINTS, CONFIG, kind_of, new_folder
from core_flax.state import TrainState
from core_flax.types import Params, UserError
from core_flax.weight_files import Report, read_json
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.huggingface import Pretrained, check_exportable, load_pretrained, save_pretrained
from seq2seq_flax.huggingface_vocabulary import VOCAB, MarianVocabulary
from seq2seq_flax.runs import load_run

KIND = "seq2seq_flax.pretrained"


def import_hf(folder: str, output: str) -> None:
    """Turn a folder of a MarianMTModel into one of ours, and print what was read and what was not used.

    Raises:
      UserError: the folder cannot be read (see load_pretrained), or the output is not empty.
    """
    home, source = new_folder(output), storage.local_folder("FOLDER", folder)
    if (kind := kind_of(source)) is not None:
        raise UserError(f"{folder} is ours already, of kind {kind}: give it as it is, as --workdir")
    pretrained = load_pretrained(source)
    save_imported(home, pretrained)
    _tell(output, pretrained)


def export_hf(workdir: str, output: str, step: int | None = None) -> None:
    """Write a model of ours, from whichever folder, as a MarianMTModel that transformers loads; print what it holds.

    Args:
      workdir: anything that load_model accepts.
      output: folder that does not exist, or is empty.
      step: of the checkpoint; None: the newest.

    Raises:
      UserError: transformers' Marian cannot be this model.
    """
    home = new_folder(output)
    pretrained = load_model(workdir, step)
    check_exportable(pretrained.config)
    with storage.filling(home) as folder:
        lengths = pretrained.max_length, pretrained.num_positions
        save_pretrained(folder, pretrained.config, pretrained.params, pretrained.tokenizer, *lengths)
    _tell(output, pretrained)


def load_model(path: str, step: int | None = None) -> Pretrained:
    """The model in a folder: a run's, an imported one, or Hugging Face's.

    Args:
      path: the folder.
      step: of the checkpoint; None: the newest. Only a run's folder has several.

    Raises:
      UserError: it is none of these, or it is damaged.
    """
    folder = storage.folder("--workdir", path)
    kind = kind_of(folder)
    if kind is None and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no model: {CONFIG} is missing; give the folder of a run, or Hugging Face's")
    if kind is None:
        if step is not None:
            raise UserError(f"--step {step}: {path} is a folder of Hugging Face's, which has no steps")
        return load_pretrained(storage.local_folder("--workdir", path))
    return _load_imported(folder, step) if kind == KIND else _load_run(folder, step)


def save_imported(folder: Path, pretrained: Pretrained) -> None:
    """Write a model as a folder that load_model reads; config.json last, since it makes the folder one."""
    vocabulary = pretrained.tokenizer
    assert isinstance(vocabulary, MarianVocabulary)
    storage.make_folder(folder)
    with storage.filling(folder) as local:
        vocabulary.save(local)
    checkpoints = Checkpoints(folder / CHECKPOINTS, CheckpointConfig())
    checkpoints.save(TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, dict(pretrained.params)), {}))
    checkpoints.close()
    about = {"tokenizer": vocabulary.fingerprint, "start": vocabulary.bos_id}
    lengths = {"max_length": pretrained.max_length, "num_positions": pretrained.num_positions}
    configs.save(folder / CONFIG, KIND, pretrained.config, **about, **lengths)


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is one of theirs: its config.json says what type of model it holds, and not what kind of run."""
    return (folder / CONFIG).is_file() and kind_of(folder) is None and "model_type" in read_json(folder / CONFIG)


def _load_imported(folder: Path, step: int | None) -> Pretrained:
    path = folder / CONFIG
    stored = configs.load(path, KIND, tokenizer=str, start=int, max_length=int, num_positions=int | None)
    vocabulary = MarianVocabulary.load(folder, stored["start"])
    if vocabulary.fingerprint != stored["tokenizer"]:
        raise UserError(f"{folder / VOCAB} is not the vocabulary that was imported; import the model again")
    config = configs.load_config(path, TransformerConfig, stored)
    params, report = _read_checkpoint(folder, step)
    length = stored["max_length"]
    return Pretrained(config, params, vocabulary, report, length, stored["num_positions"] or length)


def _load_run(folder: Path, step: int | None) -> Pretrained:
    run, tokenizer = load_run(folder)
    params, report = _read_checkpoint(folder, step)
    # Training has seen no sentence that does not fit a row.
    return Pretrained(run.config.model, params, tokenizer, report, run.config.inputs.row_length)


def _read_checkpoint(folder: Path, step: int | None) -> tuple[Params, Report]:
    params, step = load_params(folder / CHECKPOINTS, step)
    return jax.tree.map(np.asarray, dict(params)), Report((f"{CHECKPOINTS}/{step}",))


def _tell(output: str, pretrained: Pretrained) -> None:
    config = pretrained.config
    size = f"{config.num_layers} + {config.num_layers} layers, {config.width} wide"
    print(f"{output}: Transformer of {size}, {count(pretrained.params):,} parameters")
    for line in pretrained.report.lines():
        print(f"  {line}")
