"""The Transformer's weights in and out of Hugging Face's format for Marian: config.json, model.safetensors, vocabulary.

Source: transformers' MarianConfig, and the names that its MarianMTModel gives its tensors. Marian's Transformer is the
published one (post-norm, sinusoidal positions, sines before cosines) with settings that TransformerConfig has as well;
targets begin with padding.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core_flax import storage
from core_flax.text.sentencepiece_model import SentencePiece
from core_flax.types import Params, UserError
from core_flax.weight_files import SAFETENSORS, Report, config_from, read_json, read_weights, write_safetensors
from core_flax.weight_names import check_array
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.huggingface_names import BIAS, DECODER, ENCODER, TIED, arrays_from, params_from, tensors
from seq2seq_flax.huggingface_vocabulary import END, SETTINGS, UNKNOWN, VOCAB, MarianVocabulary
from seq2seq_flax.model import positions_of

CONFIG, GENERATION = "config.json", "generation_config.json"
FIELDS = {
    "vocab_size": "vocab_size",
    "encoder_layers": "num_layers",
    "d_model": "width",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "mlp_width",
    "scale_embedding": "scale_embeddings",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
}
"""Their names of what TransformerConfig holds."""

DEFAULTS = TransformerConfig(
    vocab_size=58101,
    num_layers=12,
    width=1024,
    num_heads=16,
    mlp_width=4096,
    scale_embeddings=False,
    activation="gelu",
)
"""What a config.json means that leaves something out."""

EQUAL = {
    "decoder_layers": "encoder_layers",
    "decoder_attention_heads": "encoder_attention_heads",
    "decoder_ffn_dim": "encoder_ffn_dim",
    "decoder_vocab_size": "vocab_size",
}
"""Settings of theirs of the decoder that are the encoder's in this model."""

FIXED: dict[str, Any] = {
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "static_position_embeddings": True,
    "normalize_before": False,
    "normalize_embedding": False,
    "add_final_layer_norm": False,
    "add_bias_logits": False,
}
"""Settings of theirs of which this model has one value; newer files have the first two alone."""

ACTIVATIONS = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu"}
TYING = {(True, True): "all", (False, True): "target", (False, False): "none"}
"""By their (share_encoder_decoder_embeddings, tie_word_embeddings)."""

NORM_EPSILON = 1e-5
POSITIONS = tuple(f"{side}embed_positions.weight" for side in (ENCODER, DECODER))
MAX_PADDING = 127
"""Rows of the embedding that may lie beyond the vocabulary; more tell of a vocabulary of another model."""
LEAST_LENGTH = 8
MAX_LENGTH = 1024
"""Where nothing else is said: of a sentence, and of the position table."""


@dataclass(frozen=True)
class Pretrained:
    """A model to translate with. Arrays are float32 in NumPy.

    Attributes:
      config: the architecture: a TransformerConfig of Marian's, that of any of ours of a run.
      params: its parameters.
      tokenizer: Marian's of a model that was taken in, SentencePiece's of a run of ours.
      report: what came of reading it.
      max_length: tokens of a sentence that the model is to take.
      num_positions: rows of the position table that transformers makes, at least as many; ours needs none.
    """

    config: Any
    params: Params
    tokenizer: MarianVocabulary | SentencePiece
    report: Report
    max_length: int = MAX_LENGTH
    num_positions: int = MAX_LENGTH


def load_pretrained(folder: str | Path) -> Pretrained:
    """Read the folder of a MarianMTModel.

    Raises:
      UserError: a file is missing or damaged, the model is another or differs from ours in what a setting says, or
        arrays are missing or not of the shapes that config.json gives.
    """
    folder = Path(folder)
    stored = read_json(folder / CONFIG)
    config = _read_config(folder / CONFIG, stored)
    tokenizer, notes = _read_vocabulary(folder, stored, config.vocab_size)
    weights = read_weights(folder)
    arrays, repeated = _one_table(folder, weights.arrays, config)
    _check_positions(folder, arrays, config)
    if BIAS in arrays:
        check_array(folder, BIAS, arrays[BIAS], (1, config.vocab_size))
        # One of zeros, of whatever sign, adds nothing; the exact file is kept for what is not zero.
        config = dataclasses.replace(config, output_bias=bool(arrays[BIAS].view(np.uint32).any()))
    named = {name: tensor.shape for tensor in tensors(config).values() for name in tensor.names}
    missing = [name for name in named if name not in arrays]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: the weights lack {missing[0]}{more}; give the whole of the model")
    for name, shape in named.items():
        check_array(folder, name, arrays[name], shape)
    unused = tuple(sorted(arrays.keys() - named.keys() - repeated - {BIAS, *POSITIONS}))
    report = Report(weights.files, (), unused, (*weights.converted, *notes))
    return Pretrained(config, params_from(arrays, config), tokenizer, report, *_read_lengths(folder, stored))


