"""Twenty steps of fine-tuning a tiny BERT on pairs of sentences and on questions, as they were when last looked at.

After a change that is meant, write the file anew and read its difference:
``PYTHONPATH=tests JAX_PLATFORMS=cpu python tests/golden/test_finetune_curve.py``.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import small_tasks
from golden_curves import take_steps

from bert_flax.finetune.config import FinetuneInputs, resolve, settings_of
from bert_flax.finetune.data import load_data
from bert_flax.finetune.task import make_task
from bert_flax.finetune.tasks import TASKS
from bert_flax.huggingface import load_pretrained
from core_flax.config import OptimizerConfig, TrainConfig

GOLDEN = Path(__file__).with_name("finetune_curve.json")
SHOWN = ("loss", "accuracy", "gradient_norm", "learning_rate")
DATA = {"mrpc": small_tasks.write_glue, "squad2": lambda home: small_tasks.write_squad(home, 2)}


def curve(name: str, folder: Path) -> list[dict[str, float]]:
    """The figures of each step of the task's recipe with a high rate, on one device, with dropout and microbatches."""
    pretrained = load_pretrained(small_tasks.write_model(folder / "model"))
    settings = dataclasses.replace(
        settings_of(TASKS[name]),
        seed=7,
        epochs=None,
        inputs=FinetuneInputs(max_length=32, stride=8),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(num_steps=20, batch_size=8, num_microbatches=2),
    )
    data = load_data(TASKS[name], str(DATA[name](folder / name)), pretrained.vocabulary, settings.inputs)
    config = resolve(settings, pretrained.config, data.train.num_units)
    task = make_task(config, TASKS[name], data.train, data.held_out, pretrained.params, row_multiple=2)
    return take_steps(task, config, SHOWN)


@pytest.mark.parametrize("name", DATA)
def test_finetune_curve(name, tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = curve(name, tmp_path)
    assert len(found) == len(golden) == 20
    for figure in SHOWN:
        expected = [figures[figure] for figures in golden]
        np.testing.assert_allclose([f[figure] for f in found], expected, rtol=1e-4, atol=1e-4, err_msg=figure)


if __name__ == "__main__":
    parts = []
    for name in DATA:
        with tempfile.TemporaryDirectory() as folder:
            lines = ",\n".join(f"  {json.dumps(figures)}" for figures in curve(name, Path(folder)))
        parts.append(f' "{name}": [\n{lines}\n ]')
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
