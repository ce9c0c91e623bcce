"""Every layout gives the losses of one device, moves what the textbook says, and never a batch; pinned, as compiled.

The vocabulary is a prime: nothing divides it. After a change that is meant, write the golden file anew and read its
difference: ``FLAX_WRITE_GOLDEN=1 pytest tests/launch/test_layouts.py``.
"""

import dataclasses
import functools
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from bert_flax.config import BertConfig, PretrainConfig
from bert_flax.config import InputsConfig as PairInputs
from core_flax import sharding
from core_flax.agreement import Agreement
from core_flax.config import MeshConfig, OptimizerConfig, TrainConfig
from core_flax.params import leaves, path_of
from core_flax.program import make_program
from core_flax.signals import StopFlag
from core_flax.types import UserError
from launch.families import PRESETS
from launch.hlo import read_work
from lm_flax.config import GPT2Run
from lm_flax.config import InputsConfig as RowInputs
from lm_flax.model import GPT2Config
from seq2seq_flax.config import InputsConfig as PairRows
from seq2seq_flax.config import TransformerConfig, TranslateConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "collectives.txt"
V, L, B, D, NUM_STEPS = 61, 16, 8, 32, 5
SIZES = {"vocab_size": V, "width": D, "num_heads": 4, "mlp_width": 64, "unroll": 1, "remat": "none"}
TRAIN = TrainConfig(num_steps=NUM_STEPS, batch_size=B)
# GPT-2 has Adam and dropout; the others, being less to compile, have neither.
SIMPLE = {"train": TRAIN, "optimizer": OptimizerConfig("sgd", learning_rate=0.1, weight_decay=0.0, clip_norm=None)}
UNDROPPED = SIZES | {"dropout": 0.0, "attention_dropout": 0.0}
FAMILIES = {
    "bert": (
        PretrainConfig(
            model=BertConfig(**UNDROPPED, num_layers=2, max_length=L),
            inputs=PairInputs(length=L, max_predictions=3),
            **SIMPLE,
        ),
        PRESETS["bert_tiny"],
    ),
    "gpt2": (
        GPT2Run(
            model=GPT2Config(**SIZES, num_layers=2, max_length=L),
            inputs=RowInputs(length=L),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            train=TRAIN,
        ),
        PRESETS["gpt2"],
    ),
    "seq2seq": (
        TranslateConfig(model=TransformerConfig(**UNDROPPED, num_layers=1), inputs=PairRows(row_length=L), **SIMPLE),
        PRESETS["transformer_base"],
    ),
}
OF_ONE_FAMILY = {
    "gpt2": ({"data": 4, "zero1": True}, {"data": 1, "dcn_data": 2, "dcn_fsdp": 2}),
}
LAYOUTS = {
    f"{name} " + " ".join(f"{axis}={size}" for axis, size in mesh.items()): mesh
    for name in FAMILIES
    for mesh in (
        {"data": 4},
        {"fsdp": 4},
        {"data": 1, "tensor": 4},
        {"fsdp": 2, "tensor": 2},
        {"data": 1, "sequence": 4},
        *OF_ONE_FAMILY.get(name, ()),
    )
}
TABLE_USES = {"bert": 2, "gpt2": 2, "seq2seq": 3}
"""How often a step reads the token table: to look up (source and target) and as the output layer."""


def batch_of(family, config, step):
    """Numbers that are in range for what each field is; "sequences" of one document, no padding."""
    draw = np.random.default_rng(step)

    def values(name, shape, dtype):
        if "weights" in name or name == "valid" or "sequences" in name:
            return np.ones(shape, dtype)
        if "positions" in name:
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        return draw.integers(0, 2 if name in ("segments", "next_is_random") else V, shape).astype(dtype)

    return {name: values(name, x.shape, x.dtype) for name, x in family.batch(config, step).items()}


@dataclasses.dataclass
class Ran:
    """Losses of the steps, the compiled program's text, and the shapes of the parameters with their placements.

    ``opt_bytes`` is what the optimizer keeps on one device.
    """

    losses: list[float]
    text: str
    params: dict
    opt_bytes: int

    @functools.cached_property
    def collectives(self):
        """(kind, group) -> (how often, bytes of all)."""
        found: dict = {}
        for each in read_work(self.text).collectives:
            count, size = found.get((each.kind, each.group), (0, 0))
            found[each.kind, each.group] = int(count + each.count), int(size + each.count * each.bytes)
        return found

    def bytes(self, *kinds):
        return sum(size for (kind, _), (_, size) in self.collectives.items() if kind in kinds)