def save_pretrained(
    folder: str | Path,
    config: TransformerConfig,
    params: Params,
    tokenizer: MarianVocabulary | SentencePiece,
    max_length: int = MAX_LENGTH,
    num_positions: int = MAX_LENGTH,
) -> None:
    """Write a folder that transformers loads, with every array of params bit for bit. Files there are replaced.

    Raises:
      UserError: the model is none of Marian's architecture.
    """
    check_exportable(config)
    folder = Path(folder)
    storage.make_folder(folder)
    if isinstance(tokenizer, SentencePiece):
        vocabulary = MarianVocabulary.of(tokenizer)
        # Rows beyond it stand for nothing: here they are never generated, and there they would be.
        params, config = _cut_tables(params, tokenizer.num_tokens), _with_size(config, tokenizer.num_tokens)
    else:
        vocabulary = tokenizer
    write_safetensors(folder / SAFETENSORS, arrays_from(params, config))
    vocabulary.save(folder)
    num_positions = max(num_positions, max_length)
    for name, content in (
        (CONFIG, _their_config(config, vocabulary, num_positions)),
        (GENERATION, _their_generation(vocabulary, config.vocab_size, num_positions)),
        (SETTINGS, _their_tokenizer(vocabulary, max_length)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cut_tables(params: Params, num_tokens: int) -> Params:
    """The parameters with so many rows in every table, and in the bias of the scores."""

    def cut(path: tuple[Any, ...], x: Any) -> Any:
        return x[:num_tokens] if path[-1].key in ("embedding", "output_bias") else x

    return jax.tree_util.tree_map_with_path(cut, params)


def _with_size(config: TransformerConfig, num_tokens: int) -> TransformerConfig:
    return dataclasses.replace(config, vocab_size=num_tokens)


def check_exportable(config: Any) -> None:
    """Raises UserError if transformers' Marian cannot be what this config describes."""
    if not isinstance(config, TransformerConfig):
        raise UserError(
            f"a model of {type(config).__name__} has no counterpart in Marian; only Transformers can be written"
        )
    if config.norm_epsilon != NORM_EPSILON:
        raise UserError(
            f"model.norm_epsilon is {config.norm_epsilon}; Marian's is {NORM_EPSILON}, so the model cannot be written"
        )


def _read_config(path: Path, stored: Mapping[str, Any]) -> TransformerConfig:
    if stored.get("model_type") != "marian":
        raise UserError(f"{path} describes a model of type {stored.get('model_type')!r}; only marian can be read")
    for name, value in FIXED.items():
        if stored.get(name, value) != value:
            raise UserError(f"{path}: {name} is {stored[name]!r}; this model has {value!r}")
    for of_decoder, of_encoder in EQUAL.items():
        default = getattr(DEFAULTS, FIELDS[of_encoder])
        expected, found = stored.get(of_encoder, default), stored.get(of_decoder, default)
        if of_decoder == "decoder_vocab_size":
            found = stored.get(of_decoder) or expected
        if found != expected:
            raise UserError(
                f"{path}: {of_decoder} is {found!r} and {of_encoder} {expected!r}; in this model the two are one"
            )
    activation = stored.get("activation_function", DEFAULTS.activation)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{path}: activation_function is {activation!r}; this model has {', '.join(ACTIVATIONS)}")
    names = ("share_encoder_decoder_embeddings", "tie_word_embeddings")
    tying = tuple(stored.get(name, True) for name in names)
    if any(type(each) is not bool for each in tying) or tying not in TYING:
        raise UserError(f"{path}: {names[0]} is {tying[0]!r} and {names[1]} {tying[1]!r}; this model cannot be both")
    defaults = dataclasses.replace(DEFAULTS, activation=ACTIVATIONS[activation], tied_embeddings=TYING[tying])
    return config_from(path, stored, FIELDS, defaults)


def _read_lengths(folder: Path, stored: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens that a sentence may have, positions): as many, or fewer if the tokenizer says so."""
    positions = stored.get("max_position_embeddings", MAX_LENGTH)
    if type(positions) is not int or positions < LEAST_LENGTH:
        raise UserError(
            f"{folder / CONFIG}: max_position_embeddings is {positions!r}; it must be a whole number, {LEAST_LENGTH} "
            "or more"
        )
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    told = settings.get("model_max_length")  # where nobody has said, it is a huge number, or none
    return (min(positions, told) if type(told) is int and told >= LEAST_LENGTH else positions), positions


def _read_vocabulary(folder: Path, stored: Mapping[str, Any], num_rows: int) -> tuple[MarianVocabulary, list[str]]:
    path = folder / CONFIG
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    if settings.get("separate_vocabs", False):
        raise UserError(
            f"{folder / SETTINGS}: separate_vocabs is true; in this model both languages share a vocabulary"
        )
    pad, end = stored.get("pad_token_id", 58100), stored.get("eos_token_id", 0)
    start = stored.get("decoder_start_token_id", 58100)
    if type(start) is not int or start != pad:
        raise UserError(
            f"{path}: decoder_start_token_id is {start!r} and pad_token_id {pad!r}; Marian has one for both"
        )
    vocabulary = MarianVocabulary.load(folder, start)
    if end != vocabulary.eos_id:
        raise UserError(f"{path}: eos_token_id is {end!r}; {VOCAB} has {END} at {vocabulary.eos_id}")
    pieces = vocabulary.num_tokens
    if not pieces <= num_rows <= pieces + MAX_PADDING:
        raise UserError(
            f"{folder}: {VOCAB} has {pieces} pieces and {CONFIG} says vocab_size {num_rows}; they belong to different "
            "models"
        )
    notes = [f"the vocabulary has {pieces} pieces, the embedding {num_rows} rows: the last are padding"]
    return vocabulary, notes * (num_rows > pieces)


def _one_table(
    folder: Path, arrays: dict[str, np.ndarray], config: TransformerConfig
) -> tuple[dict[str, np.ndarray], set[str]]:
    """With tied embeddings under their first name; and their other names, the arrays having been found to be equal."""
    tied = [f"{module}.weight" for module in TIED[config.tied_embeddings]]
    there = [name for name in tied if name in arrays]
    if not there:
        return arrays, set()
    for name in there[1:]:
        if not np.array_equal(arrays[name], arrays[there[0]]):
            raise UserError(
                f"{folder}: {name} is not equal to {there[0]}, and {CONFIG} says that the two are one; they belong to "
                "different models"
            )
    return {**arrays, tied[0]: arrays[there[0]]}, set(tied[1:])


def _check_positions(folder: Path, arrays: Mapping[str, np.ndarray], config: TransformerConfig) -> None:
    """Older files hold the positions, which are computed here: they must be the same, but for float16's rounding."""
    for name in POSITIONS:
        if name not in arrays:
            continue
        expected = np.asarray(positions_of(np.arange(len(arrays[name])), config.width))
        if arrays[name].shape != expected.shape or not np.allclose(arrays[name], expected, atol=1e-3):
            raise UserError(f"{folder}: {name} does not hold sinusoidal positions; this model has no others")


def _their_config(config: TransformerConfig, vocabulary: MarianVocabulary, max_length: int) -> dict[str, Any]:
    stored: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    stored |= {of_decoder: stored[of_encoder] for of_decoder, of_encoder in EQUAL.items()}
    shared, tied = next(flags for flags, name in TYING.items() if name == config.tied_embeddings)
    stored |= FIXED | {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "dtype": "float32",
        "is_encoder_decoder": True,
        "activation_function": config.activation,
        "share_encoder_decoder_embeddings": shared,
        "tie_word_embeddings": tied,
        "max_position_embeddings": max_length,
        "bos_token_id": None,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.bos_id,
        "decoder_start_token_id": vocabulary.bos_id,
        "forced_eos_token_id": None,
    }
    return stored


def _their_generation(vocabulary: MarianVocabulary, num_rows: int, max_length: int) -> dict[str, Any]:
    never = [vocabulary.bos_id, *vocabulary.languages.values(), *range(vocabulary.num_tokens, num_rows)]
    return {
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.bos_id,
        "decoder_start_token_id": vocabulary.bos_id,
        "bad_words_ids": [[number] for number in never if number != vocabulary.eos_id],
        "max_length": max_length,
    }


def _their_tokenizer(vocabulary: MarianVocabulary, max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "MarianTokenizer",
        "eos_token": END,
        "unk_token": UNKNOWN,
        "pad_token": vocabulary.bos,
        "model_max_length": max_length,
        "separate_vocabs": False,
    }
