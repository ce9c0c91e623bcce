"""The parameter table of the Transformer: how each is named, placed and optimised.

A token table that is the output layer as well counts as an embedding. Biases and norms of the model's width are whole
on every device: splitting a few hundred numbers would cost a collective each and save nothing.
"""

from core_flax.params import ParamRule as Rule

# fmt: off
_BLOCK = "(en|de)coder/layers/"
_ATTENTION = _BLOCK + "(self_|cross_|)attention/"

PARAM_RULES = (
    Rule("embeddings_(token|source|target)/embedding",   "embedding", "vocab table_width"),               # VD
    Rule("embeddings_output/embedding",                  "head",      "vocab table_width"),               # VD
    Rule("output_bias",                                  "bias",      "vocab"),                           # V
    Rule(_ATTENTION + "(query|key|value)/kernel",        "matrix",    "layer embed | heads head_width"),  # NDHK
    Rule(_ATTENTION + "(query|key|value)/bias",          "bias",      "layer heads head_width"),          # NHK
    Rule(_ATTENTION + "out/kernel",                      "matrix",    "layer heads head_width | embed"),  # NHKD
    Rule(_BLOCK + "mlp/up/kernel",                       "matrix",    "layer embed | mlp"),               # NDF
    Rule(_BLOCK + "mlp/up/bias",                         "bias",      "layer mlp"),                       # NF
    Rule(_BLOCK + "mlp/down/kernel",                     "matrix",    "layer mlp | embed"),               # NFD
    Rule("(" + _ATTENTION + "out|" + _BLOCK + "mlp/down)/bias", "bias", "layer width"),                   # ND
    Rule(_BLOCK + "((self_|cross_|)attention|mlp)_norm/(scale|bias)", "norm", "layer width"),             # ND
)
# fmt: on

AXIS_FIELDS = {
    "vocab": "--model.vocab-size",
    "embed": "--model.width",
    "heads": "--model.num-heads",
    "mlp": "--model.mlp-width",
}
"""The setting behind each logical axis, for messages about sizes that do not divide."""
