"""What each parameter of BERT is, where the table places it, and which part of it a device gets, for three sizes.

As they were when last looked at. After a change that is meant, write the file anew and read its difference:
``PYTHONPATH=tests python tests/golden/test_placement.py``.
"""

import dataclasses
import difflib
import math
from pathlib import Path

import conftest  # noqa: F401  (four devices, when run as a script)
import jax
import jax.numpy as jnp

from bert_flax.model import BertForPreTraining
from bert_flax.presets import PRESETS
from bert_flax.sharding import PARAM_RULES
from core_flax import sharding
from core_flax.config import MeshConfig
from core_flax.params import leaves, rule_for

GOLDEN = Path(__file__).with_name("bert_placement.txt")
MESHES = ({"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2})
VOCAB_SIZE = 30524
"""30522 does not divide by 4: two entries of padding, as the message about it advises."""


def shapes(name):
    """The parameters of a preset, none of them made."""
    model = BertForPreTraining(dataclasses.replace(PRESETS[name]().model, vocab_size=VOCAB_SIZE))
    ids = jnp.zeros((1, 8), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids > 0, ids[:, :2])["params"]


def table(name):
    """The lines of the parameter table: what each parameter is, and the mesh axes that split its dims."""
    rows = [
        (path, rule_for(path, PARAM_RULES).kind, where) for path, _, where in sharding.table(shapes(name), PARAM_RULES)
    ]
    return [("parameter", "kind", "placement"), *rows]


def parts(name):
    """For each parameter of a preset its shape, and on each mesh the shape of a device's part; then their sizes."""
    params, devices = dict(leaves(shapes(name))), jax.devices()[:4]
    columns = [{path: x.shape for path, x in params.items()}]
    for sizes in MESHES:
        mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
        placed = leaves(sharding.param_shardings(shapes(name), PARAM_RULES, mesh))
        columns.append({path: each.shard_shape(params[path].shape) for path, each in placed})
    rows = [(path, *("x".join(map(str, column[path])) for column in columns)) for path in params]
    total = [f"{sum(math.prod(shape) for shape in column.values()):,}" for column in columns]
    return [
        (name, "whole", *(" ".join(f"{a}={n}" for a, n in sizes.items()) for sizes in MESHES)),
        *rows,
        ("sum", *total),
    ]


def text():
    """The golden file: the table, then the parts of three sizes, in columns."""
    blocks = [table("bert_base"), parts("bert_tiny"), parts("bert_base"), parts("bert_large")]
    return "\n".join("".join(f"{line(row)}\n" for row in block) for block in blocks)


def line(row):
    path, *others = row
    return f"{path:<41}{''.join(f'{other:<19}' for other in others)}".rstrip()


def test_placement():
    expected, found = GOLDEN.read_text(encoding="utf-8").splitlines(), text().splitlines()
    assert found == expected, "\n".join(difflib.unified_diff(expected, found, "pinned", "found", lineterm="", n=0))


def test_every_preset_has_the_same_table():
    assert all(table(name) == table("bert_base") for name in PRESETS)


if __name__ == "__main__":
    GOLDEN.write_text(text(), encoding="utf-8")
