"""Named settings. Base and big are the paper's (Vaswani et al. 2017, arXiv 1706.03762, table 3 and section 5).

The recurrent models' sizes, dropout, first parameters and clipping are those of their papers. Adam stands for their SGD
with rates lowered by hand, and the gradients that we clip are those of a token, where theirs are of a sentence.
"""

import dataclasses
from collections.abc import Callable

from core_flax.config import CheckpointConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from seq2seq_flax.config import (
    AnyTranslateConfig,
    GNMTConfig,
    GNMTTranslateConfig,
    InputsConfig,
    LSTMAttentionConfig,
    LSTMAttentionTranslateConfig,
    LSTMSeq2SeqConfig,
    LSTMSeq2SeqTranslateConfig,
    ModernConfig,
    ModernTranslateConfig,
    TransformerConfig,
    TranslateConfig,
    TranslateSettings,
)


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


def numbers_demo() -> TranslateConfig:
    """2 + 2 layers, 128 wide: learns to say in German what numbers are called in English, in minutes on 2 cores."""
    return TranslateConfig(
        model=TransformerConfig(vocab_size=300, num_layers=2, width=128, num_heads=4, mlp_width=256, dropout=0.0),
        inputs=InputsConfig(row_length=96, label_smoothing=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0, beta2=0.98),
        schedule=ScheduleConfig(name="linear", warmup_steps=100),
        train=TrainConfig(num_steps=400, batch_size=16, eval_every_steps=100),
        checkpoint=CheckpointConfig(every_steps=200),
    )


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


def multilingual() -> TranslateConfig:
    """4 + 4 layers, 256 wide, 4 heads: several languages in one model, for some 100,000 pairs of all together.

    As in Johnson et al. 2016 (arXiv 1611.04558), nothing of the model is a language's own: prepare --pair, given for
    each pair of languages, begins every source with a piece that names the language wanted.
    """
    return TranslateConfig(
        model=TransformerConfig(vocab_size=16_000, num_layers=4, width=256, num_heads=4, mlp_width=512, dropout=0.2),
        inputs=InputsConfig(row_length=128, label_smoothing=0.1),
        optimizer=OptimizerConfig(learning_rate=0.002, weight_decay=0.0, clip_norm=None, beta2=0.98),
        schedule=ScheduleConfig(name="inverse_sqrt", warmup_steps=1000),
        train=TrainConfig(num_steps=6000, batch_size=32, eval_every_steps=500),
        checkpoint=CheckpointConfig(every_steps=200, keep_last=10),
    )


def _as_modern(recipe: TranslateConfig, model: ModernConfig) -> ModernTranslateConfig:
    """A Transformer's recipe for a modern one."""
    shared = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(TranslateSettings)}
    return ModernTranslateConfig(**shared, model=model)


def transformer_modern() -> ModernTranslateConfig:
    """6 + 6 layers, 512 wide, 8 heads: transformer_base's recipe for norms before sublayers, RMSNorm, RoPE, SwiGLU.

    63,787,008 parameters with a vocabulary of 37,000.
    """
    return _as_modern(transformer_base(), ModernConfig())


def transformer_modern_tiny() -> ModernTranslateConfig:
    """4 + 4 layers, 128 wide, 4 heads: transformer_tiny's recipe, likewise.

    2,609,920 parameters with a vocabulary of 10,000.
    """
    model = ModernConfig(vocab_size=10_000, num_layers=4, width=128, num_heads=4, mlp_width=176, dropout=0.3)
    return _as_modern(transformer_tiny(), model)


_PAPER_LSTM = {
    # 128 sentences a step of some 30 tokens, as the papers have it.
    "inputs": InputsConfig(row_length=64, label_smoothing=0.0),
    "optimizer": OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, clip_norm=5.0),
    "schedule": ScheduleConfig(name="linear", warmup_steps=200),
    "train": TrainConfig(num_steps=300_000, batch_size=64, eval_every_steps=5000),
    "checkpoint": CheckpointConfig(every_steps=5000, keep_last=5),
}

