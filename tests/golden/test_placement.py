"""The parameters of bert_tiny, their shapes, kinds and placement, as they were when last looked at.

After a change that is meant, write the file anew and read its difference: ``python tests/golden/test_placement.py``.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from bert_flax.model import BertForPreTraining
from bert_flax.presets import bert_tiny
from bert_flax.sharding import PARAM_RULES
from core_flax import sharding
from core_flax.params import rule_for

GOLDEN = Path(__file__).with_name("bert_tiny_placement.json")


def placement() -> str:
    """JSON of path -> [shape, kind, placement], one parameter a line."""
    ids = jnp.zeros((1, 8), jnp.int32)
    model = BertForPreTraining(bert_tiny().model)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids > 0, ids[:, :2])["params"]
    rows = [
        f"  {json.dumps(path)}: {json.dumps([shape, rule_for(path, PARAM_RULES).kind, where])}"
        for path, shape, where in sharding.table(params, PARAM_RULES)
    ]
    return "{\n" + ",\n".join(rows) + "\n}\n"


def test_placement():
    assert json.loads(placement()) == json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    GOLDEN.write_text(placement(), encoding="utf-8")
