"""Plans: what is read from a compiled program against counts by hand, and what a user is told."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bert_flax.config import BertConfig, InputsConfig, PretrainConfig
from bert_flax.model import flops_per_example
from bert_flax.pretrain import batch_shapes, task_without_data
from core_flax import cli
from core_flax.config import MeshConfig, OptimizerConfig, TrainConfig
from core_flax.types import UserError
from launch.chips import CHIPS, GIB, Chip, Topology, parse_slices, parse_topology
from launch.cli import main
from launch.families import PRESETS, command_of, defaults, settings
from launch.hlo import Collective, Work, _convolution_flops, read_work
from launch.plan import OutOfMemoryError, _roofline, collective_seconds, make_plan, needed_bytes
from launch.search import _too_large, candidates
from lm_flax import runs as lm_runs
from lm_flax.config import GPT2Run
from seq2seq_flax.batches import PairBatches

N, B, D, WAYS = 20, 16, 32, 4
CONFIG = PretrainConfig(
    model=BertConfig(vocab_size=160, num_layers=2, width=32, num_heads=4, mlp_width=64, max_length=32, remat="none"),
    inputs=InputsConfig(length=32, max_predictions=5),
    optimizer=OptimizerConfig(name="adamw"),
    train=TrainConfig(num_steps=10, batch_size=8),
    mesh=MeshConfig(fsdp=4),
)


@pytest.fixture(scope="module")
def layers():
    """Gradients of N layers of B x D rows over four devices, the weights whole on each."""
    mesh = jax.make_mesh((WAYS,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    w_NDD = jax.ShapeDtypeStruct((N, D, D), jnp.float32, sharding=whole)
    x_BD = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=rows)

    def loss(w_NDD, x_BD):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_NDD)[0])

    return read_work(jax.jit(jax.grad(loss), out_shardings=whole).lower(w_NDD, x_BD).compile().as_text())


def test_loops_count_as_often_as_they_run(layers):
    """One product forward and two backward for each layer, but that nobody asks for the first input's gradient.

    The loop computes it all the same.
    """
    assert layers.flops == 3 * N * 2 * (B // WAYS) * D * D


def test_gradients_are_summed_once_over_all_devices(layers):
    assert {(each.kind, each.group) for each in layers.collectives} == {("all-reduce", WAYS)}
    assert sum(each.bytes * each.count for each in layers.collectives) == 4 * N * D * D


def test_memory_traffic_is_of_slices_where_slices_are_read(layers):
    """At least every weight read twice and its gradient written; less than all layers' weights for each layer."""
    weights = 4 * N * D * D
    assert 3 * weights < layers.bytes < N * weights


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_convolutions_of_tpus_count_as_the_batched_products_they_are(batch):
    """[B, M, K] x [B, K, N] as a convolution over a dilated window of B, as XLA writes it for a TPU."""
    m, k, n = 8, 16, 32
    window = f"window={{size={batch} stride={max(1, batch - 1)} pad=0_0 lhs_dilate={batch}}}, dim_labels=0bf_0io->0bf"
    flops = _convolution_flops((batch, m, k), (batch, k, n), (batch, m, n), ", " + window)
    assert flops == 2 * batch * m * k * n


def test_a_convolution_counts_no_padding():
    """A filter of 3 over 5 places with one of padding on each side meets 2 + 3 + 3 + 3 + 2 places."""
    rest = ", window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    assert _convolution_flops((7, 5, 2), (3, 2, 11), (7, 5, 11), rest) == 2 * 13 * 7 * 2 * 11


@pytest.mark.parametrize(
    ("result", "phase", "products"),
    [
        ("(f32[128,64], bf16[2,4,256,64], f32[2,4,256,128])", "fwd_segmented_residuals", 2),
        ("(f32[128,64], bf16[2,4,256,64])", "dq", 3),
        ("(f32[128,64], bf16[2,2,384,64], bf16[2,2,384,64])", "dkv_segmented", 4),
        ("(f32[128,64], f32[2,3,4,256,64], bf16[2,2,384,64], bf16[2,2,384,64])", "dkv", 5),
    ],
)
def test_the_products_of_the_attention_kernel_are_counted(result, phase, products):
    """Of 4 heads of queries and 2 of keys, 256 and 384 long, 64 wide, in 2 rows."""
    text = f"""ENTRY %main (ids: s32[3]) -> f32[] {{
  %ids = s32[3]{{0}} parameter(0)
  %q = bf16[2,4,256,64]{{3,2,1,0}} parameter(1)
  %k = bf16[2,2,384,64]{{3,2,1,0}} parameter(2)
  %kernel = {result} custom-call(%ids, %q, %k, %k), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(step)/splash_mha_{phase}/pallas_call"}}
}}"""
    work = read_work(text)
    assert work.flops == products * 2 * 2 * 4 * 256 * 384 * 64
    assert work.bytes > 2 * 2 * 4 * 256 * 64


