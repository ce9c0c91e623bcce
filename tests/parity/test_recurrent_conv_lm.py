"""The LSTM and the convolutional language model against torch's layers: same weights, same batch, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.losses import vocabulary_sums
from lm_flax.convolution import ConvConfig, ConvLanguageModel
from lm_flax.recurrent import LSTMConfig, LSTMLanguageModel

torch = pytest.importorskip("torch", reason="the extra [parity] is not installed")
pytestmark = pytest.mark.parity

B, L, V, D = 3, 9, 41, 16
ROWS = np.random.default_rng(0).integers(0, V, (B, L + 1))


def both(model, reference, names):
    """(hidden states, loss and gradients) of the model and of torch, as numpy arrays by the names of ``names``.

    Args:
      names: of our parameter -> (torch's parameter, its array -> ours).
    """
    torch.manual_seed(0)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = dict(reference.named_parameters())
    params: dict = {}
    for (part, name), (key, turn) in names.items():
        params.setdefault(part, {})[name] = np.ascontiguousarray(turn(theirs[key].detach().numpy()))

    def loss(params):
        x_BLD = model.apply({"params": params}, ROWS[:, :-1])
        sums = vocabulary_sums(x_BLD, model.output_table(params), ROWS[:, 1:], jnp.ones((B, L)))
        return sums.loss, model.apply({"params": params}, x_BLD, method="logits")

    (value, logits_BLV), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected = reference(torch.tensor(ROWS[:, :-1]))
    expected_loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), torch.tensor(ROWS[:, 1:]).flatten(), reduction="sum"
    )
    expected_loss.backward()
    np.testing.assert_allclose(logits_BLV, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(value, expected_loss.item(), rtol=1e-5)
    for (part, name), (key, turn) in names.items():
        gradient = turn(theirs[key].grad.numpy())
        np.testing.assert_allclose(grads[part][name], gradient, atol=1e-5 * max(1, np.abs(gradient).max()), err_msg=key)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


HEAD = {("head", "embedding"): ("head.weight", np.asarray), ("head", "bias"): ("head.bias", np.asarray)}
TOKEN = {("token", "embedding"): ("token.weight", np.asarray)}


class TorchLSTM(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token = torch.nn.Embedding(V, D)
        self.layers = torch.nn.LSTM(D, D, num_layers=2, batch_first=True)
        # torch adds two biases, which is one: ours is the first.
        del self.layers.bias_hh_l0, self.layers.bias_hh_l1
        for number in range(2):
            self.layers.register_buffer(f"bias_hh_l{number}", torch.zeros(4 * D))
        self.head = torch.nn.Linear(D, V)

    def forward(self, tokens):
        return self.head(self.layers(self.token(tokens))[0])


def test_the_lstm_is_torchs():
    """torch's gates stand one after another in rows: input, forget, cell, output, as ours do."""
    layers = {}
    for number in range(2):
        for ours, theirs in (("input_kernel", "weight_ih"), ("recurrent_kernel", "weight_hh")):
            layers[f"layers_{number}", ours] = f"layers.{theirs}_l{number}", lambda x: x.T.reshape(D, 4, D)
        layers[f"layers_{number}", "bias"] = f"layers.bias_ih_l{number}", lambda x: x.reshape(4, D)
    both(LSTMLanguageModel(LSTMConfig(vocab_size=V, width=D)), TorchLSTM(), TOKEN | layers | HEAD)


class TorchConvolutions(torch.nn.Module):
    def __init__(self, kernel_width):
        super().__init__()
        self.token = torch.nn.Embedding(V, D)
        self.layers = torch.nn.ModuleList(torch.nn.Conv1d(D, 2 * D, kernel_width) for _ in range(3))
        self.head = torch.nn.Linear(D, V)

    def forward(self, tokens):
        x = self.token(tokens).transpose(1, 2)
        for number, layer in enumerate(self.layers):
            past = layer.kernel_size[0] - 1
            out = torch.nn.functional.glu(layer(torch.nn.functional.pad(x, (past, 0))), dim=1)
            x = out if number == 0 else (x + out) * 0.5**0.5
        return self.head(x.transpose(1, 2))


def test_gated_convolutions_are_torchs():
    layers = {}
    for number in range(3):
        # [2F, D, K], values before gates, to [K, D, 2, F]
        layers[f"layers_{number}", "kernel"] = (
            f"layers.{number}.weight",
            lambda x: x.transpose(2, 1, 0).reshape(4, D, 2, D),
        )
        layers[f"layers_{number}", "bias"] = f"layers.{number}.bias", lambda x: x.reshape(2, D)
    config = ConvConfig(vocab_size=V, num_layers=3, embedding_width=D, width=D, kernel_width=4, dropout=0.0)
    both(ConvLanguageModel(config), TorchConvolutions(4), TOKEN | layers | HEAD)
