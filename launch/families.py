"""What can be planned: every preset that can be trained, with its options, its task and the shapes of its batches."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import tyro

from bert_flax import presets as bert_presets
from bert_flax import pretrain
from bert_flax import runs as bert_runs
from core_flax.config import RunConfig, with_optimizer_of, with_schedule_of
from core_flax.task import Task
from lm_flax import presets as lm_presets
from lm_flax import runs as lm_runs
from seq2seq_flax import presets as seq2seq_presets
from seq2seq_flax import task as seq2seq_task


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Where the step is to run, and what is to be told of it."""

    topology: str
    """What to plan for: a TPU slice (v5e:16x16, v5p:4x4x8, ...), several of them with the slow network between
    (v5e:16x16x2-slices, for --mesh.dcn-data or --mesh.dcn-fsdp), cpu:N, or local for the devices of this machine."""
    batch: int | None = None
    """Short for --train.batch-size."""
    search: bool = False
    """Try meshes, microbatches and remat policies, and show the best few that fit."""
    compilations: int = 20
    """With --search: how many to try; each takes from seconds to minutes."""
    explain_kernels: bool = False
    """Tell in which way attention is computed here, and why in no faster one."""
    json: bool = False
    """Print all figures as JSON, in bytes, operations and seconds."""


@dataclass(frozen=True)
class Family:
    """What one family can train.

    Attributes:
      presets: name -> function that makes a config.
      task: config -> task, without data.
      batch: (config, step) -> shapes of the global batch.
      check: raises UserError if settings do not fit each other, as at the beginning of a training.
    """

    presets: Mapping[str, Callable[[], RunConfig]]
    task: Callable[[Any], Task]
    batch: Callable[[Any, int], Mapping[str, Any]]
    check: Callable[[Any], None] = lambda config: None


FAMILIES = (
    Family(bert_presets.PRESETS, pretrain.task_without_data, pretrain.batch_shapes, bert_runs.check_model),
    Family(lm_presets.PRESETS, lm_runs.task_without_data, lm_runs.batch_shapes, lm_runs.check),
    Family(seq2seq_presets.PRESETS, seq2seq_task.task_without_data, seq2seq_task.batch_shapes),
)

PRESETS: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.presets}


def command_of(name: str) -> type[PlanOptions]:
    """The options of a plan of a preset: its config's and those of PlanOptions."""
    config = type(PRESETS[name].presets[name]())
    namespace = {"__doc__": config.__doc__}
    return dataclasses.make_dataclass("Plan", [], bases=(PlanOptions, config), namespace=namespace, frozen=True)


def defaults(name: str) -> Any:
    """The options of a plan with a preset's settings; the topology has no default."""
    config = PRESETS[name].presets[name]()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return command_of(name)(**values, topology=tyro.MISSING)


def settings(name: str, command: Any, is_cpu: bool, given: Collection[str] = ()) -> Any:
    """The config alone, as it would be on the devices: what is chosen by the device is, for one that is not here.

    Args:
      name: the preset.
      command: its options, as they were parsed.
      is_cpu: whether the devices compute in float32.
      given: options that stood on the command line (cli.options_given).

    Raises:
      UserError: the settings do not fit each other; training would refuse them, too.
    """
    preset = PRESETS[name].presets[name]()
    cls = type(preset)
    config = cls(**{field.name: getattr(command, field.name) for field in dataclasses.fields(cls)})
    optimizer = with_optimizer_of(config.optimizer, preset.optimizer, given)
    schedule = with_schedule_of(config.schedule, preset.schedule, given)
    config = dataclasses.replace(config, optimizer=optimizer, schedule=schedule)
    PRESETS[name].check(config)
    model: Any = getattr(config, "model")  # noqa: B009 (every family's config has one, RunConfig has not)
    train = config.train
    if command.batch is not None:
        train = dataclasses.replace(train, batch_size=command.batch)
    if not is_cpu:
        if train.compute_dtype == "auto":
            train = dataclasses.replace(train, compute_dtype="bfloat16")
        if getattr(model, "unroll", 1) is None:  # recurrent models have no such setting
            model = dataclasses.replace(model, unroll=1)
    return dataclasses.replace(config, train=train, model=model)