def begin(abstract_state):
    """A state to begin with, of any numbers: to compile what draws the real one takes as long as the step."""
    draw = np.random.default_rng(0)

    def drawn(keys, x):
        return (draw.normal(scale=0.1, size=x.shape) + (path_of(keys).endswith("scale"))).astype(x.dtype)

    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_state)
    return dataclasses.replace(zeros, params=jax.tree_util.tree_map_with_path(drawn, abstract_state.params))


def run(name, num_devices, **mesh):
    """Five steps of a family on a mesh."""
    config, family = FAMILIES[name]
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    program = make_program(family.task(config), config, jax.devices()[:num_devices])
    place = functools.partial(sharding.place_batch, batch_size=B, mesh=program.mesh)
    losses = []
    with jax.set_mesh(program.mesh):
        where = jax.tree.map(lambda x: x.sharding, program.abstract_state)
        state = jax.device_put(begin(program.abstract_state), where)
        lowered: Any = program.step.lower(state, place(batch_of(family, config, 0)))
        compiled = lowered.compile({"xla_backend_optimization_level": 0})  # of a CPU's code, not of what it does
        for step in range(NUM_STEPS):
            state, metrics = compiled(state, place(batch_of(family, config, step)))
            losses.append(float(metrics["loss"]))
    kept = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(program.abstract_state.opt_state)
    )
    return Ran(losses, compiled.as_text(), dict(leaves(program.abstract_state.params)), kept)


@pytest.fixture(scope="module")
def alone():
    return {name: run(name, 1).losses for name in FAMILIES}


@pytest.fixture(scope="module")
def ran():
    """Every layout's run, and what the compiler said meanwhile."""
    with tempfile.TemporaryFile() as said:
        before = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            with pytest.MonkeyPatch.context() as patch:
                # Devices of one process: which would be a slice of their own does not change what is computed.
                patch.setattr(sharding, "_arranged", lambda devices, sizes: np.reshape(devices, (*sizes.values(),)))
                found = {key: run(key.split()[0], 4, **mesh) for key, mesh in LAYOUTS.items()}
        finally:
            os.dup2(before, 2)
            os.close(before)
        said.seek(0)
        return found, said.read().decode()


@pytest.mark.parametrize("key", LAYOUTS)
def test_losses_are_those_of_one_device(key, alone, ran):
    expected = alone[key.split()[0]]
    assert np.ptp(expected) > 1e-2  # something was learned
    np.testing.assert_allclose(ran[0][key].losses, expected, rtol=0, atol=1e-5)


def test_nothing_is_moved_that_xla_warns_of(ran):
    assert "rematerialization" not in ran[1]


