"""BERT's weights in and out of Hugging Face's format: a folder with config.json, model.safetensors and vocab.txt.

Sources: transformers' BertConfig, and the names that its BertForPreTraining and the classes beside it give their
tensors, those of the first releases included.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bert_flax.config import BertConfig
from bert_flax.huggingface_names import HEADS, arrays_from, params_from, tensors
from bert_flax.huggingface_vocabulary import read_vocabulary, write_vocabulary
from core_flax import storage
from core_flax.text.wordpiece import WordPiece
from core_flax.types import Params, UserError
from core_flax.weight_files import SAFETENSORS, Report, config_from, read_json, read_weights, write_safetensors
from core_flax.weight_names import check_array

CONFIG = "config.json"
FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "width",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "type_vocab_size": "num_segments",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "init_stddev",
    "layer_norm_eps": "norm_epsilon",
}
"""Their names of what BertConfig holds. The defaults are the same."""

FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "hidden_act": ("gelu", "gelu_python"),  # both the exact one
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
"""Settings of theirs of which this model has one value."""

MAX_PADDING = 127
"""Rows of the token embedding that may lie beyond the vocabulary. Tables are padded to a multiple of 128 at most; a
larger difference tells of a vocabulary that belongs to another model."""

TASK_HEADS = {
    "BertForSequenceClassification": "classifier",
    "BertForMultipleChoice": "classifier",
    "BertForTokenClassification": "classifier",
    "BertForQuestionAnswering": "qa_outputs",
}
"""Architectures with a linear layer that is fitted to a task on top, and its name."""

DECODER = "cls.predictions.decoder"
"""The masked-language head's output layer. Its weight is the token embedding, its bias the head's; some files repeat
them."""


@dataclass(frozen=True)
class TaskHead:
    """The linear layer on top of a fine-tuned model.

    Attributes:
      architecture: a key of TASK_HEADS; it says what the layer is applied to: the pooled first position in
        BertForSequenceClassification and BertForMultipleChoice, every position in the others.
      kernel: [D, C].
      bias: [C].
      labels: names of the classes; None: not known.
    """

    architecture: str
    kernel: np.ndarray
    bias: np.ndarray
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Pretrained:
    """A model to start from. Arrays are float32 in NumPy; params lacks the heads that the weights lack."""

    config: BertConfig
    params: Params
    vocabulary: WordPiece
    report: Report
    head: TaskHead | None = None


def load_pretrained(folder: str | Path) -> Pretrained:
    """Read the folder of a model of BERT's architecture, with whatever heads it has.

    Raises:
      UserError: a file is missing or damaged, the model is not BERT or its text is cut in another way, or arrays are
        missing (other than whole heads) or not of the shapes that config.json gives.
    """
    folder = Path(folder)
    stored = read_json(folder / CONFIG)
    config = _read_config(folder / CONFIG, stored)
    vocabulary, notes = read_vocabulary(folder)
    notes += _padding(folder, config, vocabulary)
    weights = read_weights(folder)
    arrays, repeated = _one_decoder(folder, _renamed(folder, weights.arrays))
    missing = _check_arrays(folder, config, arrays)
    head = _task_head(folder, config, stored, arrays)
    used = {*repeated, *(name for tensor in tensors(config).values() for name in tensor.names)}
    if head:
        used |= {f"{TASK_HEADS[head.architecture]}.{leaf}" for leaf in ("weight", "bias")}
    unused = tuple(sorted(arrays.keys() - used))
    report = Report(weights.files, missing, unused, (*weights.converted, *notes))
    return Pretrained(config, params_from(arrays, config), vocabulary, report, head)


def save_pretrained(
    folder: str | Path, config: BertConfig, params: Params, vocabulary: WordPiece, head: TaskHead | None = None
) -> None:
    """Write a folder that transformers loads, with every array of params and of the head, bit for bit.

    The architecture it names is the task head's, or the one whose heads are there: BertForPreTraining, BertForMaskedLM,
    BertForNextSentencePrediction or BertModel. Files that are there are replaced.
    """
    folder = Path(folder)
    storage.make_folder(folder)
    architecture = head.architecture if head else _architecture(params)
    arrays = arrays_from(params, config)
    if architecture == "BertModel":
        arrays = {name.removeprefix("bert."): x for name, x in arrays.items()}
    if head:
        layer = TASK_HEADS[head.architecture]
        arrays |= {f"{layer}.weight": np.asarray(head.kernel).T, f"{layer}.bias": np.asarray(head.bias)}
    write_safetensors(folder / SAFETENSORS, arrays)
    write_vocabulary(folder, vocabulary, config.max_length)
    text = json.dumps(_their_config(config, architecture, vocabulary, head), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _read_config(path: Path, stored: Mapping[str, Any]) -> BertConfig:
    names = _architectures(path, stored)
    kind = stored.get("model_type")  # the first releases had none
    if kind not in (None, "bert") or (kind is None and not all(name.startswith("Bert") for name in names)):
        raise UserError(f"{path} describes a model of type {kind or names[0]!r}; only bert can be read")
    if "hidden_size" not in stored:
        raise UserError(f"{path} does not describe a model: it has no hidden_size; give the folder of a BERT model")
    for name, values in FIXED.items():
        if stored.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {stored[name]!r}; this model has {values[0]!r}")
    return config_from(path, stored, FIELDS, BertConfig())


def _architectures(path: Path, stored: Mapping[str, Any]) -> list[str]:
    names = stored.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: architectures is {names!r}, which is no list of names; get it again")
    return names


def _their_config(
    config: BertConfig, architecture: str, vocabulary: WordPiece, head: TaskHead | None
) -> dict[str, Any]:
    stored: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    stored |= {name: values[0] for name, values in FIXED.items() if name != "pruned_heads"}
    stored |= {"model_type": "bert", "architectures": [architecture], "pad_token_id": vocabulary.pad_id}
    stored |= {"dtype": "float32", "tie_word_embeddings": True}
    if head and architecture != "BertForMultipleChoice":
        labels = head.labels or tuple(f"LABEL_{number}" for number in range(len(head.bias)))
        stored["id2label"] = {str(number): label for number, label in enumerate(labels)}
        stored["label2id"] = {label: number for number, label in enumerate(labels)}
    return stored


def _architecture(params: Params) -> str:
    masked, next_sentence = "masked_language" in params, "next_sentence" in params
    if next_sentence:
        return "BertForPreTraining" if masked else "BertForNextSentencePrediction"
    return "BertForMaskedLM" if masked else "BertModel"


def _padding(folder: Path, config: BertConfig, vocabulary: WordPiece) -> list[str]:
    rows, pieces = config.vocab_size, vocabulary.num_tokens
    if not pieces <= rows <= pieces + MAX_PADDING:
        raise UserError(
            f"{folder}: the vocabulary has {pieces} pieces and {CONFIG} says vocab_size {rows}; they belong to "
            "different models"
        )
    return [f"the vocabulary has {pieces} pieces, the embedding {rows} rows: the last are padding"] * (rows > pieces)


def _renamed(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With today's names, and ``bert.`` before those of the encoder, as BertModel by itself does not have it."""
    prefixed = any(name.startswith("bert.") for name in arrays)
    renamed = {}
    for name, x in arrays.items():
        new = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        if not prefixed and new.startswith(("embeddings.", "encoder.", "pooler.")):
            new = f"bert.{new}"
        if new in renamed:
            raise UserError(f"{folder}: its weights hold {new} twice, once as {name}; get them again")
        renamed[new] = x
    return renamed


