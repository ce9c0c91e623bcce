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


Tying = Literal["all", "target", "none"]
Reading = Literal["backward", "forward", "both"]


@dataclass(frozen=True)
class ModernConfig:
    """The architecture: norm before each sublayer, RMSNorm, rotary positions, gated feed-forward network, no biases."""

    vocab_size: int = 37000
    """Entries of the embedding, one vocabulary for both languages. Left at the preset's, it becomes the size of the
    data's vocabulary; a larger one pads the tables."""
    num_layers: int = 6
    """Blocks of the encoder, and of the decoder."""
    width: int = 512
    """Width of the hidden states."""
    num_heads: int = 8
    """Attention heads per block; must divide width, into heads of even width."""
    mlp_width: int = 1408
    """Width of the feed-forward layer. It has three matrices rather than two: for as many parameters, two thirds of the
    width that one without a gate has."""
    tied_embeddings: Tying = "all"
    """all: one table embeds source and target and is the output layer as well; target: the target's is the output layer
    as well, the source has its own; none: three tables."""
    rope_theta: float = 10000.0
    """Base of the rotary angles: the larger, the slower the slowest turn."""
    dropout: float = 0.1
    """Share dropped from the embeddings and from the output of every sublayer."""
    attention_dropout: float = 0.0
    """Share dropped from attention probabilities."""
    activation_dropout: float = 0.0
    """Share dropped from the hidden layer of the feed-forward network."""
    norm_epsilon: float = 1e-5
    """Term added to the mean square in RMS normalisation."""
    remat: Remat = "elementwise"
    """What the backward pass computes again rather than keep in memory: nothing, all but the matrix products, or each
    block from its input. Changes results by rounding at most."""
    unroll: int | None = None
    """Layers computed by one turn of the loop over them: more means fewer copies and longer to compile. None: one; on a
    CPU all. Changes results by rounding at most."""

    FREE: ClassVar = frozenset({"remat", "unroll"})

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        check_range("model", self, "vocab_size", "num_layers", "width", "num_heads", "mlp_width", "unroll", least=1)
        check_range("model", self, "dropout", "attention_dropout", "activation_dropout", least=0, below=1)
        check_range("model", self, "norm_epsilon", above=0)
        check_range("model", self, "rope_theta", above=1)
        if self.width % (2 * self.num_heads):
            raise UserError(
                f"--model.width {self.width} must divide by twice --model.num-heads {self.num_heads}: "
                "rotary positions need heads of even width"
            )


@dataclass(frozen=True)
class RecurrentConfig:
    """What every recurrent architecture has."""

    vocab_size: int = 37000
    """Entries of the embeddings, one vocabulary for both languages. Left at the preset's, it becomes the size of the
    data's vocabulary; a larger one pads the tables."""
    num_layers: int = 4
    """LSTM layers of the encoder, and of the decoder."""
    width: int = 1000
    """Width of embeddings, hidden states and cells."""
    tied_embeddings: Tying = "none"
    """all: one table embeds source and target and is the output layer as well; target: the target's is the output layer
    as well, the source has its own; none: three tables, as in the papers."""
    dropout: float = 0.0
    """Share dropped from what goes into each layer and into the output layer, never from what a layer hands to its own
    next step (Zaremba et al. 2014, arXiv 1409.2329, section 3.1)."""
    init_limit: float = 0.1
    """Every parameter begins uniformly between minus this and this."""
    forget_bias: float = 0.0
    """Added to the biases of forget gates at the start; 1 keeps what was read (Jozefowicz et al. 2015)."""

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        check_range("model", self, "vocab_size", "num_layers", "width", least=1)
        check_range("model", self, "dropout", least=0, below=1)
        check_range("model", self, "init_limit", above=0)
        check_range("model", self, "forget_bias")


