"""Our parameters and the tensors of transformers' GPT2LMHeadModel and LlamaForCausalLM.

GPT-2's linear layers hold weights as ours do, [inputs, outputs], and queries, keys and values in one array; here that
counts as three, whose names are ours to give.
"""

import functools
import re
from collections.abc import Mapping

import jax
import numpy as np

from core_flax import weight_names
from core_flax.types import Params
from core_flax.weight_names import Tensor
from lm_flax.llama import Llama, LlamaConfig
from lm_flax.model import GPT2, GPT2Config
from lm_flax.sharding import GPT2_RULES, LLAMA_RULES

GPT2_MODULES = {
    "token": "transformer.wte",
    "position": "transformer.wpe",
    "layers/attention_norm": "transformer.h.*.ln_1",
    "layers/attention/query": "transformer.h.*.attn.c_attn.query",
    "layers/attention/key": "transformer.h.*.attn.c_attn.key",
    "layers/attention/value": "transformer.h.*.attn.c_attn.value",
    "layers/attention/out": "transformer.h.*.attn.c_proj",
    "layers/mlp_norm": "transformer.h.*.ln_2",
    "layers/mlp/up": "transformer.h.*.mlp.c_fc",
    "layers/mlp/down": "transformer.h.*.mlp.c_proj",
    "norm": "transformer.ln_f",
}
LLAMA_MODULES = {
    "token": "model.embed_tokens",
    "layers/attention_norm": "model.layers.*.input_layernorm",
    "layers/attention/query": "model.layers.*.self_attn.q_proj",
    "layers/attention/key": "model.layers.*.self_attn.k_proj",
    "layers/attention/value": "model.layers.*.self_attn.v_proj",
    "layers/attention/out": "model.layers.*.self_attn.o_proj",
    "layers/mlp_norm": "model.layers.*.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.*.mlp.gate_proj",
    "layers/mlp/up": "model.layers.*.mlp.up_proj",
    "layers/mlp/down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""Our modules and theirs; * is the number of the layer."""

EMBEDDING = {GPT2Config: "transformer.wte.weight", LlamaConfig: "model.embed_tokens.weight"}
HEAD = "lm_head.weight"

BUFFERS = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
"""Arrays in older files that hold nothing learned: masks and angles."""

PARTS = ("query", "key", "value")
FUSED = re.compile(r"(transformer\.h\.\d+\.attn\.c_attn)\.(query|key|value)\.(weight|bias)")


@functools.cache
def tensors(config: GPT2Config | LlamaConfig) -> dict[str, Tensor]:
    """All that a model has, by the path of our parameter, in the order of our tree."""
    ids = jax.ShapeDtypeStruct((1, 1), "int32")
    if isinstance(config, GPT2Config):
        tree = jax.eval_shape(GPT2(config).init, jax.random.key(0), ids)["params"]
        return weight_names.tensors_of(tree, GPT2_MODULES, GPT2_RULES, outputs_first=False)
    tree = jax.eval_shape(Llama(config).init, jax.random.key(0), ids)["params"]
    return weight_names.tensors_of(tree, LLAMA_MODULES, LLAMA_RULES)


def theirs(name: str) -> str:
    """The array in the files that holds a tensor of this name."""
    return FUSED.sub(r"\1.\3", name)


def prefixed(arrays: Mapping[str, np.ndarray], config: GPT2Config | LlamaConfig) -> dict[str, np.ndarray]:
    """With GPT-2's queries, keys and values apart, and the prefix that the bare model and the first releases lack."""
    prefix = "transformer." if isinstance(config, GPT2Config) else "model."
    if not any(name.startswith(prefix) for name in arrays):
        arrays = {name if name == HEAD else prefix + name: x for name, x in arrays.items()}
    apart = {}
    for name, x in arrays.items():
        fused = re.fullmatch(r"(transformer\.h\.\d+\.attn\.c_attn)\.(weight|bias)", name)
        if fused and x.ndim:
            each = np.array_split(x, 3, axis=-1)
            apart |= {f"{fused[1]}.{part}.{fused[2]}": y for part, y in zip(PARTS, each, strict=True)}
        else:
            apart[name] = x
    return apart


def params_from(arrays: Mapping[str, np.ndarray], config: GPT2Config | LlamaConfig) -> Params:
    """Our tree of theirs by name (``prefixed``), be they weights or gradients."""
    return weight_names.params_from(arrays, tensors(config))


def arrays_from(params: Params, config: GPT2Config | LlamaConfig) -> dict[str, np.ndarray]:
    """Their arrays by their names, of all parameters."""
    arrays = weight_names.arrays_from(params, tensors(config))
    for name in [name for name in arrays if theirs(name) != name and ".query." in name]:
        parts = [arrays.pop(name.replace(".query.", f".{part}.")) for part in PARTS]
        arrays[theirs(name)] = np.concatenate(parts, axis=-1)
    return arrays
