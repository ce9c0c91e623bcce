"""The parameter tables of the language models: how each parameter is named, placed and optimised.

An output layer of its own is the head: a table like the embedding, placed as that is, whose rows are the outputs.
Biases and norms of the model's width are whole on every device: splitting a few hundred numbers would cost a collective
each and save nothing.
"""

from core_flax.params import ParamRule as Rule

# fmt: off
GPT2_RULES = (
    Rule("token/embedding",                           "embedding", "vocab table_width"),               # VD
    Rule("position/embedding",                        "embedding", "small table_width"),               # LD
    Rule("layers/attention/(query|key|value)/kernel", "matrix",    "layer embed | heads head_width"),  # NDHK
    Rule("layers/attention/(query|key|value)/bias",   "bias",      "layer heads head_width"),          # NHK
    Rule("layers/attention/out/kernel",               "matrix",    "layer heads head_width | embed"),  # NHKD
    Rule("layers/mlp/up/kernel",                      "matrix",    "layer embed | mlp"),               # NDF
    Rule("layers/mlp/up/bias",                        "bias",      "layer mlp"),                       # NF
    Rule("layers/mlp/down/kernel",                    "matrix",    "layer mlp | embed"),               # NFD
    Rule("layers/(attention/out|mlp/down)/bias",      "bias",      "layer width"),                     # ND
    Rule("layers/(attention|mlp)_norm/(scale|bias)",  "norm",      "layer width"),                     # ND
    Rule("norm/(scale|bias)",                         "norm",      "width"),                           # D
)

LLAMA_RULES = (
    Rule("token/embedding",                           "embedding", "vocab table_width"),                  # VD
    Rule("layers/attention/query/kernel",             "matrix",    "layer embed | heads head_width"),     # NDHK
    Rule("layers/attention/(key|value)/kernel",       "matrix",    "layer embed | kv_heads head_width"),  # NDGK
    Rule("layers/attention/out/kernel",               "matrix",    "layer heads head_width | embed"),     # NHKD
    Rule("layers/mlp/(gate|up)/kernel",               "matrix",    "layer embed | mlp"),                  # NDF
    Rule("layers/mlp/down/kernel",                    "matrix",    "layer mlp | embed"),                  # NFD
    Rule("layers/(attention|mlp)_norm/scale",         "norm",      "layer width"),                        # ND
    Rule("norm/scale",                                "norm",      "width"),                              # D
    Rule("head/embedding",                            "head",      "vocab | table_width"),                # VD
)

SPEEDRUN_RULES = (
    Rule("token/embedding",                           "embedding", "vocab table_width"),               # VD
    Rule("layers/attention/(query|key|value)/kernel", "matrix",    "layer embed | heads head_width"),  # NDHK
    Rule("layers/attention/out/kernel",               "matrix",    "layer heads head_width | embed"),  # NHKD
    Rule("layers/up/kernel",                          "matrix",    "layer embed | mlp"),               # NDF
    Rule("layers/down/kernel",                        "matrix",    "layer mlp | embed"),               # NFD
    Rule("head/embedding",                            "head",      "vocab | table_width"),             # VD
)

LSTM_RULES = (
    Rule("token/embedding",                           "embedding", "vocab table_width"),    # VD
    Rule("layers_[0-9]+/(input|recurrent)_kernel",    "matrix",    "embed | small mlp"),    # D4F
    Rule("layers_[0-9]+/bias",                        "bias",      "small mlp"),            # 4F
    Rule("head/embedding",                            "head",      "vocab | table_width"),  # VD
    Rule("head/bias",                                 "bias",      "vocab_bias"),           # V
)

CONV_RULES = (
    Rule("token/embedding",                           "embedding", "vocab table_width"),        # VD
    Rule("layers_[0-9]+/kernel",                      "matrix",    "small embed | small mlp"),  # KDGF
    Rule("layers_[0-9]+/bias",                        "bias",      "small mlp"),                # GF
    Rule("head/embedding",                            "head",      "vocab | table_width"),      # VD
    Rule("head/bias",                                 "bias",      "vocab_bias"),               # V
)

WORD2VEC_RULES = (
    Rule("token/embedding",                           "embedding", "vocab table_width"),    # VD
    Rule("head/embedding",                            "head",      "vocab | table_width"),  # VD
)
# fmt: on
"""Pattern of the path, kind, axes (core_flax.sharding.PLACEMENT says over what each is split), and the shape."""

AXIS_FIELDS = {
    "vocab": "--model.vocab-size",
    "embed": "--model.width",
    "heads": "--model.num-heads",
    "kv_heads": "--model.num-kv-heads",
    "mlp": "--model.mlp-width",
}
"""The setting that decides the size of a logical axis, for messages."""

LSTM_AXIS_FIELDS = {"vocab": "--model.vocab-size", "embed": "--model.width", "mlp": "--model.width"}
CONV_AXIS_FIELDS = {"vocab": "--model.vocab-size", "mlp": "--model.width"}
"""A convolution's inputs are --model.embedding-width or, from the second layer on, --model.width."""