_SMALL_LSTM = {
    # Rows are no longer than sentences make necessary: an LSTM takes them token by token. With 120 of them 96 in 100
    # tokens of Multi30k are real; with 128 it would be 94.6, as an epoch would have a step or so left over.
    "inputs": InputsConfig(row_length=64, label_smoothing=0.1),
    "optimizer": OptimizerConfig(learning_rate=2e-3, weight_decay=0.0, clip_norm=5.0),
    "schedule": ScheduleConfig(name="linear", warmup_steps=200),
    "train": TrainConfig(num_steps=2000, batch_size=120, eval_every_steps=200),
    "checkpoint": CheckpointConfig(every_steps=100, keep_last=5),
}
"""For 30,000 pairs, as Multi30k has, and the same for all three."""


def lstm_seq2seq() -> LSTMSeq2SeqTranslateConfig:
    """4 + 4 LSTM layers, 1000 wide, no attention: Sutskever et al. 2014 (arXiv 1409.3215, section 3.4).

    175,032,000 parameters with a vocabulary of 37,000; the paper's own of 160,000 and 80,000 words make it 384 million.
    """
    return LSTMSeq2SeqTranslateConfig(**_PAPER_LSTM, model=LSTMSeq2SeqConfig())


def lstm_attention() -> LSTMAttentionTranslateConfig:
    """4 + 4 LSTM layers, 1000 wide, global attention, input feeding: Luong et al. 2015 (arXiv 1508.04025, section 4.1).

    182,032,000 parameters with a vocabulary of 37,000. --model.score additive --model.reading both is nearer to
    Bahdanau et al. 2015 (arXiv 1409.0473).
    """
    return LSTMAttentionTranslateConfig(**_PAPER_LSTM, model=LSTMAttentionConfig(dropout=0.2))


def gnmt() -> GNMTTranslateConfig:
    """8 + 8 LSTM layers, 1024 wide: Wu et al. 2016 (arXiv 1609.08144, sections 3 and 8.2).

    296,186,880 parameters with a vocabulary of 37,000. Adam at the paper's rate of 0.0002 throughout, without its SGD.
    """
    config = GNMTTranslateConfig(**_PAPER_LSTM, model=GNMTConfig())
    optimizer = dataclasses.replace(config.optimizer, learning_rate=2e-4)
    return dataclasses.replace(config, optimizer=optimizer, schedule=ScheduleConfig("constant", warmup_steps=200))


def lstm_seq2seq_small() -> LSTMSeq2SeqTranslateConfig:
    """2 + 2 LSTM layers, 256 wide, no attention: lstm_seq2seq for 30,000 pairs, with dropout and one embedding table.

    4,661,248 parameters with a vocabulary of 10,000.
    """
    model = LSTMSeq2SeqConfig(10_000, num_layers=2, width=256, tied_embeddings="all", dropout=0.3, forget_bias=1.0)
    return LSTMSeq2SeqTranslateConfig(**_SMALL_LSTM, model=model)


def lstm_attention_small() -> LSTMAttentionTranslateConfig:
    """2 + 2 LSTM layers, 256 wide, attention: lstm_attention for 30,000 pairs, by the recipe of lstm_seq2seq_small.

    5,120,000 parameters with a vocabulary of 10,000.
    """
    model = LSTMAttentionConfig(10_000, num_layers=2, width=256, tied_embeddings="all", dropout=0.3, forget_bias=1.0)
    return LSTMAttentionTranslateConfig(**_SMALL_LSTM, model=model)


def gnmt_small() -> GNMTTranslateConfig:
    """4 + 4 LSTM layers, 256 wide: gnmt for 30,000 pairs, by the recipe of lstm_seq2seq_small.

    8,729,856 parameters with a vocabulary of 10,000.
    """
    model = GNMTConfig(
        10_000, num_layers=4, width=256, tied_embeddings="all", dropout=0.3, init_limit=0.1, forget_bias=1.0
    )
    return GNMTTranslateConfig(**_SMALL_LSTM, model=model)


PRESETS: dict[str, Callable[[], AnyTranslateConfig]] = {
    preset.__name__: preset
    for preset in (
        numbers_demo,
        transformer_tiny,
        transformer_base,
        transformer_big,
        multilingual,
        transformer_modern,
        transformer_modern_tiny,
        lstm_seq2seq,
        lstm_seq2seq_small,
        lstm_attention,
        lstm_attention_small,
        gnmt,
        gnmt_small,
    )
}
