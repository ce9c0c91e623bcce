"""What is compiled once: by several runs, and by several commands."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_flax.compilation import keep_compiled_programs
from core_flax.config import RunConfig, ScheduleConfig, TrainConfig
from core_flax.params import ParamRule
from core_flax.program import make_program
from core_flax.task import Task

TASK = Task(
    init=lambda key: {"x": jnp.zeros(())},
    loss_weights=lambda batch: {"draw": jnp.float32(1)},
    loss_sums=lambda params, batch, key: ({"draw": jax.random.uniform(key) + params["x"]}, {}),
    batches=lambda start, rows: iter(()),
    param_rules=(ParamRule("x", "bias", ""),),
)
CONFIG = RunConfig(schedule=ScheduleConfig(name="constant"), train=TrainConfig(batch_size=4, eval_every_steps=0))


def test_seeds_share_a_program_and_draw_their_own_numbers():
    """Those of jax.random itself."""
    texts, drawn = set(), []
    for seed in (0, 7, 2**31 - 1):
        program = make_program(TASK, dataclasses.replace(CONFIG, seed=seed), jax.devices()[:1])
        state, batch = program.init(jax.random.key(0)), {"y": np.zeros(4, np.float32)}
        lowered = program.step.lower(state, batch)
        texts.add(lowered.as_text())
        _, staged = lowered.compile()(jax.tree.map(jnp.copy, state), batch)
        _, metrics = program.step(state, batch)
        drawn.append(float(metrics["loss"]))
        assert drawn[-1] == staged["loss"] == jax.random.uniform(jax.random.fold_in(jax.random.key(seed), 0))
    assert len(texts) == 1 and len(set(drawn)) == 3


# Kept in the user's cache folder


@pytest.fixture
def cache(monkeypatch, tmp_path):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_another_process_takes_what_one_has_compiled(cache):
    code = """
import json, os
from core_flax.compilation import keep_compiled_programs
keep_compiled_programs()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
step = jax.jit(lambda state, x: state * x + jax.random.normal(jax.random.key(1), x.shape), donate_argnums=0)
state = step(jax.numpy.ones(64), jax.numpy.arange(64.0))
print(json.dumps([hits.count("/jax/compilation_cache/cache_hits") > 0, state.tolist()]))
"""
    told = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        told.append(json.loads(done.stdout))
    assert [hit for hit, _ in told] == [False, True] and told[0][1] == told[1][1]
    assert any((cache / "flax-pretraining").rglob("jit*"))


def test_the_user_decides_where(cache, monkeypatch):
    keep_compiled_programs()
    assert Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).is_relative_to(cache)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_a_cache_folder_that_is_not_absolute_does_not_count(cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_done_without(cache):
    cache.write_text("a file")
    keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
