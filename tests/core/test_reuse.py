"""Modules in programs that are not ours: a plain Linen and optax loop (the README's example), an NNX one, a Llama."""

import re
import runpy
from pathlib import Path

import jax
import optax
from flax import nnx
from flax.nnx import bridge

from bert_flax.model import BertConfig, BertEncoder

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
EXAMPLE = EXAMPLES / "reuse_encoder.py"


def test_linen_example(capsys):
    runpy.run_path(str(EXAMPLE))
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 30 and losses[-1] < 0.6 * losses[0]
    assert len([line for line in EXAMPLE.read_text(encoding="utf-8").splitlines()[1:] if line]) <= 20


def test_a_language_model_learns_to_count(capsys):
    runpy.run_path(str(EXAMPLES / "reuse_language_model.py"))
    rows = [[int(each) for each in re.findall(r"\d+", line)] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [[6, 7, 8, 9, 10, 11, 0, 1], [10, 11, 0, 1, 2, 3, 4, 5]]


def test_a_translation_model_learns_to_write_backwards(capsys):
    runpy.run_path(str(EXAMPLES / "reuse_translation.py"))
    rows = [[int(each) for each in re.findall(r"\d+", line)] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [[7, 6, 5, 4, 3, 2, 0, 0], [5, 3, 12, 9, 12, 2, 0, 0]]


def test_nnx():
    class Classifier(nnx.Module):
        def __init__(self, config, tokens, rngs):
            self.encoder = bridge.ToNNX(BertEncoder(config), rngs=rngs).lazy_init(tokens)
            self.head = nnx.Linear(config.width, 1, rngs=rngs)

        def __call__(self, tokens):
            _, pooled = self.encoder(tokens, deterministic=False)
            return self.head(pooled)[:, 0]

    tokens = jax.random.randint(jax.random.key(0), (64, 16), 0, 100)
    labels = tokens[:, 1] < tokens[:, 2]
    config = BertConfig(vocab_size=100, num_layers=2, width=64, num_heads=4, mlp_width=128)
    model = Classifier(config, tokens, nnx.Rngs(params=1, dropout=2))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    def loss(model):
        return optax.sigmoid_binary_cross_entropy(model(tokens), labels).mean()

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]
