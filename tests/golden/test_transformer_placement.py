"""What each parameter of the Transformer is, where the table places it, and which part of it a device gets.

As they were when last looked at. After a change that is meant, write the file anew and read its difference:
``PYTHONPATH=tests python tests/golden/test_transformer_placement.py``.
"""

import dataclasses
import difflib
import math
from pathlib import Path

import conftest  # noqa: F401  (four devices, when run as a script)
import jax

from core_flax import sharding
from core_flax.config import MeshConfig
from core_flax.params import leaves, rule_for
from seq2seq_flax.config import TransformerConfig
from seq2seq_flax.model import Transformer
from seq2seq_flax.presets import PRESETS
from seq2seq_flax.sharding import PARAM_RULES
from seq2seq_flax.task import init_params

GOLDEN = Path(__file__).with_name("transformer_placement.txt")
MESHES = ({"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2})


def shapes(name, **changes):
    """The parameters of a preset, none of them made."""
    model = Transformer(dataclasses.replace(PRESETS[name]().model, **changes))
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def table(params):
    """The lines of the parameter table: what each parameter is, and the mesh axes that split its dims."""
    placed = sharding.table(params, PARAM_RULES)
    return [("parameter", "kind", "placement"), *((p, rule_for(p, PARAM_RULES).kind, where) for p, _, where in placed)]


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
    meshes = (" ".join(f"{a}={n}" for a, n in sizes.items()) for sizes in MESHES)
    return [(name, "whole", *meshes), *rows, ("sum", *total)]


def text():
    """The golden file: the table, what untied embeddings add to it, then the parts of two sizes, in columns."""
    whole = table(shapes("transformer_base", tied_embeddings="none", output_bias=True))
    untied = [row for row in whole if row[0].startswith(("embeddings", "output_bias"))]
    blocks = [table(shapes("transformer_base")), untied, parts("transformer_tiny"), parts("transformer_big")]
    return "\n".join("".join(f"{line(row)}\n" for row in block) for block in blocks)


def line(row):
    path, *others = row
    return f"{path:<44}{''.join(f'{other:<19}' for other in others)}".rstrip()


def test_placement():
    expected, found = GOLDEN.read_text(encoding="utf-8").splitlines(), text().splitlines()
    assert found == expected, "\n".join(difflib.unified_diff(expected, found, "pinned", "found", lineterm="", n=0))


def test_every_preset_has_the_same_table():
    names = [name for name, preset in PRESETS.items() if isinstance(preset().model, TransformerConfig)]
    assert len(names) > 2 and all(table(shapes(name)) == table(shapes("transformer_base")) for name in names)


if __name__ == "__main__":
    GOLDEN.write_text(text(), encoding="utf-8")
