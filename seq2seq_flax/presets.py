"""Named settings. Base and big are the paper's (Vaswani et al. 2017, arXiv 1706.03762, table 3 and section 5)."""

from collections.abc import Callable

from core_flax.config import CheckpointConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from seq2seq_flax.config import InputsConfig, TransformerConfig, TranslateConfig


def _paper(width: int, num_heads: int, dropout: float, num_steps: int) -> TranslateConfig:
    """The paper's recipe; the learning rate is its ``width ** -0.5 * warmup ** -0.5`` at the end of the warmup.

    A step has 96 rows of 256 tokens, 24,576 of each language, where the paper has "approximately 25000".
    """
    warmup = 4000
    return TranslateConfig(
        model=TransformerConfig(width=width, num_heads=num_heads, mlp_width=4 * width, dropout=dropout),
        inputs=InputsConfig(row_length=256, label_smoothing=0.1),
        optimizer=OptimizerConfig(
            learning_rate=(width * warmup) ** -0.5,
            weight_decay=0.0,
            clip_norm=None,
            beta2=0.98,
            epsilon=1e-9,
        ),
        schedule=ScheduleConfig(name="inverse_sqrt", warmup_steps=warmup),
        train=TrainConfig(num_steps=num_steps, batch_size=96, eval_every_steps=5000),
        checkpoint=CheckpointConfig(every_steps=1500, keep_last=5),
    )


def transformer_base() -> TranslateConfig:
    """6 + 6 layers, 512 wide, 8 heads: the paper's base model, 100,000 steps."""
    return _paper(width=512, num_heads=8, dropout=0.1, num_steps=100_000)


def transformer_big() -> TranslateConfig:
    """6 + 6 layers, 1024 wide, 16 heads: the paper's big model, 300,000 steps (dropout as for English-German)."""
    return _paper(width=1024, num_heads=16, dropout=0.3, num_steps=300_000)


def transformer_tiny() -> TranslateConfig:
    """4 + 4 layers, 128 wide, 4 heads: for 30,000 pairs, as Multi30k has.

    The recipe of Wu et al. 2021 (arXiv 2105.14462): a joint vocabulary of 10,000 pieces, dropout 0.3, learning rate
    0.005 after 2000 steps of warmup, 8000 steps of 8192 tokens, the last ten checkpoints averaged.
    """
    return TranslateConfig(
        model=TransformerConfig(vocab_size=10_000, num_layers=4, width=128, num_heads=4, mlp_width=256, dropout=0.3),
        inputs=InputsConfig(row_length=128, label_smoothing=0.1),
        optimizer=OptimizerConfig(learning_rate=0.005, weight_decay=0.0, clip_norm=None, beta2=0.98),
        schedule=ScheduleConfig(name="inverse_sqrt", warmup_steps=2000),
        train=TrainConfig(num_steps=8000, batch_size=64, eval_every_steps=400),
        checkpoint=CheckpointConfig(every_steps=100, keep_last=10),
    )


PRESETS: dict[str, Callable[[], TranslateConfig]] = {
    preset.__name__: preset for preset in (transformer_tiny, transformer_base, transformer_big)
}
