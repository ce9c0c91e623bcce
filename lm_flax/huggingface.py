"""Weights of GPT-2 and Llama in and out of Hugging Face's format: a folder with config.json and model.safetensors.

Sources: transformers' GPT2Config and LlamaConfig, and the names that GPT2LMHeadModel and LlamaForCausalLM give their
tensors. Queries and keys are turned by rotary positions in the order that transformers has, so nothing is permuted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core_flax import storage
from core_flax.types import Params, UserError
from core_flax.weight_files import SAFETENSORS, Report, config_from, read_json, read_weights, write_safetensors
from core_flax.weight_names import check_array
from lm_flax.huggingface_names import BUFFERS, EMBEDDING, HEAD, arrays_from, params_from, prefixed, tensors, theirs
from lm_flax.llama import LlamaConfig
from lm_flax.model import GPT2Config

CONFIG = "config.json"
ModelConfig = GPT2Config | LlamaConfig

GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_embd": "width",
    "n_head": "num_heads",
    "n_inner": "mlp_width",
    "n_positions": "max_length",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attention_dropout",
    "initializer_range": "init_stddev",
    "layer_norm_epsilon": "norm_epsilon",
}
"""Their names of what GPT2Config holds. The defaults are the same."""

LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "width",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_length",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied",
    "initializer_range": "init_stddev",
    "rms_norm_eps": "norm_epsilon",
}
"""Their names of what LlamaConfig holds."""

LLAMA_DEFAULTS = LlamaConfig(max_length=2048, norm_epsilon=1e-6)
"""What a config.json means that leaves something out."""

FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # the same formula
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "llama": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0,),
    },
}
"""Settings of theirs of which these models have one value."""

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class Pretrained:
    """A model to start from or to generate with. Arrays are float32 in NumPy."""

    config: ModelConfig
    params: Params
    report: Report


def load_pretrained(folder: str | Path) -> Pretrained:
    """Read the config and the weights in the folder of a GPT-2 or a Llama.

    Raises:
      UserError: a file is missing or damaged, the model is another or differs from ours in what a setting says, or
        arrays are missing or not of the shapes that config.json gives.
    """
    folder = Path(folder)
    config, notes = read_config(folder / CONFIG)
    weights = read_weights(folder)
    arrays = prefixed(weights.arrays, config)
    repeated = _check_tied(folder, config, arrays)
    named = {name: tensor.shape for tensor in tensors(config).values() for name in tensor.names}
    missing = list(dict.fromkeys(theirs(name) for name in named if name not in arrays))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        of_head = f"; {CONFIG} says that the output layer is not tied to it" if missing == [HEAD] else ""
        raise UserError(f"{folder}: the weights lack {missing[0]}{more}{of_head}; give the whole of the model")
    for name, shape in named.items():
        check_array(folder, name, arrays[name], shape)
    spare = arrays.keys() - named.keys() - repeated
    unused = tuple(sorted(name for name in spare if not BUFFERS.fullmatch(name)))
    return Pretrained(
        config, params_from(arrays, config), Report(weights.files, (), unused, (*weights.converted, *notes))
    )


def save_pretrained(
    folder: str | Path, config: ModelConfig, params: Params, start_id: int | None = None, end_id: int | None = None
) -> None:
    """Write a folder that transformers loads, with every array of params bit for bit. Files there are replaced.

    Args:
      folder: where to.
      config: the architecture.
      params: the parameters.
      start_id: the token before a text; None: none.
      end_id: the token that ends a text, at which their ``generate`` stops; None: none.
    """
    folder = Path(folder)
    storage.make_folder(folder)
    write_safetensors(folder / SAFETENSORS, arrays_from(params, config))
    # Where these are missing they take those of the published vocabularies.
    marks = {"bos_token_id": start_id, "eos_token_id": end_id}
    text = json.dumps(their_config(config) | marks, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def read_config(path: Path) -> tuple[ModelConfig, list[str]]:
    """The architecture that a config.json describes, and what is to be known of it.

    Raises:
      UserError: it is none of ours.
    """
    stored = read_json(path)
    kind = stored.get("model_type")
    if kind not in FIXED:
        raise UserError(f"{path} describes a model of type {kind!r}; {' and '.join(FIXED)} can be read")
    for name, values in FIXED[kind].items():
        if stored.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {stored[name]!r}; this model has {values[0]!r}")
    return _read_gpt2(path, stored) if kind == "gpt2" else (_read_llama(path, stored), [])


def their_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model of ours."""
    kind, fields = ("gpt2", GPT2_FIELDS) if isinstance(config, GPT2Config) else ("llama", LLAMA_FIELDS)
    stored: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in fields.items()}
    stored |= {name: values[0] for name, values in FIXED[kind].items()}
    stored |= {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "dtype": "float32"}
    if isinstance(config, GPT2Config):
        return stored | {"embd_pdrop": config.dropout}
    # rope_theta by itself is read by older releases, rope_parameters by newer ones.
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return stored | {"head_dim": config.head_width, "rope_parameters": rope}


def _read_gpt2(path: Path, stored: Mapping[str, Any]) -> tuple[GPT2Config, list[str]]:
    if stored.get("n_inner") is None:
        width = stored.get("n_embd", GPT2Config().width)
        stored = {**stored, "n_inner": 4 * width if isinstance(width, int) else width}
    config = config_from(path, stored, GPT2_FIELDS, GPT2Config())
    dropout = stored.get("embd_pdrop", config.dropout)
    if dropout == config.dropout:
        return config, []
    return config, [f"embd_pdrop is {dropout}; dropout after the embedding is that of the sublayers, {config.dropout}"]


def _read_llama(path: Path, stored: Mapping[str, Any]) -> LlamaConfig:
    # Newer releases write rope_parameters, older ones rope_theta beside rope_scaling.
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise UserError(f"{path}: rotary positions are scaled (rope_type {kind!r}), which this model cannot do")
    stored = {**stored, **{name: x for name, x in rope.items() if name == "rope_theta"}}
    if stored.get("num_key_value_heads") is None:
        stored["num_key_value_heads"] = stored.get("num_attention_heads", LLAMA_DEFAULTS.num_heads)
    config = config_from(path, stored, LLAMA_FIELDS, LLAMA_DEFAULTS)
    head_width = stored.get("head_dim")
    if head_width not in (None, config.head_width):
        raise UserError(
            f"{path}: head_dim is {head_width!r}; in this model it is hidden_size over num_attention_heads, "
            f"{config.head_width}"
        )
    return config


def _check_tied(folder: Path, config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> set[str]:
    """The output layer's name if it is there although tied, having been found to be the embedding."""
    if (isinstance(config, LlamaConfig) and not config.tied) or HEAD not in arrays:
        return set()
    embedding = EMBEDDING[type(config)]
    if not np.array_equal(arrays[HEAD], arrays.get(embedding, 0)):
        raise UserError(
            f"{folder}: {HEAD} is not equal to {embedding}, and {CONFIG} says that the two are one; they belong to "
            "different models"
        )
    return {HEAD}
