"""The mean of a run's last checkpoints, as a folder of its own that is read like the run's.

Vaswani et al. 2017 (arXiv 1706.03762, section 6.1) translate with the mean of the last 5 or 20; that the mean of points
on the way is better than the last of them is Polyak and Juditsky 1992.
"""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_flax import config as configs
from core_flax import storage
from core_flax.checkpoint import Checkpoints, list_steps, load_params
from core_flax.config import CheckpointConfig
from core_flax.run import CHECKPOINTS, CONFIG, new_folder
from core_flax.state import TrainState
from core_flax.types import Params, UserError
from core_flax.weight_files import read_json

_MOST = 10
"""Checkpoints that are averaged where nobody says how many."""


def average(
    workdir: str, last: int | None, output: str | None = None, *, kinds: Collection[str]
) -> tuple[Path, list[int]]:
    """Write the mean of a run's last checkpoints as a folder with one checkpoint, of the last one's step.

    It has the run's settings and tokenizer, so whatever reads a run's parameters reads it; there is nothing of an
    optimizer, so training cannot go on from it. Of a run that keeps a moving average of its parameters
    (train.ema_decay) it is the mean of those.

    Args:
      workdir: folder of the run.
      last: how many checkpoints, the newest of those that are there; None: all, but no more than 10.
      output: folder to write; None: WORKDIR/averaged-<last>.
      kinds: the family's kinds of runs.

    Returns:
      (the folder, the steps that were averaged).

    Raises:
      UserError: there is no run of these kinds, it has not so many checkpoints, one is damaged, it is a mean itself,
        or the output is not empty.
    """
    folder = storage.folder("--workdir", workdir)
    if last is not None and last < 1:
        raise UserError(f"--last {last}: must be 1 or more")
    if (before := configs.load(folder / CONFIG, kinds, averaged=int | None)["averaged"]) is not None:
        raise UserError(f"{folder} is the mean of {before} checkpoints already; give the --workdir of their run")
    steps = list_steps(folder / CHECKPOINTS)
    if last is None:
        last = max(1, min(_MOST, len(steps)))
    home = new_folder(folder / f"averaged-{last}" if output is None else output)
    if not steps:
        raise UserError(f"{folder} has no checkpoint yet; train until it saves one")
    if len(steps) < last:
        raise UserError(
            f"--last {last}: {folder} has {len(steps)} checkpoints (steps {', '.join(map(str, steps))}); ask "
            "for fewer, or train with --checkpoint.keep-last that high"
        )
    params = mean_of(folder / CHECKPOINTS, steps[-last:])
    storage.make_folder(home)
    checkpoints = Checkpoints(home / CHECKPOINTS, CheckpointConfig())
    checkpoints.save(TrainState(jnp.int32(steps[-1]), params, {}))
    checkpoints.close()
    _copy_settings(folder, home, last)
    return home, steps[-last:]


def mean_of(directory: Path, steps: Sequence[int]) -> Params:
    """The mean of the parameters of these checkpoints: sums in float64, one checkpoint at a time in memory, float32.

    Raises:
      UserError: one is not there or is damaged.
    """
    sums: Any = None
    for step in steps:
        params, _ = load_params(directory, step)
        if sums is None:
            sums = jax.tree.map(lambda x: np.zeros(x.shape), params)
        for total, x in zip(jax.tree.leaves(sums), jax.tree.leaves(params), strict=True):
            total += np.asarray(x)
    return jax.tree.map(lambda total: jnp.asarray((total / len(steps)).astype(np.float32)), sums)


def _copy_settings(folder: Path, home: Path, last: int) -> None:
    """All files that lie beside the checkpoints but for records and locks; config.json last, it makes a run."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in (".jsonl", ".lock", ".tmp") and path.name != CONFIG:
            with storage.replacing(home / path.name) as partial:
                partial.write_bytes(path.read_bytes())
    stored: dict[str, Any] = {**read_json(folder / CONFIG), "averaged": last}
    if isinstance(stored.get("data"), str):  # of data in the run's own folder it says where, from there
        stored["data"] = os.path.normpath(storage.absolute(folder) / stored["data"])
    with storage.replacing(home / CONFIG) as partial:
        partial.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
