"""No setting of a translation run is accepted and ignored: turning it changes what goes in or what is computed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from pair_text import write_files

from core_flax.config import TrainConfig
from core_flax.text.sentencepiece_model import SentencePiece
from seq2seq_flax.config import (
    GNMTConfig,
    InputsConfig,
    LSTMAttentionConfig,
    LSTMSeq2SeqConfig,
    ModernConfig,
    TransformerConfig,
)
from seq2seq_flax.pairs import PairStore
from seq2seq_flax.prepare import PrepareConfig, prepare
from seq2seq_flax.runs import KINDS
from seq2seq_flax.task import make_task

_ALL = {"vocab_size": 96, "num_layers": 3, "width": 64, "tied_embeddings": "target", "dropout": 0.4}
_TRANSFORMER = {
    "num_heads": 2,
    "mlp_width": 48,
    "attention_dropout": 0.2,
    "activation_dropout": 0.2,
    "norm_epsilon": 1e-3,
    "remat": "block",
}
_RECURRENT = {"init_limit": 0.3, "forget_bias": 2.0}
TURNS = {
    TransformerConfig: {
        **_ALL,
        **_TRANSFORMER,
        "unroll": 1,
        "scale_embeddings": False,
        "activation": "gelu",
        "output_bias": True,
    },
    ModernConfig: {**_ALL, **_TRANSFORMER, "unroll": 1, "rope_theta": 500.0},
    LSTMSeq2SeqConfig: {**_ALL, **_RECURRENT, "reading": "both"},
    LSTMAttentionConfig: {**_ALL, **_RECURRENT, "reading": "both", "score": "dot", "input_feeding": False},
    GNMTConfig: {**_ALL, **_RECURRENT},
}
"""Every setting of each architecture, and another value than that of the tiny model."""
INPUTS = {"row_length": 64, "packing": False, "label_smoothing": 0.3}
TINY = {"vocab_size": 80, "num_layers": 2, "width": 32}
HEADS = {"num_heads": 4, "mlp_width": 64}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What a config makes the machine do: the programs that draw parameters and take the loss, and the first batch."""
    folder = tmp_path_factory.mktemp("knobs")
    prepare(PrepareConfig(str(folder / "data"), train=tuple(write_files(folder, 30)), vocab_size=80))
    store, tokenizer = PairStore(folder / "data", "train"), SentencePiece.load(folder / "data" / "tokenizer.model")
    classes = {cls().model.__class__: cls for cls in KINDS.values()}

    @functools.cache
    def computed(model, inputs):
        train = TrainConfig(num_steps=1, batch_size=4)
        config = classes[type(model)](model=model, inputs=inputs, train=train)
        task = make_task(config, store, None, tokenizer)
        batches = task.batches(0, range(4))
        batch = next(batches)
        batches.close()
        key = jax.random.key(0)
        params = jax.eval_shape(task.init, key)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        rows = {"row": jax.ShapeDtypeStruct((len(batch["target_labels"]),), "int32")}
        loss = jax.make_jaxpr(task.loss_sums)(params, shapes | rows, key)
        arrays = {name: (x.shape, np.asarray(x).tobytes()) for name, x in batch.items()}
        init = jax.make_jaxpr(task.init)(key)
        return arrays, str(loss), str(init), [np.asarray(x).tobytes() for x in init.consts]

    return computed


def tiny(cls):
    return cls(**TINY | (HEADS if cls in (TransformerConfig, ModernConfig) else {}))


def test_every_setting_is_turned():
    assert set(TURNS) == {type(cls().model) for cls in KINDS.values()}
    for cls, turns in TURNS.items():
        assert set(turns) == {field.name for field in dataclasses.fields(cls)}
    assert set(INPUTS) == {field.name for field in dataclasses.fields(InputsConfig)}


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, turns in TURNS.items() for name in turns])
def test_turning_it_changes_what_is_computed(computed, cls, name):
    inputs, before = InputsConfig(row_length=96), tiny(cls)
    after = dataclasses.replace(before, **{name: TURNS[cls][name]})
    assert computed(after, inputs) != computed(before, inputs)


@pytest.mark.parametrize("name", INPUTS)
def test_turning_inputs_changes_what_goes_in(computed, name):
    model, before = tiny(TransformerConfig), InputsConfig(row_length=96)
    assert computed(model, dataclasses.replace(before, **{name: INPUTS[name]})) != computed(model, before)
