"""The settings every family shares: frozen dataclasses, one place per knob, with unit and meaning.

A family's own config is a frozen dataclass that holds these as fields beside its model and its data settings. The
docstring under a field is its help text on the command line. Fields named in a class's ``FREE`` may differ when a run
is resumed; all others define the run, and ``differences`` names those that would make it another run.
"""

import dataclasses
import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from core_flax.storage import replacing
from core_flax.types import UserError

CONFIG_FORMAT = 1


def check_range(
    section: str,
    config: Any,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuses fields whose values are not finite or lie outside the bounds. None, where a field may be that, is fine.

    Every config calls it when it is made, so settings out of range are refused in one spelling wherever they come from.

    Args:
      section: the config's name as a field, which its options begin with; "": it is the whole.
      config: what holds the fields.
      names: the fields.
      least: smallest value.
      above: what the value must exceed.
      most: largest value.
      below: what the value must stay below.

    Raises:
      UserError: a value is out of range; the text names its option and the bounds.
    """
    bounds = [
        ("{} or more", least, operator.ge),
        ("more than {}", above, operator.gt),
        ("at most {}", most, operator.le),
        ("less than {}", below, operator.lt),
    ]
    given = [(words.format(bound), bound, holds) for words, bound, holds in bounds if bound is not None]
    for name in names:
        value = getattr(config, name)
        if value is None or (math.isfinite(value) and all(holds(value, bound) for _, bound, holds in given)):
            continue
        option = f"{section}.{name}".removeprefix(".").replace("_", "-")
        or_none = ", or None" if type(None) in typing.get_args(typing.get_type_hints(type(config))[name]) else ""
        wanted = " and ".join(words for words, _, _ in given) or "a finite number"
        raise UserError(f"--{option} {value}: must be {wanted}{or_none}")


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates. A field left at None takes the optimizer's published default."""

    name: Literal["adamw", "lamb", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """Update rule. muon: Muon for the hidden layers' matrices, AdamW for everything else."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached when the warmup ends; for adafactor a share of each parameter's own RMS."""
    weight_decay: float = 0.01
    """Decoupled weight decay (times the learning rate); never applied to biases and norms. 0: none."""
    clip_norm: float | None = 1.0
    """Clip gradients to this L2 norm over all parameters together; None: no clipping."""
    beta1: float | None = None
    """Decay of the first moment; muon and sgd: of the momentum (muon's AdamW part keeps 0.9). None: 0.9; muon 0.95;
    adafactor and sgd none."""
    beta2: float | None = None
    """Decay of the second moment; lion: of the momentum; adafactor has a schedule of its own instead; sgd has none.
    None: 0.999; lion 0.99."""
    epsilon: float | None = None
    """Term that keeps the denominator away from zero; adafactor: added to squared gradients; lion and sgd have none.
    None: 1e-8; lamb 1e-6; adafactor 1e-30."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("optimizer", self, "learning_rate", "clip_norm", "epsilon", above=0)
        check_range("optimizer", self, "weight_decay", least=0)
        check_range("optimizer", self, "beta1", "beta2", least=0, below=1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, as a share of optimizer.learning_rate."""

    name: Literal["linear", "inverse_sqrt", "cosine", "wsd", "constant"] = "linear"
    """Shape after the warmup. wsd: stable at the peak, then linear decay over the last decay_steps; inverse_sqrt: falls
    with the root of the step, from the end of the warmup."""
    warmup_steps: int = 0
    """Steps of linear warmup; the first runs at peak / warmup_steps, the last at the peak. 0: none."""
    total_steps: int | None = None
    """Steps over which the shape is laid out (linear, cosine, wsd); None: train.num_steps. Set it for a run that may be
    made longer later."""
    decay_steps: int | None = None
    """wsd only: length of the final decay in steps; None: a tenth of total_steps."""
    final_fraction: float = 0.0
    """Learning rate at the end as a share of the peak (linear, cosine, wsd)."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("schedule", self, "warmup_steps", least=0)
        check_range("schedule", self, "total_steps", "decay_steps", least=1)
        check_range("schedule", self, "final_fraction", least=0, most=1)


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, on how much at a time, in what precision."""

    num_steps: int = 1000
    """Optimizer steps of the whole run (not: more steps)."""
    batch_size: int = 256
    """Examples per optimizer step, over all devices, hosts and microbatches together."""
    num_microbatches: int = 1
    """Portions in which a batch goes through the model, to save memory; changes no result."""
    eval_every_steps: int = 1000
    """Steps between evaluations on held-out data; 0: only at the end."""
    eval_batches: int = 0
    """Batches (of batch_size) per evaluation; 0: all of the held-out data."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters, optimizer
    state, softmax, norms and losses are float32 always."""
    ema_decay: float | None = None
    """Keep a moving average of the parameters beside them, of which every step t keeps this share (less at the start:
    (1 + t) / (10 + t) at most), and evaluate, rank checkpoints and hand on the model by it. None: no average."""

    FREE: ClassVar = frozenset({"num_steps", "num_microbatches", "eval_every_steps", "eval_batches"})

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("train", self, "num_steps", "batch_size", "num_microbatches", least=1)
        check_range("train", self, "num_steps", below=2**31)  # an int32 counts them
        check_range("train", self, "eval_every_steps", "eval_batches", least=0)
        check_range("train", self, "ema_decay", above=0, below=1)


@dataclass(frozen=True)
class MeshConfig:
    """How many ways the devices are split; the product must be the number of devices."""

    data: int = -1
    """Ways the batch is split, parameters whole on each; -1: all the devices that the other axes leave."""
    fsdp: int = 1
    """Ways the batch and also parameters and optimizer state are split."""
    tensor: int = 1
    """Ways heads, feed-forward and vocabulary are split."""
    sequence: int = 1
    """As tensor, and what lies between sublayers (norms, dropout, residuals) is split too, along the length."""
    dcn_data: int = 1
    """Slices (or hosts of GPUs) over which the batch is split, parameters whole in each: across the slow network."""
    dcn_fsdp: int = 1
    """Slices (or hosts of GPUs) over which the batch and also parameters and optimizer state are split."""
    zero1: bool = False
    """Split optimizer state over data as well, where parameters are whole (ZeRO-1): less memory, the same run."""

    FREE: ClassVar = frozenset({"data", "fsdp", "tensor", "sequence", "dcn_data", "dcn_fsdp", "zero1"})

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("mesh", self, "fsdp", "tensor", "sequence", "dcn_data", "dcn_fsdp", least=1)
        if self.data != -1:
            check_range("mesh", self, "data", least=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which stay. The last step and a signal save as well."""

    every_steps: int = 1000
    """Steps between checkpoints; 0: none by steps."""
    every_minutes: float = 10.0
    """Minutes between checkpoints, whichever comes first; 0: none by time."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_best: int = 1
    """Checkpoints with the best held-out loss, or the best metric of a task, that stay besides; 0: none."""

    FREE: ClassVar = frozenset({"every_steps", "every_minutes", "keep_last", "keep_best"})

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("checkpoint", self, "every_steps", "every_minutes", "keep_best", least=0)
        check_range("checkpoint", self, "keep_last", least=1)


@dataclass(frozen=True)
class LogConfig:
    """What is printed and written while training."""

    every_steps: int = 10
    """Steps between progress figures (averages over those steps)."""
    tensorboard: bool = True
    """Write TensorBoard files under WORKDIR/tensorboard, if the package tensorboard is installed."""
    stall_seconds: float = 300.0
    """Report a step that has not ended after so many seconds, with the stack of every thread, and again whenever that
    time has doubled; the run goes on. Compilation, evaluation and checkpoints are not counted. 0: never."""

    FREE: ClassVar = frozenset({"every_steps", "tensorboard", "stall_seconds"})

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("log", self, "every_steps", least=1)
        check_range("log", self, "stall_seconds", least=0)


@dataclass(frozen=True)
class RunConfig:
    """What every training run has; a family's config adds its model and its inputs."""

    seed: int = 0
    """Seed of everything drawn: initial parameters, order of the data, masks, dropout."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        check_range("", self, "seed", least=0, below=2**31)


def with_optimizer_of(config: OptimizerConfig, preset: OptimizerConfig, given: Collection[str]) -> OptimizerConfig:
    """The settings without what the preset chose for another optimizer than the one that was asked for.

    What was asked for stays, and be it the preset's own value: ``given`` are the options that were (cli.options_given).

    Raises:
      UserError: one of the two is sgd, whose learning rates are of another size, and none was asked for.
    """
    if config.name == preset.name:
        return config
    if "sgd" in (config.name, preset.name) and "--optimizer.learning-rate" not in given:
        raise UserError(
            f"--optimizer.name {config.name}: the preset's learning rate of {preset.learning_rate:g} is for "
            f"{preset.name}; give --optimizer.learning-rate too"
        )
    names = ("beta1", "beta2", "epsilon")
    return dataclasses.replace(config, **{name: None for name in names if f"--optimizer.{name}" not in given})


def with_schedule_of(config: ScheduleConfig, preset: ScheduleConfig, given: Collection[str]) -> ScheduleConfig:
    """The settings without what the preset chose for another shape than the one that was asked for; ``given`` likewise.

    How long it warms up stays: that is a matter of the model.
    """
    if config.name == preset.name:
        return config
    defaults = {name: getattr(ScheduleConfig, name) for name in ("decay_steps", "final_fraction")}
    if config.name in ("constant", "inverse_sqrt"):
        defaults["total_steps"] = None
    options = {name: f"--schedule.{name.replace('_', '-')}" for name in defaults}
    return dataclasses.replace(config, **{name: x for name, x in defaults.items() if options[name] not in given})


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """The inverse of to_dict; absent fields take defaults.

    Raises:
      UserError: a field that ``cls`` does not have, a value of another type than the field's, or one out of range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'config'} is {values!r}, no object with settings")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}
    inner = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise UserError(f"unknown setting {where}{name}" + (f"; did you mean {where}{near[0]}?" if near else ""))
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value, f"{where}{name}.")
        elif not _is_a(hints[name], value):
            raise UserError(f"{where}{name} is {value!r}, where {_describe(hints[name])} is wanted")
        inner[name] = tuple(value) if typing.get_origin(hints[name]) is tuple else value
    for field in dataclasses.fields(cls):
        if field.name not in inner and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}{field.name} is missing")
    return cls(**inner)


def _is_a(hint: Any, value: Any) -> bool:
    """Whether a value read from JSON has the type of a field."""
    if isinstance(hint, types.UnionType):
        return any(_is_a(each, value) for each in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:  # of any number of values of one type; a list in JSON
        return isinstance(value, list) and all(_is_a(typing.get_args(hint)[0], each) for each in value)
    if typing.get_origin(hint) is Mapping:
        return isinstance(value, dict) and all(_is_a(typing.get_args(hint)[1], each) for each in value.values())
    if hint in (int, float):  # JSON writes 1.0 and 1, and neither is a bool, which Python takes for an int
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return getattr(hint, "__name__", str(hint)).replace("NoneType", "None")


def save(path: Path, kind: str, config: Any, **extra: Any) -> None:
    """Write config.json atomically: format version, kind of run, settings, and what else identifies the run.

    Raises:
      UserError: the disk is full, or does not let us write there.
    """
    text = json.dumps({"format": CONFIG_FORMAT, "kind": kind, "config": to_dict(config), **extra}, indent=2)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def load(path: Path, kinds: str | Collection[str], **extra: type | types.UnionType) -> dict[str, Any]:
    """Read what ``save`` wrote; ``extra`` are the types of what it was given besides the config.

    What is absent is None where the type allows it.

    Raises:
      UserError: it is missing, damaged, of another kind or of another format.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run: {path.name} is missing; give the --workdir of a training run")
    remedy = "restore it or start in a new workdir"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds no JSON object; {remedy}")
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    if stored.get("kind") not in wanted:
        kinds = " or ".join(map(repr, wanted))
        what = f"a run of kind {stored['kind']!r}, not {kinds}" if "kind" in stored else f"no run of kind {kinds}"
        raise UserError(f"{path} describes {what}; give the folder of such a run")
    if stored.get("format") != CONFIG_FORMAT:
        raise UserError(f"{path} has format {stored.get('format')}; this version reads format {CONFIG_FORMAT}")
    for name, hint in {"config": dict, **extra}.items():
        if type(None) in typing.get_args(hint):
            stored.setdefault(name, None)
        if name not in stored:
            raise UserError(f"{path} lacks {name}; {remedy}")
        if not _is_a(hint, stored[name]):
            raise UserError(f"{path}: {name} is {stored[name]!r}, where {_describe(hint)} is wanted; {remedy}")
    return stored


def load_config(path: Path, cls: type, stored: dict[str, Any], name: str = "config") -> Any:
    """The settings in what ``load`` returned, or another part of it that a dataclass describes.

    Raises:
      UserError: they are not those of ``cls``; the text names the file.
    """
    try:
        return from_dict(cls, stored[name], "" if name == "config" else f"{name}.")
    except UserError as error:
        raise UserError(f"{path}: {error}; restore it or start in a new workdir") from error


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Lines ``field: old -> new`` for every setting that makes ``new`` another run than ``old``.

    train.num_steps may differ (a run may stop earlier, or go on longer) unless the schedule is laid out over it.
    """
    return _differences(_with_horizon(old), _with_horizon(new), "")


def _with_horizon(config: RunConfig) -> RunConfig:
    schedule = config.schedule
    if schedule.total_steps is None and schedule.name in ("linear", "cosine", "wsd"):
        schedule = dataclasses.replace(schedule, total_steps=config.train.num_steps)
    return dataclasses.replace(config, schedule=schedule)


def _differences(old: Any, new: Any, where: str) -> list[str]:
    lines = []
    free = getattr(type(new), "FREE", frozenset())
    for field in dataclasses.fields(new):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(after):
            lines += _differences(before, after, f"{where}{field.name}.")
        elif before != after and field.name not in free:
            lines.append(f"{where}{field.name}: {before} -> {after}")
    return lines
