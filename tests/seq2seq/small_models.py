"""A small config of every architecture beside the Transformer, and parameters away from where they start."""

import jax
import numpy as np

from seq2seq_flax.config import GNMTConfig, LSTMAttentionConfig, LSTMSeq2SeqConfig, ModernConfig
from seq2seq_flax.task import init_params

_RECURRENT = {"vocab_size": 50, "num_layers": 2, "width": 16, "init_limit": 0.4}
CONFIGS = {
    "lstm_seq2seq": LSTMSeq2SeqConfig(**_RECURRENT),
    "lstm_seq2seq_both": LSTMSeq2SeqConfig(**_RECURRENT, reading="both", tied_embeddings="target"),
    "lstm_attention": LSTMAttentionConfig(**_RECURRENT),
    "lstm_attention_dot": LSTMAttentionConfig(**_RECURRENT, score="dot", reading="forward"),
    "lstm_attention_additive": LSTMAttentionConfig(
        **_RECURRENT, score="additive", input_feeding=False, reading="both", tied_embeddings="all"
    ),
    "gnmt": GNMTConfig(**_RECURRENT | {"num_layers": 4}),
    "transformer_modern": ModernConfig(vocab_size=50, num_layers=2, width=32, num_heads=4, mlp_width=24),
}


def drawn_params(model):
    """Parameters none of which is at its start, made without compiling anything."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    draw = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(draw.normal(float("norm" in str(path)), 0.25, x.shape)), shapes
    )
