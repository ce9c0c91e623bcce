"""BERT against transformers' BertForPreTraining in torch: same weights, same batch, no dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bert_flax.huggingface_names import params_from
from bert_flax.model import BertConfig, BertEncoder, BertForPreTraining
from bert_flax.pretrain import loss_weights, pretraining_sums
from bert_flax.sharding import PARAM_RULES
from core_flax.step import gradients
from core_flax.task import Task

torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra [parity] is not installed")
pytestmark = pytest.mark.parity

CONFIG = BertConfig(
    vocab_size=61, num_layers=3, width=32, num_heads=4, mlp_width=48, max_length=16, dropout=0.0, attention_dropout=0.0
)
B, L, P = 5, 12, 4


def ours(theirs):
    """Our tree of arrays from theirs by name, be they weights or gradients."""
    return params_from({name: x.detach().numpy() for name, x in theirs.items()}, CONFIG)


@pytest.fixture(scope="module")
def reference():
    model = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            intermediate_size=CONFIG.mlp_width,
            max_position_embeddings=CONFIG.max_length,
        )
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # every bias and norm away from its start, and attention away from uniform
        for name, x in model.named_parameters():
            x.copy_(0.3 * torch.randn(x.shape) + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
    return model


@pytest.fixture(scope="module")
def batch():
    """Ragged lengths, two segments, ragged numbers of masked tokens, both next-sentence labels."""
    draw = np.random.default_rng(0)
    lengths_B, masked_B = np.array([12, 7, 10, 5, 12]), np.array([4, 1, 3, 2, 4])
    positions_BP = np.stack([np.sort(draw.permutation(5)[:P]) for _ in range(B)])
    positions_BP[[0, 2, 4], -1] = lengths_B[[0, 2, 4]] - 1
    valid_BL = np.arange(L) < lengths_B[:, None]
    return {
        # Token 0 is padding alone: torch gives it no gradient as an input, and as padding it has none here either.
        "tokens": np.where(valid_BL, draw.integers(1, CONFIG.vocab_size, (B, L)), 0),
        "segments": (np.arange(L) >= lengths_B[:, None] // 2).astype(np.int64),
        "valid": valid_BL,
        "masked_positions": positions_BP,
        "masked_tokens": draw.integers(1, CONFIG.vocab_size, (B, P)),
        "masked_weights": (np.arange(P) < masked_B[:, None]).astype(np.float32),
        "next_is_random": np.array([0, 1, 1, 0, 0]),  # in both, 0 says that segment B follows segment A
        "example_weights": np.ones(B, np.float32),
    }


def inputs(batch):
    names = {"input_ids": "tokens", "token_type_ids": "segments", "attention_mask": "valid"}
    return {theirs: torch.tensor(batch[name]).long() for theirs, name in names.items()}


def test_forward(reference, batch):
    with torch.no_grad():
        expected = reference(**inputs(batch))
        pooled_BD = reference.bert(**inputs(batch)).pooler_output
    params = ours(reference.state_dict())
    arrays = [batch[name] for name in ("tokens", "segments", "valid")]
    everywhere_BL = np.broadcast_to(np.arange(L), (B, L))
    mlm_BLV, next_BC = jax.jit(BertForPreTraining(CONFIG).apply)({"params": params}, *arrays, everywhere_BL)
    _, ours_BD = jax.jit(BertEncoder(CONFIG).apply)({"params": params["encoder"]}, *arrays)
    np.testing.assert_allclose(mlm_BLV, expected.prediction_logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(next_BC, expected.seq_relationship_logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours_BD, pooled_BD, atol=1e-4, rtol=0)
    # Had the outputs been near zero, 1e-4 would have said nothing.
    assert min(expected.prediction_logits.std(), expected.seq_relationship_logits.std(), pooled_BD.std()) > 0.3


def test_every_gradient(reference, batch):
    labels_BL = np.full((B, L), -100)
    for row in range(B):
        masked = batch["masked_weights"][row] > 0
        labels_BL[row, batch["masked_positions"][row][masked]] = batch["masked_tokens"][row][masked]
    reference.zero_grad()
    labels = {"labels": torch.tensor(labels_BL), "next_sentence_label": torch.tensor(batch["next_is_random"])}
    loss = reference(**inputs(batch), **labels).loss
    loss.backward()
    expected = flatten_dict(ours({name: x.grad for name, x in reference.named_parameters()}), sep="/")

    model = BertForPreTraining(CONFIG)
    task = Task(
        init=lambda key: {},
        loss_weights=loss_weights,
        loss_sums=lambda params, batch, key: pretraining_sums(model, params, batch, key),
        batches=lambda start, rows: iter(()),
        param_rules=PARAM_RULES,
    )
    params = jax.tree.map(jnp.asarray, ours(reference.state_dict()))
    grads, terms, *_ = jax.jit(lambda params, batch: gradients(task, params, batch, None, 1))(params, batch)
    grads = flatten_dict(grads, sep="/")

    np.testing.assert_allclose(sum(terms.values()), loss.item(), rtol=1e-6)
    assert grads.keys() == expected.keys()
    for path, x in grads.items():
        for layer in range(CONFIG.num_layers) if "/layers/" in path else (...,):
            size, error = np.linalg.norm(expected[path][layer]), np.linalg.norm(x[layer] - expected[path][layer])
            if path.endswith("attention/key/bias"):
                # Softmax does not see what all keys share, so the true gradient is zero and both compute rounding
                # errors: compare with a bias whose gradient is not.
                size = np.linalg.norm(expected[path.replace("key", "query")][layer])
            assert error <= 1e-4 * size, f"{path} [{layer}]: relative error {error / size:.1e}"
