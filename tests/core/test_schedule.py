"""Learning rate schedules at their corners, against the formulas of the papers, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.config import ScheduleConfig
from core_flax.schedule import NAMES, make_schedule
from core_flax.types import UserError


def rates(config: ScheduleConfig, peak: float = 1.0, num_steps: int = 100) -> np.ndarray:
    schedule = make_schedule(config, peak, num_steps)
    return np.array([float(schedule(step)) for step in range(num_steps + 1)])


@pytest.mark.parametrize("name", NAMES)
def test_warmup_wastes_no_step_and_reaches_the_peak(name):
    got = rates(ScheduleConfig(name=name, warmup_steps=10), peak=0.5)
    np.testing.assert_allclose(got[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    assert got.max() == 0.5
    assert (np.diff(got[9:]) <= 1e-7).all()


def test_linear():
    got = rates(ScheduleConfig(name="linear", warmup_steps=20))
    np.testing.assert_allclose(got[20:], (100 - np.arange(20, 101)) / 80, atol=1e-6)
    assert got[99] > 0 == got[100]
    assert rates(ScheduleConfig(name="linear"))[0] == 1.0


def test_linear_to_a_final_fraction():
    got = rates(ScheduleConfig(name="linear", final_fraction=0.1), peak=2.0)
    np.testing.assert_allclose(got[[0, 50, 100]], [2.0, 1.1, 0.2], rtol=1e-6)


def test_cosine():
    got = rates(ScheduleConfig(name="cosine", warmup_steps=20, final_fraction=0.2))
    want = [0.2 + 0.8 * (1 + math.cos(math.pi * (t - 20) / 80)) / 2 for t in range(20, 101)]
    np.testing.assert_allclose(got[20:], want, rtol=1e-5)


def test_wsd():
    got = rates(ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=40, final_fraction=0.5))
    assert (got[9:61] == 1.0).all()
    np.testing.assert_allclose(got[60:], 1 - 0.5 * np.arange(41) / 40, rtol=1e-6)
    assert (rates(ScheduleConfig(name="wsd"))[:91] == 1.0).all()
    assert rates(ScheduleConfig(name="wsd"))[91] == pytest.approx(0.9)


def test_inverse_sqrt_is_that_of_the_transformer():
    got = rates(ScheduleConfig(name="inverse_sqrt", warmup_steps=16))
    step = np.arange(1, 102)
    np.testing.assert_allclose(got, 4 * np.minimum(step**-0.5, step * 16**-1.5), rtol=1e-6)


def test_constant():
    assert (rates(ScheduleConfig(name="constant"), peak=0.25) == 0.25).all()


def test_total_steps_lays_the_shape_out_over_more_than_the_run():
    got = rates(ScheduleConfig(total_steps=200))
    np.testing.assert_allclose(got[[0, 100]], [1.0, 0.5])


@pytest.mark.parametrize("name", NAMES)
def test_traced_steps_give_the_same(name):
    schedule = make_schedule(ScheduleConfig(name=name, warmup_steps=3), 1e-3, 20)
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(25))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, [schedule(step) for step in range(25)], atol=1e-9)
    assert schedule(0).shape == ()


def test_neighbouring_steps_stay_apart_in_a_long_run():
    schedule = jax.jit(make_schedule(ScheduleConfig(), 1.0, 40_000_000))
    last = [float(schedule(step)) for step in (39_999_998, 39_999_999, 40_000_000)]
    np.testing.assert_allclose(last, [2 / 4e7, 1 / 4e7, 0.0], atol=1e-7)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ScheduleConfig(name="nope"), "--schedule.name 'nope'; choose one of linear"),  # type: ignore[arg-type]
        (
            ScheduleConfig(warmup_steps=100),
            "--schedule.warmup-steps 100 .* --train.num-steps is 100; set --schedule.warmup-steps to at most 99",
        ),
        (ScheduleConfig(name="constant", warmup_steps=101), "at most 100"),
        (ScheduleConfig(warmup_steps=160, total_steps=150), "--schedule.total-steps is 150; .* at most 149"),
        (ScheduleConfig(decay_steps=10), "--schedule.decay-steps is for wsd"),
        (ScheduleConfig(name="wsd", decay_steps=101), "give 1 to 100"),
        (ScheduleConfig(name="wsd", warmup_steps=50, decay_steps=51), "give 1 to 50"),
        (ScheduleConfig(name="wsd", warmup_steps=95), "--schedule.decay-steps 10 does not fit"),
        (ScheduleConfig(name="constant", final_fraction=0.1), "--schedule.final-fraction has no effect"),
        (ScheduleConfig(name="inverse_sqrt", warmup_steps=5, total_steps=200), "--schedule.total-steps has no effect"),
        (ScheduleConfig(name="inverse_sqrt"), "set --schedule.warmup-steps"),
        (ScheduleConfig(total_steps=50), "--schedule.total-steps 50 ends before --train.num-steps 100"),
    ],
)
def test_refused(config, words):
    with pytest.raises(UserError, match=words) as caught:
        make_schedule(config, 1.0, 100)
    assert "\n" not in str(caught.value)


OTHERS = {"warmup_steps": 7, "total_steps": 150, "decay_steps": 33, "final_fraction": 0.3}


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_dead_knob(name, field):
    warmup = 5 if name == "inverse_sqrt" else 0
    base = rates(ScheduleConfig(name=name, warmup_steps=warmup))
    try:
        changed = rates(ScheduleConfig(**{"name": name, "warmup_steps": warmup, field: OTHERS[field]}))
    except UserError:
        return
    assert not np.array_equal(base, changed)


def test_every_field_is_covered_and_every_name_differs():
    assert {field.name for field in dataclasses.fields(ScheduleConfig)} == {"name", *OTHERS}
    curves = [rates(ScheduleConfig(name=name, warmup_steps=5)).tobytes() for name in NAMES]
    assert len(set(curves)) == len(NAMES)
