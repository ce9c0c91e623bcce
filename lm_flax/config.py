"""The settings of a run: one class for each architecture, alike but for the model."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from core_flax.config import RunConfig, check_range
from core_flax.types import UserError
from lm_flax.architectures import context
from lm_flax.convolution import ConvConfig
from lm_flax.llama import LlamaConfig
from lm_flax.model import GPT2Config
from lm_flax.recurrent import LSTMConfig
from lm_flax.speedrun import SpeedrunConfig
from lm_flax.windows import WindowsConfig
from lm_flax.word2vec import Word2VecConfig


@dataclass(frozen=True)
class InputsConfig:
    """How the stream of tokens becomes rows. Rows are cut in order, so that all of their tokens are real."""

    length: int = 1024
    """Tokens of a row."""
    packing: Literal["documents", "stream"] = "documents"
    """documents: a row may hold several, or parts of them, which do not see each other and whose positions start anew;
    stream: all of a row sees what is before it."""
    order: Literal["shuffled", "random", "streams"] = "shuffled"
    """shuffled: epochs of all rows, each in an order of its own and cut at a place of its own; random: every row begins
    at a place drawn by itself, as in nanoGPT; streams: as many stretches of the text as a batch has rows, each read on
    and on by a recurrent model that keeps its state from step to step."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("inputs", self, "length", least=1)


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy of the next token."""

    z_weight: float = 0.0
    """Weight of the z-loss, the squared logarithm of the softmax's denominator, which keeps that near 1 (Chowdhery et
    al. 2022, section 5); 0: none."""
    num_chunks: int = 1
    """Portions of the positions in which the vocabulary is scored: memory for logits falls as 1 / num_chunks. Changes
    results by rounding at most."""

    FREE: ClassVar = frozenset({"num_chunks"})

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("loss", self, "z_weight", least=0)
        check_range("loss", self, "num_chunks", least=1)


@dataclass(frozen=True)
class LMConfig(RunConfig):
    """What every language model's run has."""

    inputs: InputsConfig = InputsConfig()
    loss: LossConfig = LossConfig()
    sample_tokens: int = 0
    """Tokens to generate and show when the run ends, on one device; 0: none."""

    FREE: ClassVar = frozenset({"sample_tokens"})

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        super().__post_init__()
        check_range("", self, "sample_tokens", least=0)


@dataclass(frozen=True)
class GPT2Run(LMConfig):
    """A run of GPT-2's architecture."""

    model: GPT2Config = GPT2Config()


@dataclass(frozen=True)
class LlamaRun(LMConfig):
    """A run of Llama's architecture."""

    model: LlamaConfig = LlamaConfig()


@dataclass(frozen=True)
class SpeedrunRun(LMConfig):
    """A run of the architecture that learns fast."""

    model: SpeedrunConfig = SpeedrunConfig()


@dataclass(frozen=True)
class ConvRun(LMConfig):
    """A run of convolutions."""

    model: ConvConfig = ConvConfig()


@dataclass(frozen=True)
class LSTMRun(LMConfig):
    """A run of an LSTM."""

    model: LSTMConfig = LSTMConfig()


@dataclass(frozen=True)
class Word2VecRun(RunConfig):
    """A run of word vectors."""

    model: Word2VecConfig = Word2VecConfig()
    inputs: WindowsConfig = WindowsConfig()


AnyLM = GPT2Run | LlamaRun | SpeedrunRun | ConvRun | LSTMRun
AnyRun = AnyLM | Word2VecRun

LM_KINDS: dict[str, type[AnyLM]] = {
    "lm_flax.gpt2": GPT2Run,
    "lm_flax.llama": LlamaRun,
    "lm_flax.speedrun": SpeedrunRun,
    "lm_flax.conv": ConvRun,
    "lm_flax.lstm": LSTMRun,
}
KINDS: dict[str, type[AnyRun]] = {**LM_KINDS, "lm_flax.word2vec": Word2VecRun}
"""The class of the settings by the kind of a run; those above predict the next token."""


def kind_of(config: AnyRun) -> str:
    """The kind of a run with these settings."""
    return next(kind for kind, cls in KINDS.items() if type(config) is cls)


def check_rows(config: AnyLM) -> None:
    """Raises UserError if rows and model do not fit each other."""
    most = context(config.model)
    if most is not None and config.inputs.length > most:
        raise UserError(
            f"--inputs.length {config.inputs.length} exceeds --model.max-length {most}, the tokens that the model can "
            "take"
        )
    if config.inputs.order == "streams" and not isinstance(config.model, LSTMConfig):
        raise UserError(
            "--inputs.order streams: this model keeps no state from step to step; choose shuffled or random"
        )
