"""Sizes of published models, and runs, which have a recipe as well; ``lm-flax presets`` lists what can be trained."""

import dataclasses
import functools
from collections.abc import Callable

from core_flax.config import CheckpointConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from lm_flax.config import (
    AnyRun,
    ConvRun,
    GPT2Run,
    InputsConfig,
    LlamaRun,
    LossConfig,
    LSTMRun,
    SpeedrunRun,
    Word2VecRun,
)
from lm_flax.convolution import ConvConfig
from lm_flax.llama import LlamaConfig
from lm_flax.model import GPT2Config
from lm_flax.recurrent import LSTMConfig
from lm_flax.speedrun import SpeedrunConfig
from lm_flax.windows import WindowsConfig
from lm_flax.word2vec import Word2VecConfig


def _gpt2(num_layers: int, width: int) -> GPT2Config:
    """GPT-2 of this depth and width; heads are 64 wide, the feed-forward layer 4 x width."""
    return GPT2Config(num_layers=num_layers, width=width, num_heads=width // 64, mlp_width=4 * width)


def gpt2() -> GPT2Config:
    """12 layers, 768 wide, 124,439,808 parameters (Radford et al. 2019, table 2, as released)."""
    return _gpt2(12, 768)


def gpt2_medium() -> GPT2Config:
    """24 layers, 1024 wide, 354,823,168 parameters."""
    return _gpt2(24, 1024)


def gpt2_large() -> GPT2Config:
    """36 layers, 1280 wide, 774,030,080 parameters."""
    return _gpt2(36, 1280)


def gpt2_xl() -> GPT2Config:
    """48 layers, 1600 wide, 1,557,611,200 parameters."""
    return _gpt2(48, 1600)


def llama_150m() -> LlamaConfig:
    """16 layers, 768 wide, 149,840,640 parameters: Llama's architecture at about the size of GPT-2."""
    return LlamaConfig(num_layers=16, width=768, num_heads=12, num_kv_heads=4, mlp_width=2048, max_length=2048)


def llama_1b() -> LlamaConfig:
    """22 layers, 2048 wide, 1,100,048,384 parameters: TinyLlama's sizes (Zhang et al. 2024, arXiv 2401.02385)."""
    return LlamaConfig(num_layers=22, width=2048, num_heads=32, num_kv_heads=4, mlp_width=5632, max_length=2048)


def llama_7b() -> LlamaConfig:
    """32 layers, 4096 wide, 6,738,415,616 parameters: Llama 2's (Touvron et al. 2023, arXiv 2307.09288)."""
    return LlamaConfig()


SIZES: dict[str, Callable[[], GPT2Config | LlamaConfig]] = {
    size.__name__: size for size in (gpt2, gpt2_medium, gpt2_large, gpt2_xl, llama_150m, llama_1b, llama_7b)
}


LEARNING_RATES = {
    gpt2: 6e-4,
    gpt2_medium: 3e-4,
    gpt2_large: 2.5e-4,
    gpt2_xl: 2e-4,
    llama_150m: 6e-4,
    llama_1b: 4e-4,
    llama_7b: 3e-4,
}
"""By size Brown et al. 2020 (arXiv 2005.14165), table 2.1; for the last two those of the papers named above."""


def _published(size: Callable[[], GPT2Config | LlamaConfig]) -> Callable[[], GPT2Run | LlamaRun]:
    """The preset that trains a model of this size as is common (Brown et al. 2020, appendix B).

    Steps of half a million tokens, AdamW with beta2 0.95, weight decay 0.1, cosine decay to a tenth. No dropout: of
    such a stream every token is new.
    """

    @functools.wraps(size)
    def preset() -> GPT2Run | LlamaRun:
        model = size()
        length = model.max_length
        recipe = {
            "inputs": InputsConfig(length=length),
            "loss": LossConfig(num_chunks=8),
            "optimizer": OptimizerConfig(learning_rate=LEARNING_RATES[size], weight_decay=0.1, beta2=0.95),
            "schedule": ScheduleConfig("cosine", warmup_steps=2000, final_fraction=0.1),
            "train": TrainConfig(600_000, batch_size=(1 << 19) // length, eval_every_steps=1000, eval_batches=20),
            "checkpoint": CheckpointConfig(every_steps=1000),
        }
        if isinstance(model, LlamaConfig):
            return LlamaRun(**recipe, model=model)
        return GPT2Run(**recipe, model=dataclasses.replace(model, dropout=0.0, attention_dropout=0.0))

    return preset


def gpt_speedrun() -> SpeedrunRun:
    """GPT-2's size with what learns faster per token: Muon, QK-norm, zero-initialised projections, a soft cap.

    162,129,408 parameters, since the output layer is not the embedding. 5100 steps of half a million tokens.
    """
    return SpeedrunRun(
        model=SpeedrunConfig(),
        inputs=InputsConfig(length=1024),
        loss=LossConfig(num_chunks=8),
        optimizer=OptimizerConfig("muon", learning_rate=3e-3, weight_decay=0.0, beta2=0.95),
        schedule=ScheduleConfig("wsd", warmup_steps=100, decay_steps=2000),
        train=TrainConfig(num_steps=5100, batch_size=512, eval_every_steps=250, eval_batches=20),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def _nanogpt(num_layers: int, num_heads: int, width: int, dropout: float, length: int) -> GPT2Config:
    """The model of nanoGPT's recipes for characters; biases, which it leaves out there, are GPT-2's."""
    return GPT2Config(
        vocab_size=65,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        mlp_width=4 * width,
        max_length=length,
        dropout=dropout,
        attention_dropout=dropout,
    )


def char_small() -> GPT2Run:
    """4 layers, 128 wide, 64 characters long: nanoGPT's CPU recipe, 2000 steps of 12 x 64 characters, but by Muon.

    For tiny Shakespeare, split as prepare does by itself. nanoGPT's own recipe: --optimizer.name adamw
    --optimizer.learning-rate 1e-3 --optimizer.weight-decay 0.1 --optimizer.beta2 0.99 --schedule.name cosine
    --schedule.final-fraction 0.1 --inputs.order random.

    lm-flax train char_small --workdir DIR --data DATA: held-out loss 1.61 in 102 seconds on 2 CPU cores.
    """
    return GPT2Run(
        model=_nanogpt(num_layers=4, num_heads=4, width=128, dropout=0.0, length=64),
        inputs=InputsConfig(length=64, packing="stream"),
        optimizer=OptimizerConfig("muon", learning_rate=1e-2, weight_decay=0.0, beta2=0.99),
        schedule=ScheduleConfig("linear", warmup_steps=100),
        train=TrainConfig(num_steps=2000, batch_size=12, eval_every_steps=1000),
        checkpoint=CheckpointConfig(every_steps=1000),
        sample_tokens=300,
    )


def char_10m() -> GPT2Run:
    """6 layers, 384 wide, 256 characters long: nanoGPT's GPU recipe, 5000 steps of 64 x 256 characters, by Muon."""
    return GPT2Run(
        model=_nanogpt(num_layers=6, num_heads=6, width=384, dropout=0.2, length=256),
        inputs=InputsConfig(length=256, packing="stream"),
        optimizer=OptimizerConfig("muon", learning_rate=2e-3, weight_decay=0.1, beta2=0.99),
        schedule=ScheduleConfig("linear", warmup_steps=100),
        train=TrainConfig(num_steps=5000, batch_size=64, eval_every_steps=250),
        checkpoint=CheckpointConfig(every_steps=250),
        sample_tokens=500,
    )


_PTB_EPOCH = 1328
"""Steps in which 700 tokens each read the Penn Treebank once, as its language models are published to do."""


def _windowed(model: ConvConfig) -> ConvRun:
    """Eight epochs of the Penn Treebank, in rows of 70 words that all see what is before them."""
    return ConvRun(
        model=model,
        inputs=InputsConfig(length=70, packing="stream"),
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        schedule=ScheduleConfig("cosine", warmup_steps=200),
        train=TrainConfig(num_steps=8 * _PTB_EPOCH, batch_size=10, eval_every_steps=_PTB_EPOCH),
        checkpoint=CheckpointConfig(every_steps=_PTB_EPOCH),
    )


def nplm() -> ConvRun:
    """Bengio's network MLP1: 4 words seen, 60 wide, 50 hidden units, direct connections.

    3,522,050 parameters of 10,000 words (Bengio et al. 2003, table 1); our recipe.
    """
    return _windowed(
        ConvConfig(num_layers=1, embedding_width=60, width=50, kernel_width=4, gated=False, direct=True, dropout=0.0)
    )


def conv_lm() -> ConvRun:
    """Gated convolutions of lstm_small's size: 4 layers, 180 wide, 13 words seen.

    4,648,240 parameters of 10,000 words (Dauphin et al. 2017, arXiv 1612.08083, made small); our recipe. Validation
    perplexity 139.6 on the Penn Treebank after 8 epochs (docs/results/lm_lineage.md).
    """
    return _windowed(ConvConfig(num_layers=4, embedding_width=180, width=180, kernel_width=4, dropout=0.3))


def _zaremba(model: LSTMConfig, num_epochs: int, epochs_at_peak: int) -> LSTMRun:
    """The paper's recipe for the Penn Treebank (arXiv 1409.2329, section 4.1).

    The paper's loss is the sum over 35 steps, ours the mean: so its learning rate of 1 is 35 here, and its clipping at
    a norm of 5 is a 35th of that. From the peak its rate falls by a factor an epoch, ours along a line.
    """
    epoch, stretch = _PTB_EPOCH, 35
    return LSTMRun(
        model=model,
        inputs=InputsConfig(length=stretch, packing="stream", order="streams"),
        optimizer=OptimizerConfig("sgd", learning_rate=stretch, weight_decay=0.0, clip_norm=5 / stretch),
        schedule=ScheduleConfig("wsd", decay_steps=(num_epochs - epochs_at_peak) * epoch),
        train=TrainConfig(num_steps=num_epochs * epoch, batch_size=20, eval_every_steps=epoch),
        checkpoint=CheckpointConfig(every_steps=epoch),
    )


def lstm_small() -> LSTMRun:
    """2 layers, 200 wide, no dropout, 20 streams of 35 words a step: Zaremba's small model, 8 epochs.

    4,651,600 parameters of 10,000 words (Zaremba et al. 2014, arXiv 1409.2329, section 4.1 and table 1). Validation
    perplexity 116.0 on the Penn Treebank (docs/results/lm_lineage.md), 120.7 in the paper.
    """
    return _zaremba(LSTMConfig(num_layers=2, width=200), num_epochs=8, epochs_at_peak=4)


def lstm_medium() -> LSTMRun:
    """2 layers, 650 wide, dropout 0.5, 20 streams of 35 words a step: Zaremba's medium model, 39 epochs.

    19,775,200 parameters of 10,000 words (Zaremba et al. 2014, arXiv 1409.2329, section 4.1 and table 1).
    """
    return _zaremba(LSTMConfig(num_layers=2, width=650, dropout=0.5, init_limit=0.05), num_epochs=39, epochs_at_peak=6)


def word2vec() -> Word2VecRun:
    """Skip-gram with 5 words of noise and windows of 5, 100 wide; 5 epochs of WikiText-2's two million words.

    6,000,000 parameters of 30,000 words (Mikolov et al. 2013, arXiv 1310.4546).

    lm-flax train word2vec --workdir DIR --data DATA, then lm-flax analogies --wordsim353 FILE: rank correlation 0.40 to
    0.42 after 2 minutes on a CPU core.
    """
    return Word2VecRun(
        model=Word2VecConfig(vocab_size=30_000, width=100),
        inputs=WindowsConfig(length=128, window=5, num_negatives=5, subsample=1e-3),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, clip_norm=None),
        schedule=ScheduleConfig("linear", warmup_steps=20),
        train=TrainConfig(num_steps=1280, batch_size=64, eval_every_steps=256),
        checkpoint=CheckpointConfig(every_steps=256),
    )


PRESETS: dict[str, Callable[[], AnyRun]] = {
    **{preset.__name__: preset for preset in (char_small, char_10m)},
    **{name: _published(size) for name, size in SIZES.items()},
    **{preset.__name__: preset for preset in (gpt_speedrun, nplm, conv_lm, lstm_small, lstm_medium, word2vec)},
}
