"""The Transformer against torch's own post-norm layers: same weights, same batch, no dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from core_flax.step import gradients
from core_flax.task import Task
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.model import Transformer
from seq2seq_flax.sharding import PARAM_RULES
from seq2seq_flax.task import loss_weights, translation_sums

torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
pytestmark = pytest.mark.parity

CONFIG = TransformerConfig(vocab_size=41, num_layers=3, width=32, num_heads=4, mlp_width=48, dropout=0.0)
B, M, L, SMOOTHING = 4, 11, 9, 0.1
H, K, D = 4, 8, 32


class Reference(torch.nn.Module):
    """Embeddings, positions and output layer by hand, as section 3 of the paper says; the layers are torch's."""

    def __init__(self):
        super().__init__()
        sizes = {"d_model": D, "nhead": H, "dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
        encoder = torch.nn.TransformerEncoderLayer(**sizes)
        decoder = torch.nn.TransformerDecoderLayer(**sizes)
        self.encoder = torch.nn.TransformerEncoder(encoder, CONFIG.num_layers, enable_nested_tensor=False)
        self.decoder = torch.nn.TransformerDecoder(decoder, CONFIG.num_layers)
        self.table = torch.nn.Parameter(torch.empty(CONFIG.vocab_size, D))

    def embed(self, ids):
        place = torch.arange(ids.shape[1])[:, None] / 10000 ** (torch.arange(0, D, 2) / D)
        return self.table[ids] * D**0.5 + torch.cat([place.sin(), place.cos()], dim=-1)

    def forward(self, source, source_padding, target, target_padding):
        later = torch.nn.Transformer.generate_square_subsequent_mask(target.shape[1]) < 0
        memory = self.encoder(self.embed(source), src_key_padding_mask=source_padding)
        x = self.decoder(
            self.embed(target),
            memory,
            tgt_mask=later,
            tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
        )
        return x @ self.table.T


def ours(theirs):
    """Our tree of arrays from theirs by name, be they weights or gradients."""
    theirs = {name: np.asarray(x.detach()) for name, x in theirs.items()}
    found = {"embeddings_token/embedding": theirs["table"]}

    def stack(path, name, change=lambda x: x):
        side = path.split("/")[0]
        layers = [change(theirs[f"{side}.layers.{n}.{name}"]) for n in range(CONFIG.num_layers)]
        found[path] = np.stack(layers)

    attentions = {"encoder": {"attention": "self_attn"}, "decoder": {}}
    attentions["decoder"] = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
    norms = {"encoder": ["attention", "mlp"], "decoder": ["self_attention", "cross_attention", "mlp"]}
    for side in ("encoder", "decoder"):
        layers = f"{side}/layers"
        for mine, name in attentions[side].items():
            for number, part in enumerate(("query", "key", "value")):
                rows = slice(number * D, (number + 1) * D)
                change = lambda x, rows=rows: x[rows].T.reshape(D, H, K)  # noqa: E731
                stack(f"{layers}/{mine}/{part}/kernel", f"{name}.in_proj_weight", change)
                stack(f"{layers}/{mine}/{part}/bias", f"{name}.in_proj_bias", lambda x, r=rows: x[r].reshape(H, K))
            stack(f"{layers}/{mine}/out/kernel", f"{name}.out_proj.weight", lambda x: x.T.reshape(H, K, D))
            stack(f"{layers}/{mine}/out/bias", f"{name}.out_proj.bias")
        for mine, name in (("up", "linear1"), ("down", "linear2")):
            stack(f"{layers}/mlp/{mine}/kernel", f"{name}.weight", np.transpose)
            stack(f"{layers}/mlp/{mine}/bias", f"{name}.bias")
        for number, mine in enumerate(norms[side], start=1):
            stack(f"{layers}/{mine}_norm/scale", f"norm{number}.weight")
            stack(f"{layers}/{mine}_norm/bias", f"norm{number}.bias")
    return unflatten_dict(found, sep="/")


@pytest.fixture(scope="module")
def reference():
    model = Reference()
    torch.manual_seed(0)
    with torch.no_grad():  # every bias and norm away from its start, and attention away from uniform
        for name, x in model.named_parameters():
            is_norm = ".norm" in name and name.endswith("weight")
            x.copy_(0.2 * torch.randn(x.shape) + (1.0 if is_norm else 0.0))
    return model


@pytest.fixture(scope="module")
def batch():
    """Ragged sources and targets, a pair to a row."""
    draw = np.random.default_rng(0)
    source_lengths, target_lengths = np.array([11, 3, 7, 10]), np.array([4, 9, 2, 7])
    sequences = [
        (np.arange(n) < lengths[:, None]).astype(int) for n, lengths in ((M, source_lengths), (L, target_lengths))
    ]
    tokens = [draw.integers(0, CONFIG.vocab_size, (B, n)) for n in (M, L, L)]
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


def theirs_of(reference, batch):
    source, target = (torch.tensor(batch[name]) for name in ("source_tokens", "target_inputs"))
    padding = [torch.tensor(batch[f"{side}_sequences"] == 0) for side in ("source", "target")]
    return reference(source, padding[0], target, padding[1])


def test_forward(reference, batch):
    with torch.no_grad():
        expected = theirs_of(reference, batch).numpy()
    found = jax.jit(Transformer(CONFIG).apply)(
        {"params": ours(dict(reference.named_parameters()))},
        batch["source_tokens"],
        batch["target_inputs"],
        source_sequences_BM=batch["source_sequences"],
        target_sequences_BL=batch["target_sequences"],
    )
    real = batch["target_sequences"] > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4, rtol=0)
    assert expected[real].std() > 0.3  # had the outputs been near zero, 1e-4 would have said nothing


def test_every_gradient(reference, batch):
    reference.zero_grad()
    real = torch.tensor(batch["target_sequences"] > 0)
    labels = torch.tensor(batch["target_labels"])[real]
    loss = torch.nn.functional.cross_entropy(theirs_of(reference, batch)[real], labels, label_smoothing=SMOOTHING)
    loss.backward()
    expected = flatten_dict(ours({name: x.grad for name, x in reference.named_parameters()}), sep="/")

    model = Transformer(CONFIG)
    task = Task(
        init=lambda key: {},
        loss_weights=loss_weights,
        loss_sums=lambda params, batch, key: translation_sums(model, params, batch, key, SMOOTHING),
        batches=lambda start, rows: iter(()),
        param_rules=PARAM_RULES,
    )
    params = jax.tree.map(jnp.asarray, ours(dict(reference.named_parameters())))
    grads, terms, *_ = jax.jit(lambda params, batch: gradients(task, params, batch, None, 2))(params, batch)
    grads = flatten_dict(grads, sep="/")

    np.testing.assert_allclose(sum(terms.values()), loss.item(), rtol=1e-5)
    assert grads.keys() == expected.keys()
    for path, x in grads.items():
        for layer in range(CONFIG.num_layers) if "/layers/" in path else (...,):
            size, error = np.linalg.norm(expected[path][layer]), np.linalg.norm(x[layer] - expected[path][layer])
            if path.endswith("attention/key/bias"):
                # Softmax does not see what all keys share, so the true gradient is zero and both compute rounding
                # errors: compare with a bias whose gradient is not.
                size = np.linalg.norm(expected[path.replace("key", "query")][layer])
            assert error <= 1e-4 * size, f"{path} [{layer}]: relative error {error / size:.1e}"
