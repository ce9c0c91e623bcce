"""GPT-2 and Llama against transformers in torch: forward, every gradient, greedy text, files both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from core_flax.losses import vocabulary_sums
from lm_flax.huggingface import GPT2_FIELDS, LLAMA_FIELDS, load_pretrained, read_config, save_pretrained
from lm_flax.huggingface_names import params_from, prefixed
from lm_flax.llama import Llama
from lm_flax.model import GPT2, GPT2Config

torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [parity] is not installed")
pytestmark = pytest.mark.parity

B, L, V = 3, 12, 61
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}


def gpt2(**changes):
    sizes = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 80}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes))


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes))


MODELS = {
    "gpt2": gpt2,
    "gpt2 narrow": lambda: gpt2(n_inner=40, layer_norm_epsilon=1e-3),
    "llama": llama,
    "llama grouped": lambda: llama(num_key_value_heads=2, rms_norm_eps=1e-3),
    "llama grouped tied": lambda: llama(
        num_key_value_heads=1, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 300.0}
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def reference(request):
    model = MODELS[request.param]().eval()
    torch.manual_seed(0)
    with torch.no_grad():  # every bias and norm away from its start, and attention away from uniform
        for name, x in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            x.copy_(0.3 * torch.randn(x.shape) + (1.0 if is_norm and name.endswith("weight") else 0.0))
    return model


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load_pretrained(folder)


def model_of(config):
    return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


def tokens(*shape):
    return np.random.default_rng(0).integers(0, V, shape)


def assert_equal_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name], strict=True, err_msg=name)


def test_forward(reference, ours):
    tokens_BL = tokens(B, L)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens_BL)).logits
    model = model_of(ours.config)
    x_BLD = jax.jit(model.apply)({"params": ours.params}, tokens_BL)
    logits_BLV = model.apply({"params": ours.params}, x_BLD, method="logits")
    np.testing.assert_allclose(logits_BLV, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.3  # had they been near zero, 1e-4 would have said nothing


def test_every_gradient(reference, ours):
    """Of the mean loss; relative to each gradient's size."""
    tokens_BL = tokens(B, L)
    reference.zero_grad()
    theirs = torch.tensor(tokens_BL)
    loss = reference(theirs, labels=theirs).loss  # they shift the labels
    loss.backward()
    grads = {name: x.grad.numpy() for name, x in reference.named_parameters()}
    expected = flatten_dict(params_from(prefixed(grads, ours.config), ours.config), sep="/")

    model, labels_BL = model_of(ours.config), np.roll(tokens_BL, -1, axis=1)
    weights_BL = np.broadcast_to(np.arange(L) < L - 1, (B, L)) / np.float32(B * (L - 1))

    def ours_loss(params):
        x_BLD = model.apply({"params": params}, tokens_BL)
        table_VD = model.output_table(params)
        return vocabulary_sums(x_BLD, table_VD, jnp.asarray(labels_BL), jnp.asarray(weights_BL), num_chunks=3).loss

    value, found = jax.jit(jax.value_and_grad(ours_loss))(jax.tree.map(jnp.asarray, ours.params))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    found = flatten_dict(found, sep="/")
    assert found.keys() == expected.keys()
    for path, x in found.items():
        for layer in range(ours.config.num_layers) if path.startswith("layers/") else (...,):
            size, error = np.linalg.norm(expected[path][layer]), np.linalg.norm(x[layer] - expected[path][layer])
            if path == "layers/attention/key/bias":
                # Softmax does not see what all keys share, so the true gradient is zero and both compute rounding
                # errors: compare with a bias whose gradient is not.
                size = np.linalg.norm(expected[path.replace("key", "query")][layer])
            assert error <= 1e-4 * size, f"{path} [{layer}]: relative error {error / size:.1e}"


def test_greedy_text_is_the_same_for_64_tokens(reference, ours):
    prompt_BL = tokens(4, 5)
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones(prompt_BL.shape, dtype=torch.long)
    expected = reference.generate(torch.tensor(prompt_BL), attention_mask=mask, **options)[:, 5:]
    model = model_of(ours.config)

    @jax.jit
    def extend(params, tokens_BL, cache):
        x_BLD, cache = model.apply({"params": params}, tokens_BL, cache, method="extend")
        return model.apply({"params": params}, x_BLD[:, -1], method="logits").argmax(-1)[:, None], cache

    token_B1, cache = extend(ours.params, prompt_BL, model.init_cache(4, 69))
    found = [token_B1]
    for _ in range(63):
        token_B1, cache = extend(ours.params, found[-1], cache)
        found.append(token_B1)
    np.testing.assert_array_equal(np.concatenate(found, 1), expected)
    assert len(np.unique(expected)) > 5


def test_there_and_back(reference, folder, ours, tmp_path):
    """Every bit, and a config from which transformers builds the same model."""
    assert ours.report.lines() == ["read: model.safetensors"]
    save_pretrained(tmp_path, ours.config, ours.params)
    assert_equal_arrays(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    loaded, info = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = {name: x.numpy() for name, x in reference.state_dict().items()}
    assert_equal_arrays({name: x.numpy() for name, x in loaded.state_dict().items()}, expected)
    tokens_BL = torch.tensor(tokens(B, L))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(tokens_BL).logits, reference(tokens_BL).logits, rtol=0, atol=0)
    again = load_pretrained(tmp_path)
    assert again.config == ours.config
    assert_equal_arrays(flatten_dict(again.params), flatten_dict(ours.params))


def test_shards_bare_models_and_repeated_output_layers(reference, ours, tmp_path):
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards/model.safetensors.index.json").exists()
    shards = load_pretrained(tmp_path / "shards")
    assert len(shards.report.files) > 1
    assert_equal_arrays(flatten_dict(shards.params), flatten_dict(ours.params))

    state = reference.state_dict()  # repeats the tied output layer
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((tmp_path / "shards/config.json").read_text())
    assert_equal_arrays(flatten_dict(load_pretrained(tmp_path).params), flatten_dict(ours.params))
    bare = {name.removeprefix("transformer.").removeprefix("model."): x for name, x in state.items()}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    assert_equal_arrays(flatten_dict(load_pretrained(tmp_path).params), flatten_dict(ours.params))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"rope_theta": 300.0}])
def test_config_of_older_releases(changes, tmp_path):
    """rope_theta by itself, no num_key_value_heads where each head has its own, no head_dim."""
    stored = {"model_type": "llama", "rope_scaling": None, "rope_theta": 500.0} | LLAMA | changes
    (tmp_path / "config.json").write_text(json.dumps(stored))
    expected = transformers.LlamaConfig.from_pretrained(tmp_path)
    config, notes = read_config(tmp_path / "config.json")
    assert config.rope_theta == expected.rope_parameters["rope_theta"]
    assert config.num_kv_heads == expected.num_key_value_heads
    assert config.head_width == expected.head_dim
    assert notes == []


@pytest.mark.parametrize(
    ("make", "fields"), [(transformers.GPT2Config, GPT2_FIELDS), (transformers.LlamaConfig, LLAMA_FIELDS)]
)
def test_what_a_config_leaves_out_means_what_it_means_to_them(make, fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": make.model_type}))
    config, _ = read_config(tmp_path / "config.json")
    theirs = make().to_dict() | {"n_inner": 4 * 768, "rope_theta": 10000.0}
    assert {name: getattr(config, ours) for name, ours in fields.items()} == {name: theirs[name] for name in fields}