def test_a_slice_that_is_taken_within_fusions_is_a_slice():
    """As XLA nests them around collectives: a layer is read of 24, and another one written."""
    text = """%inner (a: f32[24,8], i: s32[]) -> f32[1,8] {
  %a = f32[24,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %taken = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}
}
%writing (b: f32[24,8], part: f32[1,8], j: s32[]) -> f32[24,8] {
  %b = f32[24,8]{1,0} parameter(0)
  %part = f32[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %put = f32[24,8]{1,0} dynamic-update-slice(%b, %part, %j, %j)
}
%outer (kept: f32[24,8], all: f32[24,8], k: s32[]) -> f32[24,8] {
  %kept = f32[24,8]{1,0} parameter(0)
  %all = f32[24,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %layer = f32[1,8]{1,0} fusion(%all, %k), kind=kLoop, calls=%inner
  ROOT %result = f32[24,8]{1,0} fusion(%kept, %layer, %k), kind=kLoop, calls=%writing
}
ENTRY %main (x: f32[24,8], y: f32[24,8], n: s32[]) -> f32[24,8] {
  %x = f32[24,8]{1,0} parameter(0)
  %y = f32[24,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %done = f32[24,8]{1,0} fusion(%x, %y, %n), kind=kOutput, calls=%outer
}"""
    assert read_work(text).bytes == 2 * 4 * 8 + 4


def test_what_slices_do_among_each_other_is_told_apart():
    """As libtpu writes it: part of the devices' sums goes to the host, which has it added up over slices 1 and 2."""
    text = """ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[8,128]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %gathered = bf16[8,128]{1,0} all-gather(%x), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}"""
    between, within = read_work(text).collectives
    assert between == Collective("all-reduce", 2, 2 * 8 * 128, 1, slow=True)
    assert (within.kind, within.group, within.slow) == ("all-gather", 4, False)
    two = Topology("v5e:2x2x2-slices", [FakeTpu()] * 8, CHIPS["v5e"], (2, 2), 2)
    # 6.4 Tbit/s for 256 chips; twice each half, as in any ring of two.
    assert collective_seconds(between, two) == pytest.approx(2 * 2 * 8 * 128 / 2 / 3.125e9)


def test_of_a_single_row_the_attention_kernel_has_no_dim_of_the_batch():
    text = """ENTRY %main (mask: s8[1,8,8]) -> f32[] {
  %mask = s8[1,8,8]{2,1,0} parameter(0)
  %q = bf16[4,256,64]{2,1,0} parameter(1)
  %k = bf16[2,384,64]{2,1,0} parameter(2)
  %ids = s32[256,128]{1,0} parameter(3)
  %kernel = (f32[128,64], bf16[2,384,64], bf16[2,384,64]) custom-call(%mask, %q, %k, %k, %ids), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/splash_mha_dkv_segmented/pallas_call"}
}"""
    assert read_work(text).flops == 4 * 2 * 4 * 256 * 384 * 64


@pytest.fixture(scope="module")
def plan():
    topology = Topology("cpu:4", jax.devices()[:4], Chip())
    return make_plan(task_without_data(CONFIG), CONFIG, batch_shapes(CONFIG, 0), topology)


def test_memory_is_told_by_what_takes_it(plan):
    """Adam keeps two arrays for each parameter; over fsdp a device has a quarter, but of what is split (not norms)."""
    params = jax.eval_shape(task_without_data(CONFIG).init, jax.random.key(0))
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert whole / 4 <= plan.memory.params < whole / 3
    assert plan.memory.opt_state == pytest.approx(2 * plan.memory.params, rel=1e-3)
    assert plan.memory.batch == sum(x.size * x.dtype.itemsize for x in batch_shapes(CONFIG, 0).values()) / 4
    assert plan.memory.temporaries > 0 and plan.fits is None


