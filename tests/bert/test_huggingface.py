"""Folders in Hugging Face's format, without torch: bit for bit there and back, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_folder import CONFIG, PIECES, TABLE, edit, random_arrays, refused, write
from safetensors.numpy import load_file

from bert_flax.huggingface import TASK_HEADS, TaskHead, load_pretrained, save_pretrained
from bert_flax.pretrained import export_hf, import_hf, load_init
from bert_flax.runs import load_run
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError

HEADS = ("encoder/pooler", "masked_language", "next_sentence")


def assert_same(ours, theirs):
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert np.asarray(x).dtype == np.float32
        np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(theirs[path]).view(np.uint32), path)


def without(params, heads):
    """The parameters without some of the heads."""
    kept = dict(params) | {"encoder": dict(params["encoder"])}
    for head in heads:
        parent, _, name = head.rpartition("/")
        del (kept[parent] if parent else kept)[name]
    return kept


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_pretrained(write(tmp_path_factory.mktemp("hf") / "model", random_arrays()))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", random_arrays())


# There and back


def test_arrays_lie_where_they_should(model):
    """By hand: a weight that maps inputs to outputs comes transposed, heads side by side, layers stacked."""
    theirs, params = random_arrays(), model.params
    assert model.config == CONFIG
    query = theirs["bert.encoder.layer.1.attention.self.query.weight"]
    out = theirs["bert.encoder.layer.1.attention.output.dense.weight"]
    for head in range(2):
        rows = slice(4 * head, 4 * head + 4)
        attention = params["encoder"]["layers"]["attention"]
        np.testing.assert_array_equal(attention["query"]["kernel"][1, :, head], query[rows].T)
        np.testing.assert_array_equal(attention["out"]["kernel"][1, head], out[:, rows].T)
    mlp = params["encoder"]["layers"]["mlp"]
    np.testing.assert_array_equal(mlp["up"]["kernel"][0], theirs["bert.encoder.layer.0.intermediate.dense.weight"].T)
    np.testing.assert_array_equal(params["encoder"]["embeddings"]["token"]["embedding"], theirs[TABLE])
    np.testing.assert_array_equal(params["masked_language"]["bias"], theirs["cls.predictions.bias"])
    assert model.report.missing == model.report.unused == model.report.notes == ()


@pytest.mark.parametrize(
    ("missing", "architecture"),
    [
        ((), "BertForPreTraining"),
        (("encoder/pooler", "next_sentence"), "BertForMaskedLM"),
        (("masked_language",), "BertForNextSentencePrediction"),
        (("masked_language", "next_sentence"), "BertModel"),
        (HEADS, "BertModel"),
    ],
)
def test_params_there_and_back(model, tmp_path, missing, architecture):
    params, vocabulary = without(model.params, missing), WordPiece(PIECES, lowercase=not missing)
    save_pretrained(tmp_path / "out", CONFIG, params, vocabulary)
    found = load_pretrained(tmp_path / "out")
    assert_same(found.params, params)
    assert (found.config, found.vocabulary.fingerprint) == (CONFIG, vocabulary.fingerprint)
    titles = {"encoder/pooler": "pooler", "masked_language": "masked-language head"}
    assert found.report.missing == tuple(titles.get(head, "next-sentence head") for head in missing)
    assert found.report.unused == found.report.notes == ()
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [architecture]


@pytest.mark.parametrize("architecture", TASK_HEADS)
def test_task_heads_there_and_back(model, tmp_path, architecture):
    draw = np.random.default_rng(1)
    kernel, bias = draw.normal(size=(8, 3)).astype(np.float32), draw.normal(size=3).astype(np.float32)
    labels = None if architecture == "BertForMultipleChoice" else ("no", "maybe", "yes")
    head = TaskHead(architecture, kernel, bias, labels)
    save_pretrained(tmp_path / "out", CONFIG, without(model.params, HEADS[1:]), model.vocabulary, head)
    weights = load_file(tmp_path / "out/model.safetensors")
    layer = "qa_outputs" if architecture == "BertForQuestionAnswering" else "classifier"
    np.testing.assert_array_equal(weights[f"{layer}.weight"], kernel.T)
    found = load_pretrained(tmp_path / "out")
    assert (found.head.architecture, found.head.labels) == (architecture, labels)
    assert_same({"kernel": found.head.kernel, "bias": found.head.bias}, {"kernel": kernel, "bias": bias})
    assert found.report.unused == ()


def test_imported_and_exported(folder, tmp_path, capsys):
    arrays = random_arrays() | {"classifier.weight": np.ones((2, 8), np.float32), "classifier.bias": np.zeros(2, "f4")}
    del arrays["cls.seq_relationship.weight"], arrays["cls.seq_relationship.bias"]
    extra = {"bert.embeddings.position_ids": np.arange(10)[None]}
    labels = {"id2label": {"0": "no", "1": "yes"}, "architectures": ["BertForTokenClassification"]}
    write(folder, arrays | extra, **labels)
    import_hf(str(folder), str(tmp_path / "ours"))
    printed = capsys.readouterr().out
    for line in (
        "ours: BERT of 2 layers, 8 wide, ",
        "read: model.safetensors",
        "missing, new where it is needed: next-sentence head",
        "unused: bert.embeddings.position_ids",
    ):
        assert line in printed
    imported = load_init(str(tmp_path / "ours"))
    assert imported.report.missing == ("next-sentence head",)
    assert imported.head.labels == ("no", "yes")
    export_hf(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    exported = load_file(tmp_path / "theirs/model.safetensors")
    assert_same(exported, arrays)
    stored = json.loads((tmp_path / "theirs/config.json").read_text())
    assert stored["architectures"] == ["BertForTokenClassification"] and stored["id2label"] == labels["id2label"]


def test_a_pretraining_run_exported(finished_run, tmp_path):
    run, vocabulary = load_run(finished_run)
    for step in (None, 4):
        export_hf(str(finished_run), str(tmp_path / f"out{step}"), step)
        found = load_init(str(tmp_path / f"out{step}"))
        assert_same(found.params, jax.tree.map(np.asarray, run.params(step)[0]))
        assert found.vocabulary.fingerprint == vocabulary.fingerprint
        assert found.config == run.config.model
    assert_same(load_init(str(finished_run)).params, jax.tree.map(np.asarray, run.params()[0]))


# What weights may look like


def test_names_of_the_first_releases(model, folder):
    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    arrays = {old(name): x for name, x in random_arrays().items()}
    assert any("gamma" in name for name in arrays)
    arrays["cls.predictions.decoder.weight"] = arrays[TABLE].copy()
    write(folder, arrays, model_type=None, architectures=None)
    found = load_pretrained(folder)
    assert_same(found.params, model.params)
    assert found.report.unused == found.report.missing == ()


def test_an_encoder_by_itself(model, folder):
    arrays = {name.removeprefix("bert."): x for name, x in random_arrays().items() if name.startswith("bert.")}
    write(folder, arrays, architectures=["BertModel"])
    found = load_pretrained(folder)
    assert_same(found.params, without(model.params, HEADS[1:]))
    assert found.report.missing == ("masked-language head", "next-sentence head")


def test_an_output_layer_of_its_own_is_refused(model, folder):
    arrays = random_arrays()
    bias = arrays.pop("cls.predictions.bias")
    write(folder, arrays | {"cls.predictions.decoder.bias": bias})  # under either name
    assert_same(load_pretrained(folder).params, model.params)
    write(folder, random_arrays() | {"cls.predictions.decoder.bias": bias + 1})
    assert "decoder.bias is not equal to cls.predictions.bias" in refused(folder)
    write(folder, random_arrays() | {"cls.predictions.decoder.weight": arrays[TABLE] + 1})
    assert f"decoder.weight is not equal to {TABLE}" in refused(folder)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_converted_and_reported(folder, dtype):
    write(folder, {name: x.astype(dtype) for name, x in random_arrays().items()})
    found = load_pretrained(folder)
    assert found.report.notes == (f"{len(random_arrays())} arrays from {np.dtype(dtype)} to float32",)
    table = found.params["encoder"]["embeddings"]["token"]["embedding"]
    np.testing.assert_array_equal(table, random_arrays()[TABLE].astype(dtype).astype(np.float32), strict=True)


def test_labels_that_do_not_fit_are_not_taken(folder):
    head = {"classifier.weight": np.ones((5, 8), np.float32), "classifier.bias": np.zeros(5, np.float32)}
    for labels in ({"0": "LABEL_0", "1": "LABEL_1"}, ["LABEL_0"] * 5, 5):
        write(folder, random_arrays() | head, architectures=None, id2label=labels)
        found = load_pretrained(folder)
        assert (found.head.architecture, found.head.labels) == ("BertForSequenceClassification", None)
        assert found.head.kernel.shape == (8, 5)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "describes a model of type 'roberta'; only bert can be read"),
        ({"model_type": None, "architectures": ["RobertaModel"]}, "of type 'RobertaModel'; only bert"),
        ({"architectures": "BertModel"}, "architectures is 'BertModel', which is no list of names; get it again"),
        ({"architectures": [5]}, "architectures is [5], which is no list of names"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; this model has 'abs"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; this model has 'gelu'"),
        ({"is_decoder": True}, "is_decoder is True; this model has False"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}"),
        ({"hidden_size": None}, "does not describe a model: it has no hidden_size"),
        ({"hidden_size": "8"}, "hidden_size is '8', which is no whole number"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, which is no whole number"),
        ({"num_attention_heads": 3}, "describes no model that can be built (--model.num-heads 3 does not divide"),
        ({"vocab_size": 18}, "the vocabulary has 19 pieces and config.json says vocab_size 18"),
        ({"vocab_size": 147}, "the vocabulary has 19 pieces and config.json says vocab_size 147"),
        ({"vocab_size": 20}, f"{TABLE} is float32[19, 8] in the weights, and config.json asks for float32[20, 8]"),
        (
            {"intermediate_size": 13},
            "output.dense.weight is float32[8, 12] in the weights, and config.json asks for fl",
        ),
        ({"num_hidden_layers": 3}, "and 15 more of the encoder; give the whole of the model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configurations(folder, changes, message):
    write(folder, random_arrays(), **changes)
    assert message in refused(folder)


def test_weights_that_are_incomplete(folder):
    for name, part in (
        ("bert.embeddings.LayerNorm.bias", "encoder"),
        ("bert.pooler.dense.bias", "pooler"),
        ("cls.predictions.transform.dense.weight", "masked-language head"),
        ("cls.seq_relationship.weight", "next-sentence head"),
    ):
        arrays = random_arrays()
        del arrays[name]
        write(folder, arrays)
        assert f"the weights lack {name} of the {part}; give the whole of the model" in refused(folder)


def test_weights_of_the_wrong_shape(folder):
    write(folder, random_arrays() | {"cls.seq_relationship.weight": np.zeros((3, 8), np.float32)})
    assert "cls.seq_relationship.weight is float32[3, 8] in the weights, and config.json asks for float32[2, 8]" in (
        refused(folder)
    )
    write(folder, random_arrays() | {"classifier.weight": np.zeros((3, 7), "f4"), "classifier.bias": np.zeros(3, "f4")})
    assert "classifier.weight is float32[3, 7] in the weights, and config.json asks for float32[3, 8]" in refused(
        folder
    )
    for odd in (np.nan, np.inf):
        write(folder, random_arrays() | {"bert.pooler.dense.bias": np.array([*np.zeros(7), odd], np.float32)})
        assert "bert.pooler.dense.bias holds a number that is not finite" in refused(folder)
    write(folder, random_arrays() | {"bert.pooler.dense.bias": np.zeros(8, np.int32)})
    assert "bert.pooler.dense.bias is int32[8] in the weights, and config.json asks for float32[8]" in refused(folder)


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    for name, message in (
        ("model.safetensors", "holds no weights"),
        ("vocab.txt", "has no vocabulary: neither vocab.txt nor tokenizer.json"),
        ("config.json", "cannot read"),
    ):
        copy = tmp_path / f"no {name}"
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        assert message in refused(copy)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert "model.safetensors is damaged or cut short" in refused(folder)
    for text in ("{", "[" * 100_000):
        (folder / "config.json").write_text(text)
        assert "config.json is not valid JSON" in refused(folder)
    with pytest.raises(UserError, match=r"config.json is not valid JSON"):
        load_init(str(folder))


def test_folders_that_hold_no_model(folder, finished_run, tmp_path):
    with pytest.raises(UserError, match="is no folder; give that of a run, or of a model on this machine"):
        load_init("bert-base-uncased")
    edit(folder / "config.json", kind="seq2seq_flax.train")
    with pytest.raises(UserError, match=r"holds a seq2seq_flax\.train; give a pretraining run"):
        load_init(str(folder))
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    for command, source in ((import_hf, folder), (export_hf, finished_run)):
        with pytest.raises(UserError, match="is there already, and not empty; give a new folder"):
            command(str(source), str(tmp_path / "there"))


def test_another_vocabulary_put_into_an_imported_folder(folder, tmp_path):
    import_hf(str(folder), str(tmp_path / "ours"))
    WordPiece([*PIECES[:-1], "other"]).save(tmp_path / "ours/vocab.txt")
    with pytest.raises(UserError, match="is not the vocabulary that was imported"):
        load_init(str(tmp_path / "ours"))


def test_rows_that_pad_the_embedding(folder):
    arrays = random_arrays()
    arrays[TABLE] = np.pad(arrays[TABLE], ((0, 5), (0, 0)))
    arrays["cls.predictions.bias"] = np.pad(arrays["cls.predictions.bias"], (0, 5))
    write(folder, arrays, vocab_size=24)
    found = load_pretrained(folder)
    assert found.config.vocab_size == 24
    assert found.report.notes == ("the vocabulary has 19 pieces, the embedding 24 rows: the last are padding",)
