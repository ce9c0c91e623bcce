"""A Transformer that learns to write backwards in a training loop of one's own, and beam search with it."""

import jax
import jax.numpy as jnp
import optax

from core_flax.beam import BeamSearch, beam_search
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.model import Transformer

START, END = 1, 2
model = Transformer(TransformerConfig(vocab_size=13, num_layers=1, width=64, num_heads=4, mlp_width=128, dropout=0.0))
letters = jax.random.randint(jax.random.key(0), (512, 5), 3, 13)
start, end = (jnp.full((512, 1), token) for token in (START, END))
source, target = (jnp.concatenate([x, end], axis=1) for x in (letters, letters[:, ::-1]))
read = jnp.concatenate([start, target[:, :-1]], axis=1)
one_pair_a_row = {"source_sequences_BM": jnp.ones_like(source), "target_sequences_BL": jnp.ones_like(target)}
params = jax.jit(model.init)(jax.random.key(1), source, read, **one_pair_a_row)["params"]
optimizer = optax.adam(3e-3)


def loss(params):
    logits = model.apply({"params": params}, source, read, **one_pair_a_row)
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


@jax.jit
def step(params, opt_state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


opt_state = optimizer.init(params)
for _ in range(120):
    params, opt_state, value = step(params, opt_state)
print(f"loss {value:.3f}")
unseen = jnp.array([[3, 4, 5, 6, 7, END], [12, 9, 12, 3, 5, END]])
cache = model.apply({"params": params}, unseen, jnp.ones_like(unseen, bool), 8, method="start")
found = beam_search(model, params, cache, start[:2], search=BeamSearch(beam_size=3), length=8, stop=(END,))
print(found.tokens_BCL[:, 0])
