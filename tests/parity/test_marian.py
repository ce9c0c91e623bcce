"""Marian models against transformers in torch: forward, every gradient, files both ways, text, beam search."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from core_flax.beam import BeamSearch, beam_search
from core_flax.text.sentencepiece_model import train
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.huggingface import load_pretrained, save_pretrained
from seq2seq_flax.huggingface_names import BIAS, params_from
from seq2seq_flax.huggingface_vocabulary import MarianVocabulary
from seq2seq_flax.model import Transformer
from seq2seq_flax.task import init_params, loss_weights, translation_sums

torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [parity] is not installed")
pytestmark = pytest.mark.parity

B, M, L = 4, 11, 9
SOURCES = [
    "the river sees the old garden",
    "a farmer opens two small windows",
    "the letter is long and the winter cold",
] * 4
TARGETS = [
    "der Fluss sieht den alten Garten",
    "ein Bauer macht zwei Fenster auf",
    "der Brief ist lang, der Winter kalt",
] * 4

MODELS = {
    "as published by Helsinki": {"activation_function": "swish", "scale_embedding": True},
    "two tables": {
        "activation_function": "gelu",
        "scale_embedding": False,
        "share_encoder_decoder_embeddings": False,
    },
    "three tables": {
        "activation_function": "relu",
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": False,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture(scope="module")
def vocabulary():
    """In Marian's order: the end first, then the unknown, the pieces of both models, languages, padding last."""
    source, target = train(SOURCES, 40), train(TARGETS, 45)
    ordinary = (model.pieces(range(3, model.num_tokens)) for model in (source, target))
    pieces = dict.fromkeys(["</s>", "<unk>", *(piece for each in ordinary for piece in each), ">>de<<", "<pad>"])
    ids = {piece: number for number, piece in enumerate(pieces)}
    return MarianVocabulary(source.model, target.model, ids, ids["<pad>"])