def test_operations_are_those_of_the_model(plan):
    """A device does its quarter of the model's own count, nothing being computed again."""
    model = 8 * flops_per_example(CONFIG.model, 32, 5)
    assert model == plan.cost.flops
    assert plan.flops == pytest.approx(model / 4, rel=0.02)


def test_fsdp_moves_as_much_as_the_textbook_says(plan):
    """Parameters are gathered forward and backward and gradients reduced: three times their bytes (Rajbhandari et al.
    2020, arXiv 1910.02054, section 7.2.2: 1.5 times plain data parallelism)."""
    params = jax.eval_shape(task_without_data(CONFIG).init, jax.random.key(0))
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    moved = sum(each.bytes * each.count * (2 if each.kind == "all-reduce" else 1) for each in plan.collectives)
    assert 1.5 * whole < moved < 5 * whole


def test_a_config_that_the_mesh_does_not_divide_is_refused():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(tensor=3))
    with pytest.raises(UserError, match=r"mesh .* places for 4 devices"):
        make_plan(
            task_without_data(config), config, batch_shapes(config, 0), Topology("cpu:4", jax.devices()[:4], Chip())
        )


def test_batches_have_the_shapes_of_those_that_are_made(data):
    from bert_flax.pretrain import make_task
    from core_flax.data.records import PassageStore
    from core_flax.text.wordpiece import WordPiece

    vocabulary = WordPiece.load(data / "vocab.txt")
    made = next(make_task(CONFIG, PassageStore(data, "train"), None, vocabulary).batches(0, range(8)))
    assert shapes_of(batch_shapes(CONFIG, 0)) == shapes_of(made)


def shapes_of(batch):
    return {name: (x.shape, x.dtype) for name, x in batch.items()}


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (178.98G) exceeds available", 178.98),
        ("Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.5G.", 20.25),
        ("Used 512.00M of", 0.5),
        ("RESOURCE_EXHAUSTED", None),
    ],
)
def test_what_the_compiler_says_is_too_much_is_understood(text, gib):
    """The words of libtpu's compiler."""
    assert needed_bytes(text) == (None if gib is None else pytest.approx(gib * GIB))


class FakeTpu:
    platform, device_kind = "tpu", "TPU v5 lite"


def test_the_roofline_is_that_of_a_calculation_by_hand():
    """v5e: 197 TFLOP/s, 819 GB/s; a ring over 16 chips of a dim that wraps uses two links of 50 GB/s."""
    topology = Topology("v5e:16x16", [FakeTpu()] * 256, CHIPS["v5e"], (16, 16))
    reduce = Collective("all-reduce", 16, 1e9, 3)
    assert collective_seconds(reduce, topology) == pytest.approx(2 * 1e9 * 15 / 16 / 100e9)
    assert collective_seconds(Collective("all-gather", 256, 1e9, 1), topology) == pytest.approx(1e9 * 255 / 256 / 200e9)
    kernels = [(197e12, 1e9, 2.0), (0.0, 819e9, 0.5)]
    found = _roofline(Work(2 * 197e12, 2e9 + 0.5 * 819e9, kernels, [reduce]), topology)
    assert found.compute == pytest.approx(2.0)
    assert found.step == pytest.approx(2.5) and found.bound == "matrix products"
    assert found.network == pytest.approx(3 * 2 * 15 / 16 / 100)


@pytest.mark.parametrize("name", ["v5e:16x16", "v5p:4x4x8", "v6e:16x16", "v5e:4x4"])
def test_topologies_are_known(name):
    assert parse_slices(f"{name}x3-slices") == (name, 3) and parse_slices(name) == (name, 1)
    assert np.prod(parse_topology(name)[1]) == np.prod([int(size) for size in name.split(":")[1].split("x")])
    assert CHIPS[name.split(":")[0]].memory >= 16 * GIB


LANGUAGE_MODELS = ("char_small", "llama_150m", "gpt_speedrun", "conv_lm", "lstm_small", "word2vec")
TRANSFORMERS = ("transformer_tiny", "transformer_modern_tiny")
ONE_OF_EACH = ("bert_tiny", *LANGUAGE_MODELS, *TRANSFORMERS, "lstm_seq2seq_small", "lstm_attention_small", "gnmt_small")


