"""The settings of a pretraining run."""

from dataclasses import dataclass

from bert_flax.examples import InputsConfig
from bert_flax.model import BertConfig
from core_flax.config import RunConfig

__all__ = ["BertConfig", "InputsConfig", "PretrainConfig"]


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Masked-language and next-sentence pretraining."""

    model: BertConfig = BertConfig()
    inputs: InputsConfig = InputsConfig()
