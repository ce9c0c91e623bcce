"""Twenty steps of tiny language models, from text to losses, as they were when last looked at.

After a change that is meant, write the file anew and read its difference:
``PYTHONPATH=tests JAX_PLATFORMS=cpu python tests/golden/test_lm_curve.py``.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_corpus
from golden_curves import take_steps

from core_flax.config import OptimizerConfig, ScheduleConfig, TrainConfig
from lm_flax.config import GPT2Run, InputsConfig, LossConfig, SpeedrunRun
from lm_flax.model import GPT2Config
from lm_flax.prepare import PrepareConfig, prepare
from lm_flax.runs import make_task, open_data
from lm_flax.speedrun import SpeedrunConfig

GOLDEN = Path(__file__).with_name("lm_curve.json")
SHOWN = ("loss", "accuracy", "gradient_norm")
SIZES = {"vocab_size": 64, "num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 64, "max_length": 32}
RECIPE = {
    "seed": 7,
    "schedule": ScheduleConfig("wsd", warmup_steps=5),
    "train": TrainConfig(num_steps=20, batch_size=8, num_microbatches=2),
}
CONFIGS = {
    "gpt2": GPT2Run(
        **RECIPE,
        model=GPT2Config(**SIZES, dropout=0.1, attention_dropout=0.1),
        inputs=InputsConfig(length=32),
        loss=LossConfig(z_weight=1e-3, num_chunks=2),
        optimizer=OptimizerConfig(learning_rate=3e-3, beta2=0.95),
    ),
    "speedrun": SpeedrunRun(
        **RECIPE,
        model=SpeedrunConfig(**SIZES),
        inputs=InputsConfig(length=32, packing="stream", order="random"),
        optimizer=OptimizerConfig("muon", learning_rate=1e-2),
    ),
}


def curve(name: str, folder: Path) -> list[dict[str, float]]:
    """The figures of each step, on one device, with two microbatches."""
    text, data, config = write_corpus(folder / "text.txt"), folder / "data", CONFIGS[name]
    prepare(PrepareConfig((str(text),), str(data), tokenizer="char", documents="blank-line", num_workers=1))
    train, _, tokenizer = open_data(data)
    task = make_task(config, train, None, tokenizer.end_id)
    return take_steps(task, config, SHOWN)


@pytest.mark.parametrize("name", CONFIGS)
def test_curve(name, tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = curve(name, tmp_path)
    assert len(found) == len(golden) == 20
    for figure in SHOWN:
        expected = [figures[figure] for figures in golden]
        np.testing.assert_allclose(
            [figures[figure] for figures in found], expected, rtol=1e-4, atol=1e-4, err_msg=figure
        )


if __name__ == "__main__":
    parts = []
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            lines = [f"  {json.dumps(figures)}" for figures in curve(name, Path(folder))]
        parts.append(f' "{name}": [\n' + ",\n".join(lines) + "\n ]")
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
