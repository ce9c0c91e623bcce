"""A small model as a folder of Hugging Face's, its arrays drawn."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from bert_flax.huggingface import load_pretrained
from bert_flax.huggingface_names import tensors
from bert_flax.model import BertConfig
from core_flax.text.wordpiece import WordPiece
from core_flax.types import UserError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES += ["the", "quick", "brown", "fox", "jump", "##s", "##ed", "cafe", "a", "##b", ".", ",", "é", "今"]
CONFIG = BertConfig(
    vocab_size=len(PIECES),
    num_layers=2,
    width=8,
    num_heads=2,
    mlp_width=12,
    max_length=10,
    num_segments=3,
    dropout=0.25,
    attention_dropout=0.125,
    init_stddev=0.03,
    norm_epsilon=1e-7,
)
TABLE = "bert.embeddings.word_embeddings.weight"


def random_arrays(seed=0):
    """Under their names, with their shapes; numbers of every sign and size."""
    draw = np.random.default_rng(seed)
    named = {name: tensor.shape for tensor in tensors(CONFIG).values() for name in tensor.names}
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in named.items()}


def write(folder, arrays, vocabulary=None, **changes):
    """A folder with these arrays; ``changes`` go into its config.json, None takes a field out."""
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "vocab_size": CONFIG.vocab_size,
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 10,
        "type_vocab_size": 3,
        "hidden_dropout_prob": 0.25,
        "attention_probs_dropout_prob": 0.125,
        "initializer_range": 0.03,
        "layer_norm_eps": 1e-7,
    }
    config = {name: value for name, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    (vocabulary or WordPiece(PIECES)).save(folder / "vocab.txt")
    save_file(arrays, folder / "model.safetensors")
    return folder


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def refused(folder):
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)