@dataclass(frozen=True)
class LSTMSeq2SeqConfig(RecurrentConfig):
    """The architecture: Sutskever et al. 2014's with these sizes."""

    init_limit: float = 0.08
    """Every parameter begins uniformly between minus this and this."""
    reading: Reading = "backward"
    """How the source is read: from right to left, so that the first words of both languages are near each other
    (section 3.3), from left to right, or both, half of the width each."""

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        super().__post_init__()
        _check_halves(self)


@dataclass(frozen=True)
class LSTMAttentionConfig(RecurrentConfig):
    """The architecture: Luong et al. 2015's global attention with these sizes."""

    score: Literal["dot", "general", "additive"] = "general"
    """How well a token of the source fits the decoder's state: their product, a product by way of a matrix (Luong et
    al. 2015, section 3.1), or a network with one hidden layer (Bahdanau et al. 2015, appendix A.1.2)."""
    input_feeding: bool = True
    """What attention made of a token goes into the next step with the next token (Luong et al. 2015, section 3.3)."""
    reading: Reading = "backward"
    """How the source is read: from right to left as Luong et al. do, from left to right, or both, half of the width
    each, as Bahdanau et al. do."""

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        super().__post_init__()
        _check_halves(self)


def _check_halves(config: LSTMSeq2SeqConfig | LSTMAttentionConfig) -> None:
    if config.reading == "both" and config.width % 2:
        raise UserError(f"--model.width {config.width} must be even to be halved by --model.reading both")


@dataclass(frozen=True)
class GNMTConfig(RecurrentConfig):
    """The architecture: Wu et al. 2016's with these sizes."""

    num_layers: int = 8
    """LSTM layers of the encoder, whose first one reads in both directions, and of the decoder; 2 or more."""
    width: int = 1024
    """Width of embeddings, hidden states and cells, and of the hidden layer of attention; the encoder's first layer has
    it in each direction."""
    dropout: float = 0.2
    """Share dropped from what goes into each layer and into the output layer, never from what a layer hands to its own
    next step (Zaremba et al. 2014, arXiv 1409.2329, section 3.1)."""
    init_limit: float = 0.04
    """Every parameter begins uniformly between minus this and this."""

    def __post_init__(self) -> None:
        """Raises UserError on sizes that make no model."""
        super().__post_init__()
        check_range("model", self, "num_layers", least=2)


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
class TranslateSettings(RunConfig):
    """Training of an encoder-decoder on sentence pairs: all but the model, of which each architecture has its own."""

    inputs: InputsConfig = InputsConfig()


@dataclass(frozen=True)
class TranslateConfig(TranslateSettings):
    """Training of a Transformer."""

    model: TransformerConfig = TransformerConfig()


@dataclass(frozen=True)
class ModernTranslateConfig(TranslateSettings):
    """Training of a Transformer of later make."""

    model: ModernConfig = ModernConfig()


@dataclass(frozen=True)
class LSTMSeq2SeqTranslateConfig(TranslateSettings):
    """Training of LSTMs without attention."""

    model: LSTMSeq2SeqConfig = LSTMSeq2SeqConfig()


@dataclass(frozen=True)
class LSTMAttentionTranslateConfig(TranslateSettings):
    """Training of LSTMs with attention."""

    model: LSTMAttentionConfig = LSTMAttentionConfig()


@dataclass(frozen=True)
class GNMTTranslateConfig(TranslateSettings):
    """Training of a GNMT."""

    model: GNMTConfig = GNMTConfig()


ModelConfig = TransformerConfig | ModernConfig | LSTMSeq2SeqConfig | LSTMAttentionConfig | GNMTConfig
"""Any architecture."""

AnyTranslateConfig = (
    TranslateConfig
    | ModernTranslateConfig
    | LSTMSeq2SeqTranslateConfig
    | LSTMAttentionTranslateConfig
    | GNMTTranslateConfig
)
"""The settings of a run of any architecture; a preset's and a command's are of one of these classes."""
