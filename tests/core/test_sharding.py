"""Placement on four fake devices: the table is checked, and arrays lie where it says."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bert_flax import sharding as bert_sharding
from core_flax import sharding
from core_flax.config import MeshConfig, OptimizerConfig
from core_flax.optim import make_optimizer
from core_flax.params import ParamRule
from core_flax.state import TrainState
from core_flax.types import UserError
from lm_flax import sharding as lm_sharding
from seq2seq_flax import sharding as seq2seq_sharding

PARAMS = {
    "table": jnp.zeros((12, 8)),
    "layers": {"query": jnp.zeros((2, 8, 4, 2)), "down": jnp.zeros((2, 16, 8)), "norm": jnp.zeros((2, 8))},
}
RULES = (
    ParamRule("table", "embedding", "vocab table_width"),
    ParamRule("layers/query", "matrix", "layer embed | heads head_width"),
    ParamRule("layers/down", "matrix", "layer mlp | embed"),
    ParamRule("layers/norm", "norm", "layer width"),
)
FIELDS = {"vocab": "--model.vocab-size", "heads": "--model.num-heads"}


def mesh(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:4])


def place(params, rules=RULES, **sizes):
    return sharding.param_shardings(params, rules, mesh(**sizes), FIELDS)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, {"data": 4, "fsdp": 1, "tensor": 1}),
        ({"fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 1}),
        ({"fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 2, "tensor": 2}),
        ({"data": 1, "tensor": 4}, {"data": 1, "fsdp": 1, "tensor": 4}),
    ],
)
def test_data_takes_the_devices_that_are_left(sizes, expected):
    assert dict(mesh(**sizes).shape) == dict.fromkeys(sharding.MESH_AXES, 1) | expected


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 4, "fsdp": 2}, {"fsdp": 3}, {"tensor": 8}])
def test_a_mesh_must_cover_the_devices(sizes):
    with pytest.raises(UserError, match=r"for 4 devices; choose --mesh\.data, --mesh\.fsdp and --mesh\.tensor"):
        mesh(**sizes)


def test_an_unknown_logical_axis():
    with pytest.raises(ValueError, match="unknown logical axis 'hedas'"):
        sharding.spec(("embed", "hedas"))
    with pytest.raises(ValueError, match="unknown logical axis 'hedas'"):
        place({"x": jnp.zeros((4, 4))}, (ParamRule("x", "matrix", "embed | hedas"),))


def test_two_dims_over_one_mesh_axis():
    with pytest.raises(ValueError, match=r"two dims .* \('vocab', 'embed'\) -> \[.*'fsdp', 'dcn_fsdp', 'fsdp'\]"):
        sharding.spec(("vocab", "embed"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[1:], "'table' matches no line"),
        ((*RULES, ParamRule("tab.*", "embedding", "vocab width")), r"'table' matches 2 lines \(table, tab\.\*\)"),
        ((ParamRule("table", "embedding", "vocab"), *RULES[1:]), r"'table' has shape \(12, 8\), its line .* 'vocab'"),
        ((ParamRule("abl", "embedding", "vocab width"), *RULES[1:]), "'table' matches no line"),  # the whole path
    ],
)
def test_every_parameter_has_one_line_with_its_dims(rules, message):
    with pytest.raises(ValueError, match=message):
        place(PARAMS, rules)


def test_a_table_whose_entries_do_not_divide_is_split_by_its_width():
    """Never whole on every device."""
    params = PARAMS | {"table": jnp.zeros((10, 8))}
    assert place(params, fsdp=2, tensor=2)["table"].spec == P(None, ("tensor", "sequence", "dcn_fsdp", "fsdp"))
    assert place(params, fsdp=2)["table"].spec[1] is None  # two ways divide ten


def test_a_size_that_does_not_divide_names_its_field():
    message = r"--model\.vocab-size = 10 cannot be split 4 ways \(--mesh\.tensor 2 x --mesh\.fsdp 2\): .* 4 \(12 is the"
    with pytest.raises(UserError, match=message):
        place(PARAMS | {"table": jnp.zeros((10, 6))}, fsdp=2, tensor=2)
    with pytest.raises(UserError, match=r"layers/down = 6 cannot be split 4 ways \(--mesh\.tensor 4\)"):
        place(PARAMS | {"layers": PARAMS["layers"] | {"down": jnp.zeros((2, 6, 8))}}, tensor=4)


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "advice"),
    [(6, 1, "4, such as 8"), (12, 2, "8, such as 16"), (1, 1, "4, such as 4"), (8, 0, "4, such as 8")],
)
def test_a_batch_that_does_not_divide(batch_size, num_microbatches, advice):
    message = f"--train.batch-size {batch_size} does not .* {num_microbatches} microbatches x 4 .* multiple of {advice}"
    with pytest.raises(UserError, match=message):
        sharding.check_batch_size(batch_size, num_microbatches, mesh(fsdp=2))
    sharding.check_batch_size(16, 4, mesh(fsdp=2))
    sharding.check_batch_size(2, 2, mesh(tensor=4))


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "hosts", "advice"),
    [
        (256, 1, 3, "choose a multiple of 24, such as 264, or 2 hosts instead of 3"),
        (256, 2, 5, "choose a multiple of 80, such as 240, or 4 hosts instead of 5"),
        (40, 1, 4, "choose a multiple of 32, such as 32, or 5 hosts instead of 4"),
        (8, 1, 4, "choose a multiple of 32, such as 32, or 1 host instead of 4"),
        (12, 1, 2, "choose a multiple of 16, such as 16"),
    ],
)
def test_hosts_that_do_not_divide_a_batch(batch_size, num_microbatches, hosts, advice):
    """Of eight devices each; the nearest number of hosts that does is told, the smaller of equals."""
    devices = np.array([SimpleNamespace(process_index=number // 8) for number in range(8 * hosts)])
    on = SimpleNamespace(shape=dict.fromkeys(sharding.MESH_AXES, 1) | {"data": 8 * hosts}, devices=devices)
    with pytest.raises(UserError) as refused:
        sharding.check_batch_size(batch_size, num_microbatches, on)
    assert str(refused.value).endswith(f" microbatches x {8 * hosts} devices: {advice}")


def test_parameters_lie_where_the_table_says():
    placed = jax.device_put(PARAMS, place(PARAMS, fsdp=2, tensor=2))
    shards = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, placed)
    assert shards == {"table": (3, 8), "layers": {"query": (2, 4, 2, 2), "down": (2, 8, 4), "norm": (2, 8)}}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_moments_lie_with_their_parameters(name):
    on = mesh(fsdp=2, tensor=2)
    params = sharding.param_shardings(PARAMS, RULES, on)
    optimizer = make_optimizer(OptimizerConfig(name=name), lambda step: 1.0, RULES)
    state = TrainState(jnp.zeros(()), PARAMS, jax.eval_shape(optimizer.init, PARAMS))
    placed = sharding.state_shardings(state, params, on)
    assert placed.params == params
    flat = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): each
        for keys, each in jax.tree.leaves_with_path(placed.opt_state)
    }
    moments = [each for path, each in flat.items() if path.endswith("layers/query")]
    assert moments and all(each == params["layers"]["query"] for each in moments)
    assert all(each.spec == P() for path, each in flat.items() if path.endswith("count"))


def test_moments_are_split_over_data_too_with_zero1():
    """The parameters stay where they are; a table whose entries the axes do not divide is split by its width."""
    on, shapes = mesh(data=2, fsdp=2), PARAMS | {"table": jnp.zeros((6, 8))}
    params = sharding.param_shardings(shapes, RULES, on)
    optimizer = sharding.param_shardings(shapes, RULES, on, FIELDS, sharding.OPTIMIZER_PLACEMENT)
    state = TrainState(jnp.zeros(()), shapes, {"mu": shapes, "count": jnp.zeros(())}, ema=shapes)
    placed = sharding.state_shardings(state, params, on, optimizer)
    assert placed.params == placed.ema == params
    mine = jax.tree.map(lambda x, where: where.shard_shape(x.shape), shapes, placed.opt_state["mu"])
    theirs = jax.tree.map(lambda x, where: where.shard_shape(x.shape), shapes, params)
    assert theirs["table"] == (3, 8) and mine["table"] == (6, 2)
    assert theirs["layers"]["query"][1] == 4 and mine["layers"]["query"][1] == 2
    assert mine["layers"]["norm"] == theirs["layers"]["norm"] == (2, 8)
    assert placed.opt_state["count"].spec == P()
    with pytest.raises(UserError, match=r"--model.width = 10 .* 4 ways \(--mesh.fsdp 2 x --mesh.data 2\)"):
        narrow = {"layers": {"down": jnp.zeros((2, 8, 10))}}
        rules = (ParamRule("layers/down", "matrix", "layer mlp | embed"),)
        sharding.param_shardings(narrow, rules, on, {"embed": "--model.width"}, sharding.OPTIMIZER_PLACEMENT)


def test_factored_moments_are_whole():
    on, params = mesh(fsdp=4), {"up": jnp.zeros((2, 128, 256))}
    rules = (ParamRule("up", "matrix", "layer embed | mlp"),)
    optimizer = make_optimizer(OptimizerConfig("adafactor"), lambda step: 1.0, rules)
    state = TrainState(jnp.zeros(()), params, jax.eval_shape(optimizer.init, params))
    placed = sharding.state_shardings(state, sharding.param_shardings(params, rules, on), on).opt_state
    assert placed["factored"]["row"]["up"].spec == placed["factored"]["col"]["up"].spec == P()


def test_a_moment_of_another_shape_is_whole():
    """Though its path ends in the parameter's and it has as many dims: the axes of another size are not to be split."""
    on, params = mesh(fsdp=4), {"up": jnp.zeros((8, 4))}
    state = TrainState(jnp.zeros(()), params, {"same": params, "other": {"up": jnp.zeros((2, 4))}})
    shardings = sharding.param_shardings(params, (ParamRule("up", "matrix", "embed | mlp"),), on)
    placed = sharding.state_shardings(state, shardings, on).opt_state
    assert placed["same"]["up"].spec == sharding.spec(("embed", "mlp")) and placed["other"]["up"].spec == P()


