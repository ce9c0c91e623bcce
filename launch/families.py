"""What can be planned: every preset that can be trained, with its options, its task and the shapes of its batches."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tyro

from bert_flax import pretrain
from bert_flax.config import PretrainConfig
from bert_flax.presets import PRESETS as BERT_PRESETS
from core_flax.config import RunConfig
from core_flax.task import Task


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Where the step is to run, and what is to be told of it."""

    topology: str
    """What to plan for: a TPU slice (v5e:16x16, v5p:4x4x8, ...), cpu:N, or local for the devices of this machine."""
    batch: int | None = None
    """Short for --train.batch-size."""
    search: bool = False
    """Try meshes, microbatches and remat policies, and show the best few that fit."""
    compilations: int = 12
    """With --search: how many to try; each takes from seconds to minutes."""
    json: bool = False
    """Print all figures as JSON, in bytes, operations and seconds."""


@dataclass(frozen=True, kw_only=True)
class BertPlan(PlanOptions, PretrainConfig):
    """A plan of ``bert-flax pretrain``, at the length of its last steps."""


@dataclass(frozen=True)
class Family:
    """What one family can train.

    Attributes:
      presets: name -> function that makes a config.
      command: options of the plan: its fields are the config's and those of PlanOptions.
      task: config -> task, without data.
      batch: (config, step) -> shapes of the global batch.
    """

    presets: Mapping[str, Callable[[], RunConfig]]
    command: type[PlanOptions]
    task: Callable[[Any], Task]
    batch: Callable[[Any, int], Mapping[str, Any]]


FAMILIES = (Family(BERT_PRESETS, BertPlan, pretrain.task_without_data, pretrain.batch_shapes),)

PRESETS: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.presets}


def defaults(name: str) -> Any:
    """The options of a plan with a preset's settings; the topology has no default."""
    family = PRESETS[name]
    config = family.presets[name]()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return family.command(**values, topology=tyro.MISSING)


def settings(name: str, command: Any, is_cpu: bool) -> Any:
    """The config alone, as it would be on the devices: what is chosen by the device is, for one that is not here."""
    cls = type(PRESETS[name].presets[name]())
    config = cls(**{field.name: getattr(command, field.name) for field in dataclasses.fields(cls)})
    model: Any = getattr(config, "model")  # noqa: B009 (every family's config has one, RunConfig has not)
    train = config.train
    if command.batch is not None:
        train = dataclasses.replace(train, batch_size=command.batch)
    if not is_cpu:
        if train.compute_dtype == "auto":
            train = dataclasses.replace(train, compute_dtype="bfloat16")
        if model.unroll is None:
            model = dataclasses.replace(model, unroll=1)
    return dataclasses.replace(config, train=train, model=model)
