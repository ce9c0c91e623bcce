"""The settings of a translation run."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from core_flax.config import RunConfig, check_range
from core_flax.layers import Remat
from core_flax.types import UserError


@dataclass(frozen=True)
class TransformerConfig:
    """The architecture: the paper's with these sizes."""

    vocab_size: int = 37000
    """Entries of the embedding, one table for both languages. Left at the preset's, it becomes the size of the data's
    vocabulary; a larger one pads the table."""
    num_layers: int = 6
    """Blocks of the encoder, and of the decoder."""
    width: int = 512
    """Width of the hidden states."""
    num_heads: int = 8
    """Attention heads per block; must divide width."""
    mlp_width: int = 2048
    """Width of the feed-forward layer."""
    tied_embeddings: Literal["all", "target", "none"] = "all"
    """all: one table embeds source and target and is the output layer as well (section 3.4); target: the target's is
    the output layer as well, the source has its own; none: three tables."""
    scale_embeddings: bool = True
    """Multiply embeddings by the root of the width before positions are added (section 3.4)."""
    activation: Literal["relu", "silu", "gelu"] = "relu"
    """Nonlinearity of the feed-forward network; the paper has ReLU (section 3.3), models of Marian's SiLU (swish)."""
    output_bias: bool = False
    """Add a number of its own to every token's score, as models of Marian's do; not in the paper."""
    dropout: float = 0.1
    """Share dropped from the sums of embeddings and positions and from the output of every sublayer (section 5.4)."""
    attention_dropout: float = 0.0
    """Share dropped from attention probabilities; not in the paper."""
    activation_dropout: float = 0.0
    """Share dropped from the hidden layer of the feed-forward network; not in the paper."""
    norm_epsilon: float = 1e-5
    """Term added to the variance in layer normalisation."""
    remat: Remat = "elementwise"
    """What the backward pass computes again rather than keep in memory: nothing, all but the matrix products, or each
    block from its input. Changes results by rounding at most."""
    unroll: int | None = None
    """Layers computed by one turn of the loop over them: more is faster on a CPU and compiles longer. None: all on a
    CPU, one elsewhere. Changes results by rounding at most."""

    FREE: ClassVar = frozenset({"remat", "unroll"})

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        check_range("model", self, "vocab_size", "num_layers", "num_heads", "mlp_width", "unroll", least=1)
        check_range("model", self, "width", least=4)
        check_range("model", self, "dropout", "attention_dropout", "activation_dropout", least=0, below=1)
        check_range("model", self, "norm_epsilon", above=0)
        if self.width % self.num_heads or self.width % 2:
            raise UserError(f"--model.width {self.width} must be even and divide by --model.num-heads {self.num_heads}")


@dataclass(frozen=True)
class InputsConfig:
    """How pairs become batches. A step has train.batch_size rows of row_length tokens: that is its budget."""

    row_length: int = 128
    """Tokens of a row, of the side (source or target) that has more of them in the data; the other side's rows are
    shorter in proportion. At least the longest sentence."""
    packing: bool = True
    """Put as many pairs into a row as fit. False: one pair to a row, the rest of it padding."""
    label_smoothing: float = 0.1
    """Share of the target probability that is spread evenly over the vocabulary (Szegedy et al. 2016, section 7)."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("inputs", self, "row_length", least=8)
        check_range("inputs", self, "label_smoothing", least=0, below=1)


@dataclass(frozen=True)
class TranslateConfig(RunConfig):
    """Training of an encoder-decoder on sentence pairs."""

    model: TransformerConfig = TransformerConfig()
    inputs: InputsConfig = InputsConfig()
