"""Folders in Hugging Face's format that are not what they should be, and what is said of them."""

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny_models import CONFIGS, random_params

from core_flax.types import UserError
from lm_flax.huggingface import load_pretrained, save_pretrained


def edited(folder, about=None, arrays=None):
    """The folder with changes to its config.json and to its arrays."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | (about or {})))
    save_file(load_file(weights) | (arrays or {}), weights)
    return folder


@pytest.fixture
def gpt2(tmp_path):
    save_pretrained(tmp_path / "gpt2", CONFIGS["gpt2"], random_params(CONFIGS["gpt2"]))
    return tmp_path / "gpt2"


@pytest.fixture
def llama(tmp_path):
    save_pretrained(tmp_path / "llama", CONFIGS["llama"], random_params(CONFIGS["llama"]))
    return tmp_path / "llama"


@pytest.fixture
def tied(tmp_path):
    config = CONFIGS["llama_grouped_tied"]
    save_pretrained(tmp_path / "tied", config, random_params(config))
    return tmp_path / "tied"


def refusal(folder):
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"model_type": "gpt_neox"}, "describes a model of type 'gpt_neox'; gpt2 and llama can be read"),
        ({"model_type": None}, "describes a model of type None"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; this model has 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; this model has False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; this model has True"),
        ({"n_head": 5}, "describes no model that can be built (--model.num-heads 5 does not divide --model.width 32)"),
        ({"n_layer": "3"}, "n_layer is '3', which is no whole number"),
        (
            {"n_inner": 64},
            "mlp.c_proj.weight is float32[48, 32] in the weights, and config.json asks for float32[64,",
        ),
        ({"n_layer": 4}, "the weights lack transformer.h.3.attn.c_attn.bias and 11 more; give the whole of the model"),
    ],
)
def test_other_models_than_gpt2(gpt2, about, message):
    assert message in refusal(edited(gpt2, about))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"model_type": "mistral"}, "describes a model of type 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model has 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; this model has False"),
        ({"head_dim": 16}, "head_dim is 16; in this model it is hidden_size over num_attention_heads, 8"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rotary positions are scaled (rope_type 'llama3'), which this model cannot do",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "(rope_type 'linear')"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', which is neither true nor false"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not equal to model.embed_tokens.weight"),
        ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight is float32[32, 32] in the weights"),
    ],
)
def test_other_models_than_llama(llama, about, message):
    assert message in refusal(edited(llama, about))


def test_an_untied_model_without_output_layer(tied):
    found = refusal(edited(tied, {"tie_word_embeddings": False}))
    assert "the weights lack lm_head.weight; config.json says that the output layer is not tied to it" in found


def test_a_fused_array_of_another_shape(gpt2):
    found = refusal(edited(gpt2, arrays={"transformer.h.1.attn.c_attn.weight": np.zeros((32, 95), np.float32)}))
    assert "transformer.h.1.attn.c_attn" in found and "they belong to different models" in found


def test_what_is_there_besides(gpt2, llama):
    """Buffers of older files are nothing to speak of; other arrays are, and dropout that there are not two of."""
    mask = np.tri(16, dtype=np.float32)[None, None]
    extra = {"transformer.h.0.attn.bias": mask, "transformer.h.2.attn.masked_bias": np.float32([-1e4])}
    found = load_pretrained(edited(gpt2, {"embd_pdrop": 0.25}, {**extra, "score.weight": mask[0]}))
    assert found.report.lines() == [
        "read: model.safetensors",
        "unused: score.weight",
        "embd_pdrop is 0.25; dropout after the embedding is that of the sublayers, 0.0",
    ]
    assert found.config == CONFIGS["gpt2"]
    found = load_pretrained(edited(llama, arrays={"model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(4)}))
    assert not found.report.unused


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name):
    params = random_params(CONFIGS[name])
    save_pretrained(tmp_path, CONFIGS[name], params)
    found = load_pretrained(tmp_path)
    assert found.config == CONFIGS[name] and found.report.lines() == ["read: model.safetensors"]
    expected = flatten_dict(params)
    assert flatten_dict(found.params).keys() == expected.keys()
    for path, x in flatten_dict(found.params).items():
        np.testing.assert_array_equal(x, expected[path], strict=True)
