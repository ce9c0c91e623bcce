"""A step on a mesh that splits rows, parameters and heads gives the loss and the gradients of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, model_of, random_params, tokens

from core_flax import sharding
from core_flax.config import MeshConfig
from core_flax.losses import vocabulary_sums
from core_flax.types import UserError
from lm_flax.model import GPT2Config
from lm_flax.sharding import AXIS_FIELDS, GPT2_RULES, LLAMA_RULES

B, L = 4, 10


def rules_of(config):
    return GPT2_RULES if isinstance(config, GPT2Config) else LLAMA_RULES


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=["fsdp", "fsdp and tensor"])
@pytest.mark.parametrize("name", ["gpt2", "llama_grouped_tied"])
def test_a_mesh_changes_nothing(name, sizes):
    config = dataclasses.replace(CONFIGS[name], vocab_size=64)
    model, params = model_of(config), random_params(config)
    batch = tokens(B, L), tokens(B, L, seed=2)

    def loss(params, tokens_BL, labels_BL):
        x_BLD = model.apply({"params": params}, tokens_BL)
        return vocabulary_sums(x_BLD, model.output_table(params), labels_BL, jnp.ones((B, L)), num_chunks=2).loss

    expected = jax.jit(jax.value_and_grad(loss))(params, *batch)
    mesh = sharding.make_mesh(MeshConfig(data=1, **sizes), jax.devices()[:4])
    placed = jax.device_put(params, sharding.param_shardings(params, rules_of(config), mesh, AXIS_FIELDS))
    rows = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in batch]
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss))(placed, *rows)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), found, expected)


def test_heads_that_cannot_be_split_are_named():
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=64, num_kv_heads=1)
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with pytest.raises(UserError, match=r"--model\.num-kv-heads = 1 cannot be split 2 ways"):
        sharding.param_shardings(random_params(config), LLAMA_RULES, mesh, AXIS_FIELDS)
