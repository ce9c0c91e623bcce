"""``align``: attention by words, of every model that has any."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CONFIGS, drawn_params

from core_flax.config import MeshConfig
from core_flax.sharding import make_mesh
from core_flax.text import sentencepiece_model
from core_flax.types import UserError
from seq2seq_flax import align
from seq2seq_flax.architectures import make_model
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.translator import Translator

SOURCE, TARGET = [5, 9, 7, 2], [1, 8, 6]


@pytest.fixture(scope="module")
def translator():
    texts = ["river road farmer teacher garden window market letter winter engine village doctor bridge"] * 2
    tokenizer = sentencepiece_model.train(texts, 34).with_languages(["ne", "xx"])
    model = make_model(
        TransformerConfig(vocab_size=tokenizer.num_tokens, num_layers=2, width=16, num_heads=2, mlp_width=16)
    )
    return Translator(model, drawn_params(model), tokenizer, 24, ("ne", "xx"), True, make_mesh(MeshConfig()))


def test_rows_of_every_layer_sum_to_one():
    model = make_model(CONFIGS["transformer_modern"])
    params = drawn_params(model)
    found, changed = (align.attention(model, params, source, TARGET) for source in (SOURCE, [5, 9, 30, 2]))
    assert found.shape == (2, 3, 4)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert np.abs(found - changed).max() > 1e-4


@pytest.mark.parametrize("name", ["lstm_attention", "gnmt"])
def test_of_recurrent_models_it_is_the_score_of_the_states_that_decoding_has(name):
    """Luong's general score of the last layer's state after a token, Bahdanau's of the first one's before it."""
    model = make_model(CONFIGS[name])
    params = drawn_params(model)
    (found_LM,) = align.attention(model, params, SOURCE, TARGET)
    start, extend = (jax.jit(partial(model.apply, {"params": params}, method=each)) for each in ("start", "extend"))
    cache = start(np.array([SOURCE]), np.ones((1, 4), bool), 3)
    memory_MF = np.asarray(cache.source.value[1][0], np.float64)
    weights = params["bottom" if name == "gnmt" else "decoder"]["attention"]
    mapped_MF = memory_MF @ weights["memory_kernel"]
    for place, token in enumerate(TARGET):
        before = cache
        _, cache = extend(np.array([[token]]), cache)
        if name == "gnmt":
            hidden_MF = np.tanh(np.asarray(before.carry[0].hidden[0]) @ weights["query_kernel"] + mapped_MF)
            scores_M = hidden_MF @ weights["scale"]
        else:
            scores_M = mapped_MF @ np.asarray(cache.carry.states[-1].hidden[0])
        np.testing.assert_allclose(found_LM[place], np.exp(scores_M) / np.exp(scores_M).sum(), atol=1e-5)


def test_of_a_transformer_it_is_the_softmax_of_products(translator):
    """The first layer's, by hand from the decoder's own parameters; the mean of its two heads."""
    model, params = translator.model, translator.params
    found = align.attention(model, params, SOURCE, TARGET)[0]
    layer = {name: np.asarray(x[0]) for name, x in flat(params["decoder"]["layers"])}

    def inputs(module):
        source, target = jnp.array([SOURCE]), jnp.array([TARGET])
        memory = module.encode(source, jnp.ones_like(source))
        return memory, module._embed("target", target, None)

    memory_BMD, x_BLD = jax.jit(partial(model.apply, method=inputs))({"params": params})
    x_LD = np.asarray(x_BLD[0], np.float64)
    mixed = attended(layer, "self_attention", x_LD, x_LD, causal=True)[0]
    normed = norm(x_LD + mixed, layer["self_attention_norm/scale"], layer["self_attention_norm/bias"])
    shares_HLM = attended(layer, "cross_attention", normed, np.asarray(memory_BMD[0], np.float64))[1]
    np.testing.assert_allclose(found, shares_HLM.mean(0), atol=1e-5)


def flat(tree, prefix=""):
    for name, value in tree.items():
        yield from flat(value, f"{prefix}{name}/") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


def attended(layer, name, x_LD, memory_MD, causal=False):
    """(result [L, D], shares [H, L, M])"""

    def part(which, of):
        return np.einsum("ld,dhk->hlk", of, layer[f"{name}/{which}/kernel"]) + layer[f"{name}/{which}/bias"][:, None]

    q, k, v = part("query", x_LD), part("key", memory_MD), part("value", memory_MD)
    scores = np.einsum("hlk,hmk->hlm", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = np.where(np.tri(len(x_LD), dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("hlk,hkd->ld", np.einsum("hlm,hmk->hlk", shares, v), layer[f"{name}/out/kernel"])
    return mixed + layer[f"{name}/out/bias"], shares


def norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def test_models_without_attention():
    model = make_model(CONFIGS["lstm_seq2seq"])
    assert align.attention(model, drawn_params(model), [5, 2], [1]).shape == (0, 1, 2)


def test_words_are_their_pieces_together(translator):
    """A word is looked at as much as its pieces together, and looks as they do on average."""
    found = align.align(translator, "river road", "doctor", "ne")
    assert found.source == ["<2ne>", "river", "road", "</s>"] and found.target == ["doctor", "</s>"]
    np.testing.assert_allclose(found.shares_TS.sum(1), 1, atol=1e-5)
    tokenizer = translator.tokenizer
    first, second, target = (tokenizer.encode([text])[0] for text in ("river", "road", "doctor"))
    source = [tokenizer.languages["ne"], *first, *second, tokenizer.eos_id]
    pieces_LM = align.attention(translator.model, translator.params, source, [tokenizer.bos_id, *target]).mean(0)
    expected = pieces_LM[: len(target), 1 : 1 + len(first)].sum(1).mean()
    np.testing.assert_allclose(found.shares_TS[0, 1], expected, atol=1e-6)
    layers = [align.align(translator, "river road", "doctor", "ne", layer).shares_TS for layer in (1, 2)]
    np.testing.assert_allclose(np.mean(layers, 0), found.shares_TS, atol=1e-6)
    assert np.abs(layers[0] - layers[1]).max() > 1e-3
    with pytest.raises(UserError, match="--layer 3: the decoder has attention in 2 of its layers"):
        align.align(translator, "river road", "doctor", "ne", 3)


def test_words_begin_where_pieces_say():
    """And with what is no text; bytes are shown as the letters they spell, unknown ones keep their word together."""

    class Tokenizer:
        def pieces(self, ids):
            return [["<2de>", "▁ein", "▁Sa", "<0xC3>", "<0xA4>", "<unk>", "</s>", "▁<b>"][number] for number in ids]

        def decode(self, ids):
            return {(1,): "ein", (2, 3, 4, 5): "Saä ⁇", (7,): "<b>"}.get(tuple(ids), "")

    words, spans = align.words_of(Tokenizer(), [0, 1, 2, 3, 4, 5, 7, 6], {0, 6})
    assert words == ["<2de>", "ein", "Saä ⁇", "<b>", "</s>"]
    assert spans == [slice(0, 1), slice(1, 2), slice(2, 6), slice(6, 7), slice(7, 8)]


FOUND = align.Alignment(["a<b>", "</s>"], ["x&y", "</s>"], np.array([[0.75, 0.25], [0.1, 0.9]]))


def test_a_page_needs_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    align.write_html(FOUND, path)
    text = path.read_text(encoding="utf-8")
    assert "a&lt;b&gt;" in text and "x&amp;y" in text and "a<b>" not in text
    assert "http" not in text and "src=" not in text and "<script" not in text
    assert [f'title="{share}"' in text for share in ("a&lt;b&gt;: 75.0%", "&lt;/s&gt;: 90.0%")] == [True, True]
    assert text.count("<td ") == 4


def test_a_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    align.write_png(FOUND, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"a \.png needs matplotlib"):
        align.write_png(FOUND, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "x.pdf"}, "--output x.pdf: give a file that ends in .html or .png"),
        ({"target": " "}, "--target is empty"),
        ({"layer": 0}, "--layer 0"),
        ({"text": "\udce4"}, "the text is not UTF-8"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        align.AlignCommand(**{"text": "road", "workdir": "run", "output": "x.html"} | options)
