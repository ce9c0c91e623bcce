"""Packed units: every unit where it belongs, once, and the model's scores are those of each unit alone."""

import jax
import numpy as np
import pytest

from bert_flax.finetune.batches import PackedUnits
from bert_flax.finetune.inputs import NO_TAG, Units
from bert_flax.finetune.model import BertForSequences, BertForTokens
from bert_flax.model import BertConfig

CONFIG = BertConfig(vocab_size=50, num_layers=2, width=32, num_heads=4, mlp_width=64, max_length=32)


def make_units(num_units=21, per_unit=1, seed=0, labels="class"):
    draw = np.random.default_rng(seed)
    units = Units(per_unit=per_unit, example=list(range(num_units)))
    for _ in range(num_units * per_unit):
        length = int(draw.integers(4, 33 if per_unit == 1 else 10))
        units.tokens.append(draw.integers(5, 50, length).tolist())
        units.num_first.append(int(draw.integers(2, length)))
    lengths = units.lengths
    match labels:
        case "class":
            units.labels = draw.integers(0, 3, num_units).tolist()
        case "span":
            units.labels = [tuple(np.sort(draw.integers(0, length, 2)).tolist()) for length in lengths]
        case "tags":
            units.labels = [draw.integers(NO_TAG, 4, length).astype(np.int32) for length in lengths]
    return units


def places(batch):
    """(unit, row, slot) of every unit of a batch."""
    for row, slot in zip(*np.nonzero(batch["units"] >= 0), strict=True):
        yield int(batch["units"][row, slot]), row, slot


@pytest.mark.parametrize("per_unit", [1, 4])
def test_in_order_shows_every_unit_once_and_whole(per_unit):
    units = make_units(per_unit=per_unit)
    packed = PackedUnits(units, 32)
    seen = []
    for batch in packed.in_order(3):
        assert {len(array) for array in batch.values()} == {3}
        total = 0
        for unit, row, slot in places(batch):
            seen.append(unit)
            assert batch["weights"][row, slot] == 1 and batch["labels"][row, slot] == units.labels[unit]
            for choice in range(per_unit):
                number = unit * per_unit + choice
                start, length = batch["first_tokens"][row, slot, choice], len(units.tokens[number])
                inside = slice(start, start + length)
                assert batch["tokens"][row, inside].tolist() == units.tokens[number]
                assert batch["positions"][row, inside].tolist() == list(range(length))
                assert batch["segments"][row, inside].sum() == length - units.num_first[number]
                assert len(set(batch["sequences"][row, inside])) == 1
                assert (batch["sequences"][row] == batch["sequences"][row, start]).sum() == length
                total += length
        assert np.count_nonzero(batch["sequences"]) == total and batch["weights"].sum() == (batch["units"] >= 0).sum()
    assert sorted(seen) == list(range(units.num_units))


def test_an_epoch_takes_every_unit_once_in_an_order_of_its_own():
    packed = PackedUnits(make_units(num_units=24), 32)
    epochs = []
    for epoch in range(2):
        drawn = [unit for step in range(3) for unit, *_ in places(packed.make_batch(3 * epoch + step, 8, seed=5))]
        assert sorted(drawn) == list(range(24))
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    again = PackedUnits(make_units(num_units=24), 32).make_batch(4, 8, seed=5)
    for name, array in packed.make_batch(4, 8, seed=5).items():
        np.testing.assert_array_equal(array, again[name])
    other = packed.make_batch(4, 8, seed=6)
    assert {unit for unit, *_ in places(other)} != {unit for unit, *_ in places(again)}


def test_few_shapes_and_rows_that_divide():
    packed = PackedUnits(make_units(num_units=200), 32, row_multiple=4)
    sizes = {len(packed.make_batch(step, 16, seed=1)["tokens"]) for step in range(60)}
    assert len(sizes) <= 3 and all(size % 4 == 0 for size in sizes)
    assert 0 <= PackedUnits(packed.units, 64).share_of_padding(64, 1) < 0.2
    assert packed.mean_tokens(16) == pytest.approx(16 * packed.units.lengths.mean())


def test_answers_and_tags_move_with_their_units():
    for labels in ("span", "tags"):
        units = make_units(labels=labels)
        for batch in PackedUnits(units, 32).in_order(4):
            for unit, row, slot in places(batch):
                start, length = batch["first_tokens"][row, slot, 0], len(units.tokens[unit])
                if labels == "span":
                    assert tuple(batch["labels"][row, slot] - start) == units.labels[unit]
                else:
                    assert (batch["labels"][row, start : start + length] == units.labels[unit]).all()
            if labels == "tags":
                assert (batch["labels"][batch["sequences"] == 0] == NO_TAG).all()


@pytest.mark.parametrize(("per_unit", "model"), [(1, BertForSequences), (4, BertForSequences), (1, BertForTokens)])
def test_packed_equals_alone(per_unit, model):
    units = make_units(num_units=9, per_unit=per_unit)
    module = model(CONFIG, 3)
    row_length = 32 if per_unit == 1 else 16
    packed, alone = PackedUnits(units, row_length), PackedUnits(units, row_length)
    alone._slots = 1  # one unit to a row
    batch = next(packed.in_order(16))
    assert (batch["units"] >= 0).sum(axis=1).max() > 1
    params = jax.jit(module.init)(jax.random.key(0), batch)
    apply = jax.jit(module.apply)
    together, apart = apply(params, batch), apply(params, (single := next(alone.in_order(16))))
    where = {unit: (row, slot) for unit, row, slot in places(single)}
    assert len(where) == 9
    for unit, row, slot in places(batch):
        row_alone, slot_alone = where[unit]
        if model is BertForSequences:
            np.testing.assert_allclose(together[row, slot], apart[row_alone, slot_alone], atol=1e-5)
        else:
            start, length = batch["first_tokens"][row, slot, 0], len(units.tokens[unit])
            np.testing.assert_allclose(together[row, start : start + length], apart[row_alone, :length], atol=1e-5)
