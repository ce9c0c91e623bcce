"""Named settings. ``bert-flax presets`` lists them, ``bert-flax pretrain NAME`` runs them.

The sizes from tiny to large are those of Turc et al. 2019 (arXiv 1908.08962) and Devlin et al. 2018; the recipe is the
paper's (appendix A.2): a million steps of 256 sequences, nine tenths of them 128 tokens long and the last tenth 512,
AdamW with learning rate 1e-4, 10,000 steps of warmup, linear decay, weight decay 0.01, dropout 0.1.
"""

from collections.abc import Callable

from bert_flax.config import BertConfig, InputsConfig, PretrainConfig
from core_flax.config import CheckpointConfig, OptimizerConfig, ScheduleConfig, TrainConfig

OWN_TEXT_VOCAB_SIZE = 4096
"""Vocabulary of the text that Python ships, half a megabyte: more would be words that occur once."""


def _paper(num_layers: int, width: int) -> PretrainConfig:
    """The paper's recipe for a model of this depth and width; heads are 64 wide, the feed-forward layer 4 x width."""
    return PretrainConfig(
        model=BertConfig(num_layers=num_layers, width=width, num_heads=width // 64, mlp_width=4 * width),
        inputs=InputsConfig(length=128, max_predictions=20, long_from_step=900_000),
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.01, epsilon=1e-6),
        schedule=ScheduleConfig(name="linear", warmup_steps=10_000),
        train=TrainConfig(num_steps=1_000_000, batch_size=256, eval_every_steps=10_000, eval_batches=100),
        checkpoint=CheckpointConfig(every_steps=10_000),
    )


def bert_tiny() -> PretrainConfig:
    """2 layers, 128 wide. For trying things out."""
    return _paper(2, 128)


def bert_mini() -> PretrainConfig:
    """4 layers, 256 wide."""
    return _paper(4, 256)


def bert_small() -> PretrainConfig:
    """4 layers, 512 wide."""
    return _paper(4, 512)


def bert_medium() -> PretrainConfig:
    """8 layers, 512 wide."""
    return _paper(8, 512)


def bert_base() -> PretrainConfig:
    """12 layers, 768 wide."""
    return _paper(12, 768)


def bert_large() -> PretrainConfig:
    """24 layers, 1024 wide."""
    return _paper(24, 1024)


def bert_demo() -> PretrainConfig:
    """2 layers, 128 wide, 64 tokens long: learns from the text that Python ships, in minutes on 2 cores.

    Muon rather than the paper's AdamW, and no dropout: it is to learn in a thousand steps what it can.
    """
    return PretrainConfig(
        model=BertConfig(
            vocab_size=OWN_TEXT_VOCAB_SIZE,
            num_layers=2,
            width=128,
            num_heads=4,
            mlp_width=512,
            max_length=64,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        inputs=InputsConfig(length=64, max_predictions=10),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, beta2=0.98),
        schedule=ScheduleConfig(name="linear", warmup_steps=100),
        train=TrainConfig(num_steps=1200, batch_size=32, eval_every_steps=400),
        checkpoint=CheckpointConfig(every_steps=400),
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    preset.__name__: preset
    for preset in (bert_demo, bert_tiny, bert_mini, bert_small, bert_medium, bert_base, bert_large)
}
