"""What each parameter of a family is, where its table places it, and which part of it a device gets, for some sizes.

As they were when last looked at. After a change that is meant, write the file anew and read its difference:
``PYTHONPATH=tests python tests/golden/test_placement.py``.
"""

import difflib
import math
from pathlib import Path

import conftest  # noqa: F401  (four devices, when run as a script)
import jax
import jax.numpy as jnp
import pytest

from bert_flax.model import BertForPreTraining
from bert_flax.presets import PRESETS
from bert_flax.sharding import PARAM_RULES
from core_flax import sharding
from core_flax.config import MeshConfig
from core_flax.params import leaves, rule_for
from lm_flax.llama import Llama
from lm_flax.model import GPT2
from lm_flax.presets import SIZES
from lm_flax.sharding import GPT2_RULES, LLAMA_RULES

GOLDEN = {  # file -> sizes in it, the first of which shows the table
    "bert_placement.txt": ("bert_base", "bert_tiny", "bert_base", "bert_large"),
    "gpt2_placement.txt": ("gpt2", "gpt2", "gpt2_large"),
    "llama_placement.txt": ("llama_1b", "llama_150m", "llama_1b", "llama_7b"),
}
MESHES = ({"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2})
RULES = {"bert": PARAM_RULES, "gpt2": GPT2_RULES, "llama": LLAMA_RULES}


def family(name):
    return name.partition("_")[0]


def rules(name):
    return RULES[family(name)]


def shapes(name):
    """The parameters of a size, none of them made."""
    ids = jnp.zeros((1, 8), jnp.int32)
    config = PRESETS[name]().model if name in PRESETS else SIZES[name]()
    if name in PRESETS:
        model, inputs = BertForPreTraining(config), (ids, ids, ids > 0, ids[:, :2])
    else:
        model, inputs = {"gpt2": GPT2, "llama": Llama}[family(name)](config), (ids,)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def table(name):
    """The lines of the parameter table: what each parameter is, and the mesh axes that split its dims."""
    rows = [
        (path, rule_for(path, rules(name)).kind, where) for path, _, where in sharding.table(shapes(name), rules(name))
    ]
    return [("parameter", "kind", "placement"), *rows]


def parts(name):
    """For each parameter of a size its shape, and on each mesh the shape of a device's part; then their sizes."""
    params, devices = dict(leaves(shapes(name))), jax.devices()[:4]
    columns = [{path: x.shape for path, x in params.items()}]
    for sizes in MESHES:
        mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
        placed = leaves(sharding.param_shardings(shapes(name), rules(name), mesh))
        columns.append({path: each.shard_shape(params[path].shape) for path, each in placed})
    rows = [(path, *("x".join(map(str, column[path])) for column in columns)) for path in params]
    total = [f"{sum(math.prod(shape) for shape in column.values()):,}" for column in columns]
    return [
        (name, "whole", *(" ".join(f"{a}={n}" for a, n in sizes.items()) for sizes in MESHES)),
        *rows,
        ("sum", *total),
    ]


def text(file):
    """A golden file: the table, then the parts of each size, in columns."""
    first, *sizes = GOLDEN[file]
    blocks = [table(first), *map(parts, sizes)]
    return "\n".join("".join(f"{line(row)}\n" for row in block) for block in blocks)


def line(row):
    path, *others = row
    return f"{path:<41}{''.join(f'{other:<19}' for other in others)}".rstrip()


@pytest.mark.parametrize("file", GOLDEN)
def test_placement(file):
    expected, found = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines(), text(file).splitlines()
    assert found == expected, "\n".join(difflib.unified_diff(expected, found, "pinned", "found", lineterm="", n=0))


@pytest.mark.parametrize("name", [*PRESETS, *SIZES])
def test_every_size_of_a_family_has_the_same_table(name):
    (first,) = {sizes[0] for file, sizes in GOLDEN.items() if file.startswith(family(name))}
    assert table(name) == table(first)


if __name__ == "__main__":
    for file in GOLDEN:
        Path(__file__).with_name(file).write_text(text(file), encoding="utf-8")
