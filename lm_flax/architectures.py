"""The architectures, by the class of their settings: all that the task and the commands need to know of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from core_flax.params import ParamRule
from core_flax.types import Array, Params
from lm_flax import convolution, llama, model, recurrent, sharding, speedrun
from lm_flax.convolution import ConvConfig, ConvLanguageModel
from lm_flax.llama import Llama, LlamaConfig
from lm_flax.model import GPT2, GPT2Config
from lm_flax.recurrent import LSTMConfig, LSTMLanguageModel
from lm_flax.speedrun import Speedrun, SpeedrunConfig

ModelConfig = GPT2Config | LlamaConfig | SpeedrunConfig | LSTMConfig | ConvConfig


@dataclass(frozen=True)
class Architecture:
    """One of them.

    Attributes:
      module: the model: (config, dtype) -> a module with ``__call__``, ``output_table`` and what core_flax.cache wants.
      rules: its parameter table.
      axis_fields: the settings that decide sizes, for messages.
      flops_per_example: (config, length) -> operations of a training row.
    """

    module: Callable[[Any, Any], nn.Module]
    rules: tuple[ParamRule, ...]
    axis_fields: Mapping[str, str]
    flops_per_example: Callable[[Any, int], float]


ARCHITECTURES: dict[type, Architecture] = {
    GPT2Config: Architecture(GPT2, sharding.GPT2_RULES, sharding.AXIS_FIELDS, model.flops_per_example),
    LlamaConfig: Architecture(Llama, sharding.LLAMA_RULES, sharding.AXIS_FIELDS, llama.flops_per_example),
    SpeedrunConfig: Architecture(Speedrun, sharding.SPEEDRUN_RULES, sharding.AXIS_FIELDS, speedrun.flops_per_example),
    LSTMConfig: Architecture(
        LSTMLanguageModel, sharding.LSTM_RULES, sharding.LSTM_AXIS_FIELDS, recurrent.flops_per_example
    ),
    ConvConfig: Architecture(
        ConvLanguageModel, sharding.CONV_RULES, sharding.CONV_AXIS_FIELDS, convolution.flops_per_example
    ),
}


def make_model(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """The model of these settings. (Any: its methods are those of its class.)"""
    return ARCHITECTURES[type(config)].module(config, dtype)


def init_params(model: Any, key: Array) -> Params:
    """Parameters to begin with."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a model, without making any."""
    shapes = jax.eval_shape(lambda key: init_params(make_model(config), key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def soft_cap(config: ModelConfig) -> float | None:
    """What caps the logits after their product with the output table; None: nothing."""
    return config.soft_cap if isinstance(config, SpeedrunConfig) else None


def context(config: ModelConfig) -> int | None:
    """Tokens that a sequence may have; None: any number."""
    return None if isinstance(config, LSTMConfig | ConvConfig) else config.max_length
