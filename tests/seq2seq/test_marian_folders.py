"""Folders of Marian models: taken in and written by command, and refused, by name, for what this model is not."""

import dataclasses
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_text import sentences
from safetensors.numpy import load_file, save_file

from core_flax.checkpoint import Checkpoints
from core_flax.config import CheckpointConfig
from core_flax.run import Run
from core_flax.state import TrainState
from core_flax.text.sentencepiece_model import train
from core_flax.types import UserError
from seq2seq_flax.cli import main
from seq2seq_flax.config import GNMTConfig, GNMTTranslateConfig, TransformerConfig, TranslateConfig
from seq2seq_flax.huggingface import check_exportable, load_pretrained, save_pretrained
from seq2seq_flax.huggingface_vocabulary import MarianVocabulary
from seq2seq_flax.model import Transformer
from seq2seq_flax.pretrained import load_model
from seq2seq_flax.runs import load_run
from seq2seq_flax.task import init_params

FILES = ("config.json", "generation_config.json", "source.spm", "target.spm", "tokenizer_config.json", "vocab.json")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder as transformers reads it, with a vocabulary padded by two."""
    texts = [text for pair in sentences(40) for text in pair]
    tokenizer = train(texts, 60)
    config = TransformerConfig(
        vocab_size=62, num_layers=2, width=16, num_heads=2, mlp_width=24, output_bias=True, tied_embeddings="target"
    )
    params = jax.jit(lambda key: init_params(Transformer(config), key))(jax.random.key(0))
    folder = tmp_path_factory.mktemp("theirs") / "model"
    params["output_bias"] += np.arange(62)
    save_pretrained(folder, config, params, MarianVocabulary.of(tokenizer), max_length=40)
    return folder


@pytest.fixture
def changed(theirs, tmp_path):
    """What makes a copy of the folder with other settings."""

    def change(file="config.json", **changes):
        folder = tmp_path / "changed"
        shutil.copytree(theirs, folder)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return change


def call(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    return subprocess.CompletedProcess(argv, stop.value.code, *capsys.readouterr())


def test_in_and_out_again(theirs, tmp_path, capsys):
    done = call(capsys, "import-hf", theirs, "--output", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "Transformer of 2 + 2 layers, 16 wide" in done.stdout
    assert "60 pieces, the embedding 62 rows" in done.stdout
    imported = load_model(str(tmp_path / "ours"))
    assert imported.tokenizer.encode(["river song"]) == load_pretrained(theirs).tokenizer.encode(["river song"])
    done = call(capsys, "export-hf", "--workdir", tmp_path / "ours", "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (theirs / name).read_bytes(), name
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name], strict=True, err_msg=name)
    refused = call(capsys, "export-hf", "--workdir", tmp_path / "ours", "--output", tmp_path / "again")
    assert refused.returncode == 2 and "is there already, and not empty" in refused.stderr
    for source, message in (("none", ""), ("ours", "ours is ours already, of kind seq2seq_flax.pretrained")):
        refused = call(capsys, "import-hf", tmp_path / source, "--output", tmp_path / "other")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and message in refused.stderr
    (tmp_path / "empty").mkdir()
    refused = call(capsys, "translate", "--workdir", tmp_path / "empty")
    assert refused.returncode == 2 and "empty holds no model: config.json is missing" in refused.stderr
    for command in (("export-hf", "--workdir", tmp_path / "ours"), ("import-hf", theirs)):
        refused = call(capsys, *command, "--output", "/proc/none")
        assert refused.returncode == 2 and "/proc/none could not be written: " in refused.stderr


def test_a_folder_of_theirs_is_scored_as_it_is(theirs, tmp_path, capsys):
    for name, line in (("in", "river song"), ("out", "gnos revir")):
        (tmp_path / name).write_text(f"{line}\n")
    files = "--input", tmp_path / "in", "--reference", tmp_path / "out"
    done = call(capsys, "evaluate", "--workdir", theirs, *files, "--beam-size", 1)
    assert done.returncode == 0 and done.stdout.startswith("BLEU = ") and "reference length 2," in done.stdout, done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "of type 'bart'; only marian"),
        ({"decoder_layers": 3}, "decoder_layers is 3 and encoder_layers 2"),
        ({"decoder_attention_heads": 4}, "decoder_attention_heads is 4"),
        ({"decoder_ffn_dim": 32}, "decoder_ffn_dim is 32"),
        ({"decoder_vocab_size": 70}, "decoder_vocab_size is 70 and vocab_size 62"),
        ({"activation_function": "gelu_new"}, "activation_function is 'gelu_new'"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop is 0.1"),
        ({"decoder_layerdrop": 0.1}, "decoder_layerdrop is 0.1"),
        ({"static_position_embeddings": False}, "static_position_embeddings is False"),
        ({"normalize_before": True}, "normalize_before is True"),
        ({"normalize_embedding": True}, "normalize_embedding is True"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm is True"),
        ({"add_bias_logits": True}, "add_bias_logits is True"),
        ({"share_encoder_decoder_embeddings": True, "tie_word_embeddings": False}, "this model cannot be both"),
        ({"share_encoder_decoder_embeddings": []}, "share_encoder_decoder_embeddings is [] and tie_word_embeddings"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1; this model cannot be both"),
        ({"decoder_start_token_id": 5}, "decoder_start_token_id is 5 and pad_token_id 1"),
        ({"eos_token_id": 5}, "eos_token_id is 5; vocab.json has </s> at 2"),
        ({"vocab_size": 300, "decoder_vocab_size": 300}, "they belong to different models"),
        ({"activation_function": ["relu"]}, "activation_function is ['relu']"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None; it must be a whole number, 8 or more"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ({"d_model": 32}, "config.json asks for"),
        ({"d_model": "16"}, "d_model is '16', which is no whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_this_model_is_not(changed, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_pretrained(changed(**changes))


def test_two_vocabularies_are_refused(changed):
    with pytest.raises(UserError, match="separate_vocabs is true"):
        load_pretrained(changed("tokenizer_config.json", separate_vocabs=True))


def test_damaged_vocabularies(changed):
    with pytest.raises(UserError, match="does not number its pieces"):
        load_pretrained(changed("vocab.json", more=99))


def test_weights_of_another_model(changed):
    folder = changed()
    path = folder / "model.safetensors"
    arrays = load_file(path)
    head = arrays["model.decoder.embed_tokens.weight"] + 1
    save_file(arrays | {"lm_head.weight": head}, path)
    with pytest.raises(UserError, match=r"lm_head\.weight is not equal to model\.decoder"):
        load_pretrained(folder)
    learned = np.ones((40, 16), np.float32)
    save_file(arrays | {"model.encoder.embed_positions.weight": learned}, path)
    with pytest.raises(UserError, match=r"embed_positions\.weight does not hold sinusoidal"):
        load_pretrained(folder)
    arrays.pop("model.encoder.layers.1.fc1.bias")
    save_file(arrays, path)
    with pytest.raises(UserError, match=r"the weights lack model.encoder.layers.1.fc1.bias; give the whole"):
        load_pretrained(folder)


def save_run(folder, kind, config, params, tokenizer):
    """A run's folder with one checkpoint, as training leaves it."""
    facts = {"directions": [[None, None]], "tagged": False}
    run = Run(folder, kind, config, folder / "data", "none", tokenizer.fingerprint, facts)
    run.save("tokenizer.model", tokenizer.save)
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
    checkpoints.save(TrainState(jnp.int32(5), params, {}))
    checkpoints.close()


