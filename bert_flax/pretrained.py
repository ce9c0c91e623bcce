"""Models to start from: a run's, a folder of Hugging Face's, or what ``bert-flax import-hf`` made of one.

An imported folder has config.json, vocab.txt and one checkpoint, as a run's has, and nothing of an optimizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_flax import runs
from bert_flax.config import BertConfig
from bert_flax.finetune import runs as finetuned
from bert_flax.finetune.model import architecture
from bert_flax.huggingface import Pretrained, Report, TaskHead, load_pretrained, save_pretrained
from bert_flax.huggingface_names import HEADS
from core_flax import config as configs
from core_flax import storage
from core_flax.checkpoint import Checkpoints, load_params
from core_flax.config import CheckpointConfig
from core_flax.run import CHECKPOINTS, CONFIG, kind_of, new_folder
from core_flax.state import TrainState
from core_flax.text.wordpiece import WordPiece
from core_flax.types import Params, UserError

KIND = "bert_flax.pretrained"
VOCAB = runs.VOCAB
HEAD = "task_head"
"""Name of a task head's kernel and bias among the parameters of an imported folder."""


def import_hf(folder: str, output: str) -> None:
    """Turn a Hugging Face folder into one of ours, and print what was read, what is missing and what was not used.

    Raises:
      UserError: the folder cannot be read (see load_pretrained), or the output is not empty.
    """
    home = new_folder(output)
    pretrained = load_pretrained(storage.local_folder("FOLDER", folder))
    save_imported(home, pretrained)
    print(f"{output}: {_size(pretrained)}")
    for line in pretrained.report.lines():
        print(f"  {line}")


def export_hf(workdir: str, output: str, step: int | None = None) -> None:
    """Write a model of ours, from whichever folder, as one that transformers loads; print what it holds.

    Args:
      workdir: anything that load_init accepts.
      output: folder that does not exist, or is empty.
      step: of the checkpoint; None: the newest, of fine-tuning the best.
    """
    home = new_folder(output)
    pretrained = load_init(str(storage.folder("--workdir", workdir)), step)
    with storage.filling(home) as folder:
        save_pretrained(folder, pretrained.config, pretrained.params, pretrained.vocabulary, pretrained.head)
    print(f"{output}: {_size(pretrained)}")
    for line in pretrained.report.lines():
        print(f"  {line}")


def load_init(path: str, step: int | None = None) -> Pretrained:
    """The model in a folder: a pretraining or fine-tuning run's, an imported one, or Hugging Face's.

    Args:
      path: the folder; of several fine-tuning runs, which differ in their seed, the best one is taken.
      step: of the checkpoint; None: the newest, of fine-tuning the best. Only a run's folder has several.

    Raises:
      UserError: it is none of these, or it is damaged.
    """
    folder = storage.folder("--init", path)
    kind = kind_of(folder)
    seeds = f"{finetuned.SEED}*/{CONFIG}"
    if kind == finetuned.KIND or (kind is None and any(folder.glob(seeds))):
        return _load_finetuned(path, step)
    if kind is None and not (folder / CONFIG).exists() and any(folder.glob(f"*/{seeds}")):
        return _load_finetuned(path, step)  # all of GLUE: it is refused, and its tasks are named
    if kind is None:
        if step is not None:
            raise UserError(f"--step {step}: {path} is a folder of Hugging Face's, which has no steps")
        return load_pretrained(storage.local_folder("--init", path))
    if kind == KIND:
        return _load_imported(folder, step)
    if kind == runs.KIND:
        return _load_run(folder, step)
    raise UserError(f"{path} holds a {kind}; give a pretraining run, an imported folder or a folder of Hugging Face's")


def save_imported(folder: Path, pretrained: Pretrained) -> None:
    """Write a model as a folder that load_init reads; config.json last, since it makes the folder one."""
    storage.make_folder(folder)
    head = pretrained.head
    params = dict(pretrained.params)
    if head:
        params[HEAD] = {"kernel": head.kernel, "bias": head.bias}
    with storage.replacing(folder / VOCAB) as partial:
        pretrained.vocabulary.save(partial)
    checkpoints = Checkpoints(folder / CHECKPOINTS, CheckpointConfig())
    checkpoints.save(TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), {}))
    checkpoints.close()
    configs.save(
        folder / CONFIG,
        KIND,
        pretrained.config,
        tokenizer=pretrained.vocabulary.fingerprint,
        lowercase=pretrained.vocabulary.lowercase,
        head={"architecture": head.architecture, "labels": head.labels} if head else {},
    )


def _load_imported(folder: Path, step: int | None) -> Pretrained:
    path = folder / CONFIG
    stored = configs.load(path, KIND, tokenizer=str, lowercase=bool, head=dict)
    vocabulary = WordPiece.load(folder / VOCAB, stored["lowercase"])
    if vocabulary.fingerprint != stored["tokenizer"]:
        raise UserError(f"{folder / VOCAB} is not the vocabulary that was imported; import the model again")
    params, step = load_params(folder / CHECKPOINTS, step)
    arrays = _arrays(params)
    about = configs.load_config(path, _AboutHead, stored, "head") if stored["head"] else None
    head = _head(about, arrays.pop(HEAD)) if about else None
    config = configs.load_config(path, BertConfig, stored)
    return Pretrained(config, arrays, vocabulary, _report(arrays, step), head)


@dataclass(frozen=True)
class _AboutHead:
    """What config.json says of the head of an imported model."""

    architecture: str
    labels: tuple[str, ...] | None


def _head(about: _AboutHead, layer: Mapping[str, Any]) -> TaskHead:
    labels = None if about.labels is None else tuple(about.labels)
    return TaskHead(about.architecture, layer["kernel"], layer["bias"], labels)


def _load_run(folder: Path, step: int | None) -> Pretrained:
    run, vocabulary = runs.load_run(folder)
    params, step = run.params(step)
    arrays = _arrays(params)
    return Pretrained(run.config.model, arrays, vocabulary, _report(arrays, step))


def _load_finetuned(path: str, step: int | None) -> Pretrained:
    run = finetuned.best_run(path)
    params, step = run.params(step)
    arrays = _arrays(params)
    spec, layer = run.task.spec, arrays.pop("head")
    labels = spec.labels if spec.kind in ("classification", "tagging") else None
    head = TaskHead(architecture(spec), layer["kernel"], layer["bias"], labels)
    return Pretrained(run.config.model, arrays, run.vocabulary, _report(arrays, step), head)


def _report(arrays: Mapping[str, Any], step: int) -> Report:
    there = {*arrays, *(f"encoder/{name}" for name in arrays["encoder"])}
    return Report((f"{CHECKPOINTS}/{step}",), tuple(title for head, title in HEADS.items() if head not in there))


def _arrays(params: Params) -> dict[str, Any]:
    return jax.tree.map(np.asarray, dict(params))


def _size(pretrained: Pretrained) -> str:
    config, count, head = pretrained.config, sum(x.size for x in jax.tree.leaves(pretrained.params)), pretrained.head
    of_task = f", and the head of a {head.architecture} with {len(head.bias)} outputs" if head else ""
    return f"BERT of {config.num_layers} layers, {config.width} wide, {count:,} parameters{of_task}"