@pytest.mark.parametrize("key", LAYOUTS)
def test_no_batch_is_gathered(key, ran):
    """Tokens, positions and segments are the program's only arrays of integers that are worth moving."""
    gathers = [line for line in ran[0][key].text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    assert not [line for line in gathers if re.search(r"= \(?[su]32\[\d+,", line)]


def moved_of_params(ran, split):
    """Bytes of the parameters that are split, or that are not: (of the stacked layers, others)."""
    sizes = {True: 0, False: 0}
    for path, x in ran.params.items():
        if (x.sharding.shard_shape(x.shape) != x.shape) == split:
            sizes["layers/" in path] += 4 * x.size
    return sizes[True], sizes[False]


@pytest.mark.parametrize("name", FAMILIES)
def test_fsdp_moves_what_the_textbook_says(name, ran):
    """Parameters are gathered forward and again backward, gradients reduced once (Rajbhandari et al. 2020, arXiv
    1910.02054, section 7.2.2). What is no layer's lives on from the forward to the backward pass: one gather."""
    found = ran[0][f"{name} fsdp=4"]
    layers, others = moved_of_params(found, split=True)
    assert found.bytes("all-gather") == pytest.approx(2 * layers + others, rel=0.1)
    # The table is reduced once for each use of it.
    again = (TABLE_USES[name] - 1) * 4 * V * D
    reduced = layers + others + again + sum(moved_of_params(found, split=False))
    assert found.bytes("all-reduce", "reduce-scatter") == pytest.approx(reduced, rel=0.1)
    assert found.bytes("all-to-all", "collective-permute") < 0.1 * reduced


@pytest.mark.parametrize(("name", "num_sums"), [("bert", 2 * 4), ("gpt2", 2 * 4 + 1), ("seq2seq", 4 + 6 + 1 + 1)])
def test_tensor_parallelism_moves_what_the_textbook_says(name, num_sums, ran):
    """Activations are summed behind each sublayer, forward and backward (Shoeybi et al. 2019, arXiv 1909.08053, section
    3): attention and feed-forward of two layers, in translation cross-attention as well, whose gradient goes into the
    decoder and into the encoder; and the gradient of what goes into the output layer (in BERT of few positions)."""
    found = ran[0][f"{name} data=1 tensor=4"]
    assert found.bytes("all-reduce") == pytest.approx(num_sums * 4 * B * L * D, rel=0.1)
    # The vocabulary does not divide: the table is gathered, and its gradient and that of its bias are put in parts.
    assert found.bytes("all-gather", "all-to-all", "collective-permute") <= 2 * 4 * V * D


@pytest.mark.parametrize(
    ("name", "num_sums", "num_gathers"), [("bert", 8, 12), ("gpt2", 9, 13), ("seq2seq", 12, 6 + 3 + 5 + 3 + 1)]
)
def test_a_split_length_moves_what_the_textbook_says(name, num_sums, num_gathers, ran):
    """The sums of tensor parallelism leave each device a part of the length, and what was a copy is gathered: before
    the products, and again for the gradients of their weights, since only the part was kept (Korthikanti et al. 2022,
    arXiv 2205.05198, section 4.2.2). So three gathers for a sublayer; cross-attention has five, of its two inputs and
    of its gradient; the output layer keeps what it gathered, and BERT's has few positions."""
    found = ran[0][f"{name} data=1 sequence=4"]
    # A CPU's compiler writes a reduce-scatter as an all-reduce of which each takes its part.
    tables = (TABLE_USES[name] - 1) * 4 * V * D
    assert found.bytes("all-reduce", "reduce-scatter") == pytest.approx(num_sums * 4 * B * L * D + tables, rel=0.1)
    assert found.bytes("all-gather") == pytest.approx(num_gathers * 4 * B * L * D + 4 * V * D, rel=0.01)
    assert found.bytes("all-to-all", "collective-permute") <= 4 * V * D


def test_zero1_splits_the_moments_and_gathers_what_is_updated(ran):
    """Once for each parameter, beside the gradients' sum (Rajbhandari et al. 2020, section 7.2.1: no more than data
    parallelism, where the sum is a reduce-scatter, as which a CPU's compiler does not write it)."""
    whole, parted = ran[0]["gpt2 data=4"], ran[0]["gpt2 data=4 zero1=True"]
    split = sum(moved_of_params(ran[0]["gpt2 fsdp=4"], split=True))
    assert whole.opt_bytes - parted.opt_bytes == 2 * split * 3 / 4
    assert parted.opt_bytes < 0.3 * whole.opt_bytes
    assert parted.bytes("all-gather") == pytest.approx(split, rel=0.01)
    assert parted.bytes("all-reduce", "reduce-scatter") == pytest.approx(whole.bytes("all-reduce"), rel=0.01)
    assert parted.bytes("all-to-all", "collective-permute") <= 4 * V * D


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """Of a slice of 2 x 2."""

    id: int
    platform = "tpu"
    device_kind = "TPU v5 lite"
    core_on_chip = 0

    @property
    def slice_index(self):
        return self.id // 4

    @property
    def process_index(self):
        return self.id // 2

    @property
    def coords(self):
        return [self.id % 2, self.id % 4 // 2, 0]


@pytest.mark.parametrize("sizes", [{"dcn_data": 2, "fsdp": 4}, {"dcn_fsdp": 2, "data": 2, "tensor": 2}], ids=str)
def test_only_the_axes_that_are_meant_cross_slices(sizes):
    config = MeshConfig(**sizes)
    shape = {name: getattr(config, name) for name in sharding.MESH_AXES} | {"data": sizes.get("data", 1)}
    found = sharding._arranged([FakeTpu(number) for number in range(8)], shape)
    assert found.shape == tuple(shape.values())
    slices = np.vectorize(lambda device: device.slice_index)(found)
    for axis, name in enumerate(sharding.MESH_AXES):
        stays = (slices == np.take(slices, [0], axis)).all()
        assert stays == (shape[name] == 1 or not name.startswith("dcn_"))


@pytest.mark.parametrize(
    ("sizes", "devices", "said"),
    [
        ({"data": 8}, 8, r"--mesh\.dcn-data 1 x --mesh\.dcn-fsdp 1: the devices are 2 slices; choose these two"),
        ({"dcn_data": 2}, 4, r"--mesh\.dcn-data 2 x --mesh\.dcn-fsdp 1: the devices are 1 slice; choose"),
    ],
)
def test_slices_that_the_mesh_does_not_name_are_refused(sizes, devices, said):
    with pytest.raises(UserError, match=said):
        sharding.make_mesh(MeshConfig(**sizes), [FakeTpu(number) for number in range(devices)])


def test_several_slices_settle_among_themselves_what_to_do(monkeypatch):
    """Whatever the mesh of the run; it asks no slice to be named again."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    mesh = sharding.make_mesh(MeshConfig(dcn_data=2), [FakeTpu(number) for number in range(8)])
    assert dict(Agreement(mesh, StopFlag())._rows.mesh.shape) == dict.fromkeys(sharding.MESH_AXES, 1) | {"data": 8}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bert", {"inputs": PairInputs(length=18, max_predictions=3)}, r"--inputs\.length = 18 .* 4 ways"),
        (
            "gpt2",
            {"inputs": RowInputs(length=18)},
            r"--inputs\.length = 18 cannot be .* \(--mesh\.sequence 4\).* \(20 is",
        ),
        ("seq2seq", {"inputs": PairRows(row_length=18)}, r"--inputs\.row-length = 18 cannot be split 4 ways"),
    ],
)
def test_a_length_that_does_not_divide_is_refused(name, changes, said):
    config, family = FAMILIES[name]
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, sequence=4), **changes)
    with pytest.raises(UserError, match=said):
        make_program(family.task(config), config, jax.devices()[:4])


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_made_where_rows_are_split(name):
    """From a row that is shorter than there are devices; as they are made on one."""
    config, family = FAMILIES[name]
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, sequence=4))
    program = make_program(family.task(config), config, jax.devices()[:4])
    with jax.set_mesh(program.mesh):
        lowered: Any = program.init
        text = lowered.lower(jax.random.key(0)).as_text()
    assert "sharding_constraint" not in text and "@Sharding" not in text


def test_a_model_that_reads_along_the_length_cannot_have_it_split():
    config = PRESETS["lstm_small"].presets["lstm_small"]()
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, sequence=4))
    with pytest.raises(UserError, match=r"--mesh\.sequence 4: .* take --mesh\.tensor 4"):
        make_program(PRESETS["lstm_small"].task(config), config, jax.devices()[:4])


def test_data_parallelism_reduces_the_gradients_once(ran):
    """But that the table is reduced once for each use of it."""
    for name in FAMILIES:
        found = ran[0][f"{name} data=4"]
        assert {kind for kind, _ in found.collectives} == {"all-reduce"}
        gradients = sum(moved_of_params(found, split=False))
        assert gradients <= found.bytes("all-reduce") < 1.1 * (gradients + (TABLE_USES[name] - 1) * 4 * V * D)


def test_collectives_are_as_pinned(ran):
    lines = [
        f"{key:<34}{kind:<20}{group:>3}{count:>6}{size:>10}"
        for key, found in ran[0].items()
        for (kind, group), (count, size) in sorted(found.collectives.items())
    ]
    text = "\n".join([f"{'':<34}{'':<20}{'of':>3}{'times':>6}{'bytes':>10}", *lines]) + "\n"
    if os.environ.get("FLAX_WRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 64, "tensor": 4}], ids=str)
@pytest.mark.parametrize("name", ["bert_base", "gpt2"])
def test_published_vocabularies_fit_meshes(name, sizes):
    """30522 and 50257 divide by none of these; each device keeps its part of the tables all the same."""
    task = PRESETS[name].task(PRESETS[name].presets[name]())
    params = jax.eval_shape(task.init, jax.random.key(0))
    mesh: Any = AbstractMesh(tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES), sharding.MESH_AXES)
    placed = dict(leaves(sharding.param_shardings(params, task.param_rules, mesh, task.axis_fields)))
    (path, table), *_ = [each for each in leaves(params) if each[0].endswith("token/embedding")]
    assert placed[path].shard_shape(table.shape) == (table.shape[0], table.shape[1] // math.prod(sizes.values()))