@pytest.mark.parametrize("num_rows", [4, 8, 12, 16, 40])
def test_the_share_of_a_batch_of_another_size(num_rows):
    """Of four devices a host has the second and the last."""
    for batch_size in (4, 8, 20):
        of_devices = np.arange(batch_size).reshape(4, -1)[[1, 3]].ravel()
        share = sharding.same_share(of_devices, batch_size, num_rows)
        np.testing.assert_array_equal(share, np.arange(num_rows).reshape(4, -1)[[1, 3]].ravel())


def test_batches_lie_by_rows():
    on = mesh(fsdp=2)
    np.testing.assert_array_equal(sharding.host_rows(8, on), range(8))
    x = np.arange(24).reshape(8, 3)
    placed = sharding.place_batch({"x": x}, 8, on)["x"]
    np.testing.assert_array_equal(placed, x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}


def test_constrain_places_an_activation():
    x_BLF = jnp.zeros((4, 3, 8))
    place_it = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "mlp"))
    on = mesh(fsdp=2, tensor=2)
    with jax.set_mesh(on):
        assert place_it(x_BLF).sharding.is_equivalent_to(NamedSharding(on, P(("data", "fsdp"), None, "tensor")), 3)


def test_constrain_does_nothing_without_our_mesh():
    x, names = jnp.zeros((3, 5)), ("batch", "mlp")
    assert sharding.constrain(x, *names) is x
    for axes in (("x", "y"), ("data", "model")):
        with jax.set_mesh(jax.make_mesh((2, 2), axes, devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)):
            assert sharding.constrain(x, *names) is x


def test_table():
    shapes = jax.tree.map(lambda x: SimpleNamespace(shape=x.shape), PARAMS)
    assert sharding.table(shapes, RULES)[0] == (
        "layers/down",
        (2, 16, 8),
        "P(None, ('tensor', 'sequence'), ('dcn_fsdp', 'fsdp'))",
    )


TABLES = {
    "bert": bert_sharding.PARAM_RULES,
    **{f"lm {name}": rules for name, rules in vars(lm_sharding).items() if name.endswith("RULES")},
    **{f"seq2seq {name}": rules for name, rules in vars(seq2seq_sharding).items() if name.endswith("RULES")},
}


@pytest.mark.parametrize("table", TABLES)
def test_of_what_is_a_matrix_the_table_says_where_its_outputs_begin(table):
    """Optimizers that look at rows and columns ask."""
    kinds = [(rule.kind, rule.axes.count("|")) for rule in TABLES[table]]
    assert kinds and all(bars == 1 for kind, bars in kinds if kind in ("matrix", "head"))