@pytest.fixture(scope="module", params=MODELS)
def reference(request, vocabulary):
    size = vocabulary.num_tokens
    config = transformers.MarianConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=size - 1,
        decoder_start_token_id=size - 1,
        **MODELS[request.param],
    )
    model = transformers.MarianMTModel(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # every bias and norm away from its start, and attention away from uniform
        for name, x in model.named_parameters():
            if "embed_positions" not in name:
                is_norm = "layer_norm" in name and name.endswith("weight")
                x.copy_(0.2 * torch.randn(x.shape) + (1.0 if is_norm else 0.0))
        if request.param != "two tables":
            model.final_logits_bias.copy_(torch.randn(1, size))
    return model


@pytest.fixture(scope="module")
def folder(reference, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    reference.save_pretrained(folder)
    vocabulary.save(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def batch(vocabulary):
    """Ragged sources and targets, a pair to a row."""
    draw = np.random.default_rng(0)
    source_lengths, target_lengths = np.array([11, 3, 7, 10]), np.array([4, 9, 2, 7])
    sequences = [
        (np.arange(n) < lengths[:, None]).astype(int) for n, lengths in ((M, source_lengths), (L, target_lengths))
    ]
    tokens = [draw.integers(0, vocabulary.num_tokens, (B, n)) for n in (M, L, L)]
    places = [np.broadcast_to(np.arange(n), (B, n)) for n in (M, L)]
    return {
        "source_tokens": tokens[0],
        "source_positions": places[0],
        "source_sequences": sequences[0],
        "target_inputs": tokens[1],
        "target_labels": tokens[2],
        "target_positions": places[1],
        "target_sequences": sequences[1],
    }


def told(reference, batch):
    real = batch["target_sequences"] > 0
    return reference(
        input_ids=torch.tensor(batch["source_tokens"]),
        attention_mask=torch.tensor(batch["source_sequences"]),
        decoder_input_ids=torch.tensor(batch["target_inputs"]),
        decoder_attention_mask=torch.tensor(batch["target_sequences"]),
        labels=torch.tensor(np.where(real, batch["target_labels"], -100)),
    )


def assert_equal_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, expected[name], strict=True, err_msg=name)


def test_forward(reference, ours, batch):
    with torch.no_grad():
        expected = told(reference, batch).logits.numpy()
    model = Transformer(ours.config)
    logits_BLV = jax.jit(model.apply)(
        {"params": ours.params},
        batch["source_tokens"],
        batch["target_inputs"],
        source_sequences_BM=batch["source_sequences"],
        target_sequences_BL=batch["target_sequences"],
    )
    real = batch["target_sequences"] > 0
    np.testing.assert_allclose(np.asarray(logits_BLV)[real], expected[real], atol=1e-4, rtol=0)
    assert expected.std() > 0.3  # had they been near zero, 1e-4 would have said nothing


def test_every_gradient(reference, ours, batch):
    """Of the mean loss; relative to each gradient's size.

    Theirs gives the embedding of padding none where it is looked up, although targets begin with it: that is put aside.
    """
    for module in reference.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    reference.zero_grad()
    bias = reference.final_logits_bias.requires_grad_()
    loss = told(reference, batch).loss
    loss.backward()
    grads = {name: x.grad.numpy() for name, x in reference.named_parameters() if "embed_positions" not in name}
    grads[BIAS] = bias.grad.numpy()
    bias.requires_grad_(False)
    expected = flatten_dict(params_from(grads, ours.config), sep="/")

    # What is compiled fastest; whether remat and unroll change results is another test's matter.
    model = Transformer(dataclasses.replace(ours.config, remat="none", unroll=1))

    def mean_loss(params):
        return translation_sums(model, params, batch, None, 0.0)[0]["loss"] / loss_weights(batch)["loss"]

    value, found = jax.jit(jax.value_and_grad(mean_loss))(jax.tree.map(jnp.asarray, dict(ours.params)))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    found = flatten_dict(found, sep="/")
    assert found.keys() == expected.keys()
    for path, x in found.items():
        for layer in range(ours.config.num_layers) if "/layers/" in path else (...,):
            size, error = np.linalg.norm(expected[path][layer]), np.linalg.norm(x[layer] - expected[path][layer])
            if path.endswith("key/bias"):
                # Softmax does not see what all keys share, so the true gradient is zero and both compute rounding
                # errors: compare with a bias whose gradient is not.
                size = np.linalg.norm(expected[path.replace("key", "query")][layer])
            assert error <= 1e-4 * size, f"{path} [{layer}]: relative error {error / size:.1e}"


def test_there_and_back(reference, folder, ours, batch, tmp_path):
    """Every bit, and a config from which transformers builds the same model."""
    assert ours.report.lines() == ["read: model.safetensors"]
    save_pretrained(tmp_path, ours.config, ours.params, ours.tokenizer, ours.max_length, ours.num_positions)
    assert_equal_arrays(load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors"))
    loaded, info = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = {name: x.numpy() for name, x in reference.state_dict().items()}
    assert_equal_arrays({name: x.numpy() for name, x in loaded.state_dict().items()}, expected)
    with torch.no_grad():
        torch.testing.assert_close(told(loaded.eval(), batch).logits, told(reference, batch).logits, rtol=0, atol=0)
    again = load_pretrained(tmp_path)
    assert again.config == ours.config and again.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert_equal_arrays(flatten_dict(again.params), flatten_dict(ours.params))


def test_older_files(reference, folder, ours, tmp_path):
    """torch.save of all there is: tied tables under every name, and the positions."""
    for name in ("config.json", "source.spm", "target.spm", "vocab.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    older = load_pretrained(tmp_path)
    assert older.report.unused == ()
    assert_equal_arrays(flatten_dict(older.params), flatten_dict(ours.params))


def their_tokenizer(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
        return transformers.MarianTokenizer.from_pretrained(folder)


def test_text_is_cut_and_joined_alike(vocabulary, tmp_path):
    """From files that we wrote: of Marian's kind, and of a SentencePiece of ours with languages."""
    joint = train(SOURCES + TARGETS, 60).with_languages(["de"])
    for number, tokenizer in enumerate((vocabulary, joint)):
        config = TransformerConfig(vocab_size=tokenizer.num_tokens, num_layers=1, width=8, num_heads=2, mlp_width=8)
        params = jax.jit(lambda key, config=config: init_params(Transformer(config), key))(jax.random.key(0))
        save_pretrained(tmp_path / str(number), config, params, tokenizer)
        theirs, again = their_tokenizer(tmp_path / str(number)), load_pretrained(tmp_path / str(number)).tokenizer
        texts = [*SOURCES[:3], "Übung über und über"]
        tag = tokenizer.languages["de"]
        assert again.languages == tokenizer.languages == {"de": tag}
        for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
            assert theirs(text).input_ids == [*ids, tokenizer.eos_id]
            assert theirs(f">>de<< {text}").input_ids == [tag, *ids, tokenizer.eos_id]
            assert again.encode([text]) == [ids]
        assert theirs.pad_token_id == tokenizer.bos_id and theirs.unk_token_id == tokenizer.unk_id
        of_targets = getattr(tokenizer, "encode_targets", tokenizer.encode)(TARGETS[:3])
        assert [theirs(text_target=text).input_ids[:-1] for text in TARGETS[:3]] == of_targets
        for text, ids in zip(TARGETS[:3], of_targets, strict=True):
            whole = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.bos_id]
            assert again.decode(whole) == tokenizer.decode(whole) == text
            assert theirs.decode(whole, skip_special_tokens=True) == text


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of ours with random weights, its files as transformers reads them, and 100 sentences of random tokens.

    The end of the sentence is made such that translations have many lengths up to the limit.
    """
    tokenizer = train(SOURCES + TARGETS, 60)
    config = TransformerConfig(vocab_size=60, num_layers=2, width=32, num_heads=4, mlp_width=48, output_bias=True)
    model, draw = Transformer(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = jax.tree.map(lambda x: draw.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    for block in (params["encoder"], params["decoder"]):
        for name, part in block["layers"].items():
            if name.endswith("norm"):
                part["scale"] += 1.0
    table = params["embeddings_token"]["embedding"]
    table *= 2.0  # probabilities far from even, that of the end most of all
    table[tokenizer.eos_id] *= 4.0
    params["output_bias"][tokenizer.eos_id] = 2.0
    folder = tmp_path_factory.mktemp("exported")
    save_pretrained(folder, config, params, tokenizer)
    lengths = draw.integers(2, 13, 100)
    valid_BM = np.arange(12) < lengths[:, None]
    sources_BM = np.where(valid_BM, draw.integers(3, 60, (100, 12)), tokenizer.bos_id)
    return model, params, tokenizer, transformers.MarianMTModel.from_pretrained(folder).eval(), sources_BM, valid_BM


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_beam_search_is_theirs_token_for_token(exported, alpha):
    """``generate(num_beams=4)`` on 100 sentences.

    Its score is log-probability over length ** alpha, which is ours with length_offset 0; GNMT's, our default, it does
    not have (with alpha 0 the two are one). It is told to stop no earlier than nothing better can come
    (early_stopping="never"), as ours always does; its own default stops at a bound that is none for alpha above 0.
    """
    model, params, tokenizer, theirs, sources_BM, valid_BM = exported
    length, size = 16, model.config.vocab_size
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(sources_BM),
            attention_mask=torch.tensor(valid_BM),
            num_beams=4,
            length_penalty=alpha,
            early_stopping="never",
            max_length=None,
            max_new_tokens=length,
        ).numpy()[:, 1:]
    start = jax.jit(lambda params: model.apply({"params": params}, sources_BM, valid_BM, length, method="start"))
    found = beam_search(
        model,
        params,
        start(params),
        np.full((100, 1), tokenizer.bos_id),
        length=length,
        search=BeamSearch(beam_size=4, length_penalty=alpha, length_offset=0.0),
        stop=(tokenizer.eos_id,),
        allowed_V=np.arange(size) != tokenizer.bos_id,
    )
    numbers = np.asarray(found.num_tokens_BC)[:, 0]
    ended = np.arange(length) < numbers[:, None]
    tokens_BL = np.where(ended, np.asarray(found.tokens_BCL)[:, 0], tokenizer.bos_id)[:, : expected.shape[1]]
    np.testing.assert_array_equal(tokens_BL, expected)
    assert len(np.unique(numbers)) > 5 and len(np.unique(tokens_BL, axis=0)) > 20
