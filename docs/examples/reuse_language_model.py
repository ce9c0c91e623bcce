"""A Llama in a training loop of one's own, and what it then generates."""

import jax
import jax.numpy as jnp
import optax

from core_flax.decode import generate
from lm_flax.llama import Llama, LlamaConfig

model = Llama(LlamaConfig(vocab_size=12, num_layers=2, width=48, num_heads=4, num_kv_heads=2, mlp_width=96))
tokens = (jnp.arange(16)[:, None] + jnp.arange(24)) % 12  # rows that count, each from a number of its own
params = model.init(jax.random.key(0), tokens)["params"]
optimizer = optax.adamw(1e-2)


def loss(params):
    hidden = model.apply({"params": params}, tokens[:, :-1])
    logits = model.apply({"params": params}, hidden, method="logits")
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def step(params, opt_state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


opt_state = optimizer.init(params)
for _ in range(40):
    params, opt_state, value = step(params, opt_state)
print(f"loss {value:.3f}")
prompts = jnp.array([[3, 4, 5], [9, 0, 0]])  # the second is one token long: the rest is padding
cache = model.init_cache(batch_size=2, length=3 + 8)
done = generate(model, params, cache, prompts, num_prompt_B=jnp.array([3, 1]), length=8)
print(done.tokens_BL)
