"""The BERT encoder in a training loop of one's own."""

import jax
import optax

from bert_flax.model import BertConfig, BertEncoder

encoder = BertEncoder(BertConfig(vocab_size=100, num_layers=2, width=64, num_heads=4, mlp_width=128))
tokens = jax.random.randint(jax.random.key(0), (64, 16), 0, 100)
labels = tokens[:, 1] < tokens[:, 2]
params = {"encoder": encoder.init(jax.random.key(1), tokens)["params"], "head": jax.numpy.zeros(64)}
optimizer = optax.adamw(1e-3)
opt_state = optimizer.init(params)


def loss(params, key):
    _, pooled = encoder.apply({"params": params["encoder"]}, tokens, deterministic=False, rngs={"dropout": key})
    return optax.sigmoid_binary_cross_entropy(pooled @ params["head"], labels).mean()


@jax.jit
def step(params, opt_state, key):
    value, grads = jax.value_and_grad(loss)(params, key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


for number, key in enumerate(jax.random.split(jax.random.key(2), 30)):
    params, opt_state, value = step(params, opt_state, key)
    print(f"step {number}: loss {value:.3f}")
