"""Every architecture by its config: the model, its parameter table, what it costs."""

from collections.abc import Mapping

import jax.numpy as jnp

from core_flax.params import ParamRule
from seq2seq_flax.config import (
    GNMTConfig,
    LSTMAttentionConfig,
    LSTMSeq2SeqConfig,
    ModelConfig,
    ModernConfig,
    TransformerConfig,
)
from seq2seq_flax.gnmt import GNMT
from seq2seq_flax.lstm_attention import LSTMAttention
from seq2seq_flax.model import Transformer
from seq2seq_flax.model import flops_per_row as transformer_flops
from seq2seq_flax.modern import ModernTransformer
from seq2seq_flax.recurrent import LSTMSeq2Seq
from seq2seq_flax.sharding import (
    AXIS_FIELDS,
    GNMT_RULES,
    LSTM_ATTENTION_RULES,
    LSTM_SEQ2SEQ_RULES,
    MODERN_RULES,
    PARAM_RULES,
    RECURRENT_AXIS_FIELDS,
)

Model = Transformer | ModernTransformer | LSTMSeq2Seq | LSTMAttention | GNMT


def make_model(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> Model:
    """The model that a config describes; ``dtype`` is that of the computation."""
    match config:
        case TransformerConfig():
            return Transformer(config, dtype)
        case ModernConfig():
            return ModernTransformer(config, dtype)
        case LSTMSeq2SeqConfig():
            return LSTMSeq2Seq(config, dtype)
        case LSTMAttentionConfig():
            return LSTMAttention(config, dtype)
        case GNMTConfig():
            return GNMT(config, dtype)


def param_rules(config: ModelConfig) -> tuple[ParamRule, ...]:
    """The parameter table of the model that a config describes."""
    match config:
        case TransformerConfig():
            return PARAM_RULES
        case ModernConfig():
            return MODERN_RULES
        case LSTMSeq2SeqConfig():
            return LSTM_SEQ2SEQ_RULES
        case LSTMAttentionConfig():
            return LSTM_ATTENTION_RULES
        case GNMTConfig():
            return GNMT_RULES


def axis_fields(config: ModelConfig) -> Mapping[str, str]:
    """The setting behind each logical axis, for messages about sizes that do not divide."""
    return AXIS_FIELDS if is_transformer(config) else RECURRENT_AXIS_FIELDS


def is_transformer(config: ModelConfig) -> bool:
    """Whether it reads all of a row at once, rather than along it."""
    return isinstance(config, TransformerConfig | ModernConfig)


def flops_per_row(config: ModelConfig, source_length: int, target_length: int) -> float:
    """Operations of one row, forward and backward: six for each weight that a position meets.

    Counted are the matrix products alone, with attention over whole rows, causal or not.
    """
    if isinstance(config, TransformerConfig):
        return transformer_flops(config, source_length, target_length)
    source, target, attention = _products(config)
    output = config.width * config.vocab_size
    return 6.0 * (
        source_length * (source + attention[0] * source_length)
        + target_length * (target + output + attention[1] * source_length + attention[2] * target_length)
    )


def _products(
    config: ModernConfig | LSTMSeq2SeqConfig | LSTMAttentionConfig | GNMTConfig,
) -> tuple[float, float, tuple[int, int, int]]:
    """Multiplications for each token of the source and of the target, and for each pair of tokens in attention: of the
    source with itself, of target with source, of the target with itself; output layer aside."""
    layers, width = config.num_layers, config.width
    square = width * width
    lstm = 8 * square  # four gates, each from an input and a state of this width
    match config:
        case ModernConfig():
            mlp, pair = 3 * width * config.mlp_width, 2 * width * layers
            return layers * (6 * square + mlp), layers * (6 * square + mlp), (pair, pair, pair)
        case LSTMSeq2SeqConfig():
            # Halves in both directions have half as wide states, each as often.
            own = 6 * square if config.reading == "both" else lstm
            return layers * own, layers * lstm, (0, 0, 0)
        case LSTMAttentionConfig():
            own = 6 * square if config.reading == "both" else lstm
            target = layers * lstm + (4 * square if config.input_feeding else 0) + 2 * square
            target += square if config.score == "additive" else 0
            keys = 0 if config.score == "dot" else square
            return layers * own + keys, target, (0, 2 * width, 0)
        case GNMTConfig():
            # The first layer has the width in both directions, the second reads both.
            source = 2 * lstm + 12 * square + (layers - 2) * lstm + square
            return source, layers * 12 * square + square, (0, 2 * width, 0)