def test_a_run_is_averaged_and_written(tmp_path, capsys):
    """All commands in a row: the mean of one checkpoint is the checkpoint."""
    tokenizer = train([text for pair in sentences(40) for text in pair], 60)
    config = TransformerConfig(vocab_size=300, num_layers=1, width=8, num_heads=2, mlp_width=8)
    params = jax.jit(lambda key: init_params(Transformer(config), key))(jax.random.key(0))
    save_run(tmp_path / "run", "seq2seq_flax.transformer", TranslateConfig(model=config), params, tokenizer)
    done = call(capsys, "average", "--workdir", tmp_path / "run", "--last", 1)
    assert done.returncode == 0 and "the mean of 1 checkpoint, step 5" in done.stdout, done.stderr
    mean, _ = load_run(tmp_path / "run/averaged-1")
    with pytest.raises(UserError, match="is the mean of 1 checkpoints, which is not trained on"):
        mean.check_continued_by(mean, "transformer_tiny")
    done = call(capsys, "export-hf", "--workdir", tmp_path / "run/averaged-1", "--output", tmp_path / "theirs")
    assert done.returncode == 0, done.stderr
    written = load_pretrained(tmp_path / "theirs")
    # What pads the tables stands for nothing: transformers would draw it.
    assert written.config == dataclasses.replace(config, vocab_size=60)
    assert written.max_length == TranslateConfig().inputs.row_length
    assert written.tokenizer.encode(["river song"]) == tokenizer.encode(["river song"])
    params = jax.device_get(params)
    params["embeddings_token"] = {"embedding": params["embeddings_token"]["embedding"][:60]}
    jax.tree.map(np.testing.assert_array_equal, dict(written.params), params)


def test_another_architecture_is_not_written(tmp_path, capsys):
    tokenizer = train([text for pair in sentences(40) for text in pair], 60)
    config = GNMTTranslateConfig(model=GNMTConfig(vocab_size=60, num_layers=2, width=8))
    save_run(tmp_path / "run", "seq2seq_flax.gnmt", config, {"w": jnp.zeros(1)}, tokenizer)
    refused = call(capsys, "export-hf", "--workdir", tmp_path / "run", "--output", tmp_path / "theirs")
    assert refused.returncode == 2 and "a model of GNMTConfig has no counterpart in Marian" in refused.stderr
    assert not (tmp_path / "theirs").exists()


def test_what_marian_is_not():
    with pytest.raises(UserError, match=r"model.norm_epsilon is 0.001; Marian's is 1e-05"):
        check_exportable(TransformerConfig(norm_epsilon=1e-3))
    with pytest.raises(UserError, match="a model of str has no counterpart in Marian"):
        check_exportable("gnmt")