def test_one_of_each_is_one_of_each():
    kinds = {type(family.presets[name]()) for name, family in PRESETS.items()}
    assert {type(PRESETS[name].presets[name]()) for name in ONE_OF_EACH} == kinds and len(kinds) == len(ONE_OF_EACH)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_plan_knows_the_batch_that_the_model_reads(name):
    """Every field of it, and no more; and the options are the preset's with those of a plan."""
    command = cli.parse(command_of(name), ["--topology", "v5e:4x4", "--batch", "32"], "plan", defaults(name))
    config = settings(name, command, is_cpu=False)
    assert type(config) is type(PRESETS[name].presets[name]())
    assert (config.train.batch_size, config.train.compute_dtype) == (32, "bfloat16")
    task, batch = PRESETS[name].task(config), PRESETS[name].batch(config, 0)
    carry = {"carry": jax.eval_shape(task.carry)} if task.carry else {}
    params = jax.eval_shape(task.init, jax.random.key(0))
    used = set()

    class Reading(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

        def get(self, key):
            used.update({key} & self.keys())
            return super().get(key)

    def loss(params, batch):
        read = Reading(batch)
        return task.loss_sums(params, read, None)[0], task.loss_weights(read)

    jax.eval_shape(loss, params, batch | carry)
    assert used - {"row"} == (batch | carry).keys()
    assert task.cost(0).tokens >= 32


def test_translations_have_the_batches_of_pairs_of_equal_length():
    config = PRESETS["transformer_tiny"].presets["transformer_tiny"]()
    lengths = np.full(200, 7)
    pairs = [(np.arange(7), np.arange(7))] * 200

    class Store:
        source_lengths = target_lengths = lengths
        read = staticmethod(lambda numbers: [pairs[number] for number in numbers])
        __len__ = lambda self: 200  # noqa: E731

    made = PairBatches(Store(), config.inputs, config.train.batch_size, 1).make_batch(0, 0)
    assert shapes_of(made) == shapes_of(PRESETS["transformer_tiny"].batch(config, 0))


@pytest.mark.parametrize("name", ["gpt2", "lstm_small", "word2vec"])
def test_language_models_have_the_batches_of_a_text_of_documents(name):
    config = PRESETS[name].presets[name]()
    if name == "lstm_small":  # which reads on over the ends of documents
        config = dataclasses.replace(config, inputs=dataclasses.replace(config.inputs, packing="documents"))
    text = SimpleNamespace(tokens_T=np.arange(2000) % 50, ends=np.array([1200, 2000]), counts_V=np.full(50, 40))
    made = next(lm_runs.make_task(config, text, None, 49).batches(0, range(config.train.batch_size)))
    assert shapes_of(made) == shapes_of(PRESETS[name].batch(config, 0))


@pytest.mark.parametrize(
    "name", ["v5e:16x17", "v5e", "v9:2x2", "cpu:0", "v5e:16x16x0-slices", "v5e:2-slices", "v5e:3x2-slices", "gpu:8"]
)
def test_unknown_topologies_are_refused_with_a_list(name):
    with pytest.raises(UserError, match=r"unknown topology '.*'; .* cpu:N, local, .* v5p: 2x2x1, .* 8x16x16"):
        parse_topology(parse_slices(name)[0])


def test_candidates_fill_the_devices():
    tried = list(candidates(CONFIG, 16))
    assert len({dataclasses.astuple(each) for each in tried}) == len(tried)
    assert all(16 % (each.mesh.fsdp * each.mesh.tensor) == 0 for each in tried)
    first = tried[:11]  # nothing or one thing changed
    assert [each.mesh.fsdp for each in first[:3]] == [1, 4, 16]
    assert {each.train.num_microbatches for each in first} == {each.mesh.tensor for each in first} == {1, 2}
    assert {each.model.remat for each in first} == {"none", "elementwise"}


ONE_LAYER = ["--model.num-layers=1", "--model.width=32", "--model.num-heads=4", "--model.mlp-width=64"]
SHORT = ["--inputs.length=32", "--inputs.max-predictions=4", "--inputs.long-from-step=None", "--batch=8"]


def test_a_search_tells_what_it_tries_and_then_the_best(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "bert_tiny", "--topology=cpu:4", *ONE_LAYER, *SHORT, "--search", "--compilations=2"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    assert [line.split(":")[0] for line in err.splitlines()] == ["1/2", "2/2"]
    assert out.splitlines()[0] == "2 tried, 2 fit"
    assert sorted(line.split()[:3] for line in out.splitlines()[2:]) == [
        ["data=1", "x", "fsdp=4"],
        ["data=4", "1", "elementwise"],
    ]


def test_a_state_that_is_too_large_is_told_without_compiling(monkeypatch, capsys):
    """A search does not count it, and a plan says that more rows or recomputing would not help."""
    from launch import chips, plan

    small = Topology("cpu:4", jax.devices()[:4], Chip(memory=1e3))
    monkeypatch.setattr(chips, "find", lambda name: small)
    monkeypatch.setattr(plan, "_compile", lambda *args: pytest.fail("compiled"))
    for options, told in (([], "parameters and optimizer state alone need"), (["--search"], "none of 0 settings")):
        with pytest.raises(SystemExit) as stop:
            main(["plan", "bert_tiny", "--topology=cpu:4", *ONE_LAYER, *SHORT, *options])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and told in err
        assert not any(each in err for each in ("microbatches", "remat", "--batch")) or options


def test_a_state_that_is_too_large_is_to_be_split_so_that_there_is_room_for_a_step():
    """75.3 GiB on devices of 16 are 9.4 times half of it; four devices cannot do that."""
    config, error = GPT2Run(), OutOfMemoryError("", 75.3 * GIB, compiled=False)
    for devices, remedies in (
        (32, "--mesh.fsdp 16, or a larger topology"),
        (8, "--mesh.fsdp 8, or a larger topology"),
        (4, "a larger topology"),
    ):
        topology = Topology("", [None] * devices, Chip(memory=16 * GIB))
        assert _too_large(config, topology, error).endswith(f"need 75.3 GiB on a device, which has 16; try {remedies}")


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--batch=8", "--train.batch-size=8"], "--batch is short for --train.batch-size; give one of them"),
        (["--search", "--compilations=0"], "--compilations 0: must be 1 or more"),
        (
            ["--inputs.length=600", "--inputs.max-predictions=9"],
            "--inputs.length 600 exceeds --model.max-length 512, the positions that the model has",
        ),
    ],
)
def test_options_that_say_nothing_are_refused(capsys, options, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "bert_tiny", "--topology=cpu:4", *options])
    assert (stop.value.code, capsys.readouterr().err) == (2, f"flax-launch: error: {wrong}\n")