def _one_decoder(folder: Path, arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], set[str]]:
    """With the head's bias under its own name; and the names of what is there twice, having been found to be equal."""
    repeated = {name for name in (f"{DECODER}.weight", f"{DECODER}.bias") if name in arrays}
    if f"{DECODER}.bias" in arrays:
        arrays = {"cls.predictions.bias": arrays[f"{DECODER}.bias"], **arrays}
    for name, twin in (("weight", "bert.embeddings.word_embeddings.weight"), ("bias", "cls.predictions.bias")):
        if f"{DECODER}.{name}" in repeated and not np.array_equal(arrays[f"{DECODER}.{name}"], arrays.get(twin, 0)):
            raise UserError(
                f"{folder}: {DECODER}.{name} is not equal to {twin}; in this model the two are one, so an output layer "
                "of its own cannot be read"
            )
    return arrays, repeated


def _check_arrays(folder: Path, config: BertConfig, arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """The heads that are missing. Raises UserError if anything else is, or if a shape is wrong."""
    missing: dict[str, list[str]] = {}
    present: set[str] = set()
    for path, tensor in tensors(config).items():
        part = next((title for head, title in HEADS.items() if path.startswith(f"{head}/")), "encoder")
        for name in tensor.names:
            if name not in arrays:
                missing.setdefault(part, []).append(name)
                continue
            present.add(part)
            check_array(folder, name, arrays[name], tensor.shape)
    for part, names in missing.items():
        if part in present or part == "encoder":
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder}: the weights lack {names[0]}{more} of the {part}; give the whole of the model")
    return tuple(missing)


def _task_head(
    folder: Path, config: BertConfig, stored: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> TaskHead | None:
    named = next((name for name in _architectures(folder / CONFIG, stored) if name in TASK_HEADS), None)
    if named is None:  # the first releases did not say
        pooled = "bert.pooler.dense.weight" in arrays
        guess = "BertForSequenceClassification" if pooled else "BertForTokenClassification"
        named = "BertForQuestionAnswering" if "qa_outputs.weight" in arrays else guess
    layer = TASK_HEADS[named]
    weight, bias = arrays.get(f"{layer}.weight"), arrays.get(f"{layer}.bias")
    if weight is None or bias is None:
        return None
    num_classes = len(bias) if bias.ndim else 0
    check_array(folder, f"{layer}.weight", weight, (num_classes, config.width))
    labels = found if isinstance(found := stored.get("id2label"), dict) else {}
    names = tuple(str(labels[str(number)]) for number in range(num_classes) if str(number) in labels)
    fits = len(names) == len(labels) == num_classes
    return TaskHead(named, np.ascontiguousarray(weight.T), bias, names if fits else None)
