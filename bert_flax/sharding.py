"""The parameter table of BERT, in pretraining and with a task's head: how each is named, placed and optimised.

Kinds: the pooler and the masked-language transform map hidden states to hidden states, so they are matrices like those
of the layers; the next-sentence kernel maps to two outputs, so it is a head. Biases and norms of the model's width are
whole on every device: splitting a few hundred numbers would cost a collective each and save nothing.
"""

from core_flax.params import ParamRule as Rule

# fmt: off
PARAM_RULES = (
    Rule("encoder/embeddings/token/embedding",                "embedding", "vocab table_width"),               # VD
    Rule("encoder/embeddings/(position|segment)/embedding",   "embedding", "small table_width"),               # LD, 2D
    Rule("encoder/embeddings/norm/(scale|bias)",              "norm",      "width"),                           # D
    Rule("encoder/layers/attention/(query|key|value)/kernel", "matrix",    "layer embed | heads head_width"),  # NDHK
    Rule("encoder/layers/attention/(query|key|value)/bias",   "bias",      "layer heads head_width"),          # NHK
    Rule("encoder/layers/attention/out/kernel",               "matrix",    "layer heads head_width | embed"),  # NHKD
    Rule("encoder/layers/mlp/up/kernel",                      "matrix",    "layer embed | mlp"),               # NDF
    Rule("encoder/layers/mlp/up/bias",                        "bias",      "layer mlp"),                       # NF
    Rule("encoder/layers/mlp/down/kernel",                    "matrix",    "layer mlp | embed"),               # NFD
    Rule("encoder/layers/(attention/out|mlp/down)/bias",      "bias",      "layer width"),                     # ND
    Rule("encoder/layers/(attention|mlp)_norm/(scale|bias)",  "norm",      "layer width"),                     # ND
    Rule("(encoder/pooler|masked_language/transform)/kernel", "matrix",    "embed | width"),                   # DD
    Rule("(encoder/pooler|masked_language/transform)/bias",   "bias",      "width"),                           # D
    Rule("masked_language/norm/(scale|bias)",                 "norm",      "width"),                           # D
    Rule("masked_language/bias",                              "bias",      "vocab_bias"),                      # V
    Rule("next_sentence/kernel",                              "head",      "embed | small"),                   # D2
    Rule("next_sentence/bias",                                "bias",      "small"),                           # 2
    Rule("head/kernel",                                       "head",      "embed | small"),                   # DC
    Rule("head/bias",                                         "bias",      "small"),                           # C
)
# fmt: on
"""Pattern of the path, kind, axes (core_flax.sharding.PLACEMENT says over what each is split), and the shape."""

AXIS_FIELDS = {
    "vocab": "--model.vocab-size",
    "embed": "--model.width",
    "heads": "--model.num-heads",
    "mlp": "--model.mlp-width",
}
"""The setting that decides the size of a logical axis, for messages."""
