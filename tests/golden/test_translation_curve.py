"""Twenty steps of a tiny Transformer and of tiny LSTMs with attention, as they were when last looked at.

After a change that is meant, write the file anew and read its difference:
``PYTHONPATH=tests:tests/seq2seq JAX_PLATFORMS=cpu python tests/golden/test_translation_curve.py``.
"""

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from golden_curves import take_steps

from core_flax.config import OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.text.sentencepiece_model import SentencePiece
from seq2seq_flax.config import (
    InputsConfig,
    LSTMAttentionConfig,
    LSTMAttentionTranslateConfig,
    TransformerConfig,
    TranslateConfig,
)
from seq2seq_flax.pairs import PairStore
from seq2seq_flax.prepare import PrepareConfig, prepare
from seq2seq_flax.task import make_task

GOLDEN = Path(__file__).with_name("translation_curve.json")
SHOWN = ("loss", "nll", "accuracy", "gradient_norm")
RECIPE = {
    "seed": 7,
    "inputs": InputsConfig(row_length=48),
    "optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.0, beta2=0.98, epsilon=1e-6),
    "schedule": ScheduleConfig(name="inverse_sqrt", warmup_steps=5),
    "train": TrainConfig(num_steps=20, batch_size=8, num_microbatches=2),
}
CONFIGS = {
    "transformer": TranslateConfig(
        **RECIPE, model=TransformerConfig(vocab_size=72, num_layers=2, width=32, num_heads=4, mlp_width=64, unroll=1)
    ),
    "lstm_attention": LSTMAttentionTranslateConfig(
        **RECIPE, model=LSTMAttentionConfig(vocab_size=72, num_layers=1, width=32, dropout=0.1)
    ),
}
WORDS = "river farmer teacher garden window market letter winter engine village doctor bridge dog road song"


def write_pairs(folder: Path) -> tuple[str, str]:
    """Sentences, and the same with every word spelled backwards, in reverse order."""
    draw = random.Random(0)
    lines = [[draw.choice(WORDS.split()) for _ in range(draw.randint(2, 8))] for _ in range(80)]
    texts = [" ".join(words) for words in lines], [" ".join(word[::-1] for word in words[::-1]) for words in lines]
    for name, text in zip(("source", "target"), texts, strict=True):
        (folder / name).write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(folder / "source"), str(folder / "target")


def curve(name: str, folder: Path) -> list[dict[str, float]]:
    """The figures of each step, on one device, with dropout and two microbatches."""
    config, data = CONFIGS[name], folder / "data"
    if not data.exists():
        prepare(PrepareConfig(str(data), train=write_pairs(folder), vocab_size=70))
    tokenizer = SentencePiece.load(data / "tokenizer.model")
    task = make_task(config, PairStore(data, "train"), None, tokenizer, row_multiple=2)
    return take_steps(task, config, SHOWN)


@pytest.mark.parametrize("name", CONFIGS)
def test_translation_curve(name, tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = curve(name, tmp_path)
    assert len(found) == len(golden) == 20
    for figure in SHOWN:
        expected = [figures[figure] for figures in golden]
        np.testing.assert_allclose([f[figure] for f in found], expected, rtol=1e-4, atol=1e-4, err_msg=figure)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            f' "{name}": [\n' + ",\n".join(f"  {json.dumps(figures)}" for figures in curve(name, Path(folder))) + "\n ]"
            for name in CONFIGS
        ]
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
