"""Twenty steps of a tiny BERT, from text to losses, as they were when last looked at.

After a change that is meant, write the file anew and read its difference:
``PYTHONPATH=tests JAX_PLATFORMS=cpu python tests/golden/test_curve.py``.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from conftest import write_corpus
from golden_curves import take_steps

from bert_flax.config import BertConfig, InputsConfig, PretrainConfig
from bert_flax.prepare import PrepareConfig, prepare
from bert_flax.pretrain import make_task
from core_flax.config import OptimizerConfig, ScheduleConfig, TrainConfig
from core_flax.data.records import PassageStore
from core_flax.text.wordpiece import WordPiece

GOLDEN = Path(__file__).with_name("bert_curve.json")
SHOWN = ("loss", "mlm_loss", "next_sentence_loss", "mlm_accuracy", "gradient_norm")
CONFIG = PretrainConfig(
    seed=7,
    model=BertConfig(vocab_size=160, num_layers=2, width=32, num_heads=4, mlp_width=64, max_length=32),
    inputs=InputsConfig(length=32, max_predictions=5),
    optimizer=OptimizerConfig(learning_rate=3e-3, epsilon=1e-6),
    schedule=ScheduleConfig(warmup_steps=5),
    train=TrainConfig(num_steps=20, batch_size=8, num_microbatches=2),
)


def curve(folder: Path) -> list[dict[str, float]]:
    """The figures of each step, on one device, with dropout and two microbatches."""
    text, data = write_corpus(folder / "text.txt"), folder / "data"
    prepare(PrepareConfig((str(text),), str(data), vocab_size=160, valid_fraction=0.1, num_workers=1))
    task = make_task(CONFIG, PassageStore(data, "train"), None, WordPiece.load(data / "vocab.txt"))
    return take_steps(task, CONFIG, SHOWN)


def test_curve(tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = curve(tmp_path)
    assert len(found) == len(golden) == 20
    for name in SHOWN:
        expected = [figures[name] for figures in golden]
        np.testing.assert_allclose([figures[name] for figures in found], expected, rtol=1e-4, atol=1e-4, err_msg=name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        lines = [f"  {json.dumps(figures)}" for figures in curve(Path(folder))]
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
