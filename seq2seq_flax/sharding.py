"""The parameter tables: how each parameter of an architecture is named, placed and optimised.

A token table that is the output layer as well counts as an embedding. Biases and norms of the model's width are whole
on every device: splitting a few hundred numbers would cost a collective each and save nothing.
"""

from core_flax.params import ParamRule as Rule

# fmt: off
_BLOCK = "(en|de)coder/layers/"
_ATTENTION = _BLOCK + "(self_|cross_|)attention/"

_TABLES = (
    Rule("embeddings_(token|source|target)/embedding",   "embedding", "vocab table_width"),               # VD
    Rule("embeddings_output/embedding",                  "head",      "vocab | table_width"),             # VD
)

PARAM_RULES = (
    *_TABLES,
    Rule("output_bias",                                  "bias",      "vocab_bias"),                      # V
    Rule(_ATTENTION + "(query|key|value)/kernel",        "matrix",    "layer embed | heads head_width"),  # NDHK
    Rule(_ATTENTION + "(query|key|value)/bias",          "bias",      "layer heads head_width"),          # NHK
    Rule(_ATTENTION + "out/kernel",                      "matrix",    "layer heads head_width | embed"),  # NHKD
    Rule(_BLOCK + "mlp/up/kernel",                       "matrix",    "layer embed | mlp"),               # NDF
    Rule(_BLOCK + "mlp/up/bias",                         "bias",      "layer mlp"),                       # NF
    Rule(_BLOCK + "mlp/down/kernel",                     "matrix",    "layer mlp | embed"),               # NFD
    Rule("(" + _ATTENTION + "out|" + _BLOCK + "mlp/down)/bias", "bias", "layer width"),                   # ND
    Rule(_BLOCK + "((self_|cross_|)attention|mlp)_norm/(scale|bias)", "norm", "layer width"),             # ND
)

_BLOCKS = "(en|de)coder/"
_HEADS = _BLOCKS + "(self_|cross_|)attention/"

MODERN_RULES = (
    *_TABLES,
    Rule(_HEADS + "(query|key|value)/kernel",            "matrix",    "layer embed | heads head_width"),  # NDHK
    Rule(_HEADS + "out/kernel",                          "matrix",    "layer heads head_width | embed"),  # NHKD
    Rule(_BLOCKS + "mlp/(gate|up)/kernel",               "matrix",    "layer embed | mlp"),               # NDF
    Rule(_BLOCKS + "mlp/down/kernel",                    "matrix",    "layer mlp | embed"),               # NFD
    Rule(_BLOCKS + "((self_|cross_|)attention|mlp)_norm/scale", "norm", "layer width"),                   # ND
    Rule("(en|de)coder_norm/scale",                      "norm",      "width"),                           # D
)


def _recurrent(layers: str) -> tuple[Rule, ...]:
    """The lines of LSTM layers with these names."""
    return (
        Rule(layers + "/(input|recurrent)_kernel",       "matrix",    "embed | small mlp"),               # D4F
        Rule(layers + "/bias",                           "bias",      "small mlp"),                       # 4F
    )


def _scores(attention: str) -> tuple[Rule, ...]:
    """The lines of an attention with this name."""
    return (
        Rule(attention + "/(memory|query)_kernel",       "matrix",    "embed | width"),                   # FF
        Rule(attention + "/scale",                       "bias",      "width"),                           # F
    )


_ENCODER = "encoder/layers_[0-9]+_(for|back)ward"

LSTM_SEQ2SEQ_RULES = (*_TABLES, *_recurrent(f"({_ENCODER}|decoder_[0-9]+)"))

LSTM_ATTENTION_RULES = (
    *_TABLES,
    *_recurrent(f"({_ENCODER}|decoder/layers_[0-9]+)"),
    *_scores("decoder/attention"),
    Rule("decoder/mixer_kernel",                         "matrix",    "embed | width"),                   # 2F F
)

GNMT_RULES = (
    *_TABLES,
    *_recurrent("(encoder/(bottom/layers_0_(for|back)ward|layers_[0-9]+)|bottom/lstm|decoder_[0-9]+)"),
    *_scores("bottom/attention"),
)
# fmt: on

AXIS_FIELDS = {
    "vocab": "--model.vocab-size",
    "embed": "--model.width",
    "heads": "--model.num-heads",
    "mlp": "--model.mlp-width",
}
"""The setting behind each logical axis, for messages about sizes that do not divide."""

RECURRENT_AXIS_FIELDS = {"vocab": "--model.vocab-size", "embed": "--model.width", "mlp": "--model.width"}
"""Likewise, of the recurrent architectures."""