def test_a_plan_is_refused_as_the_training_would_be():
    options = ["--topology", "cpu:4", "--inputs.length", "512"]
    command = cli.parse(command_of("char_small"), options, "plan", defaults("char_small"))
    with pytest.raises(UserError, match=r"--inputs\.length 512 exceeds --model\.max-length 64"):
        settings("char_small", command, is_cpu=True)


def test_what_a_preset_chose_for_another_optimizer_is_left_out():
    """As training does; the preset has an epsilon, which lion has not."""
    argv = ["--topology", "cpu:4", "--optimizer.name", "lion"]
    command = cli.parse(command_of("bert_base"), argv, "plan", defaults("bert_base"))
    assert command.optimizer.epsilon is not None
    config = settings("bert_base", command, True, cli.options_given(command_of("bert_base"), argv))
    assert config.optimizer.name == "lion" and config.optimizer.epsilon is None


def test_the_two_cores_of_a_v4_chip_are_not_two_devices(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "bert_tiny", "--topology=v4:2x2x1"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "v4:2x2x1 cannot be planned for" in err


def test_the_command_prints_a_plan(capsys):
    """On the devices of this process, which are four."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", "bert_tiny", "--topology=cpu:4", *ONE_LAYER, *SHORT, "--mesh.tensor=2", "--json"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    told = json.loads(out)
    assert told["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2} | {
        name: 1 for name in told["mesh"].keys() - {"data", "fsdp", "tensor"}
    }
    assert told["batch_size"] == 8 and told["memory"]["total"] > 0 and told["roofline"]["step"] is None
