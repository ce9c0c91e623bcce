"""``flax-launch``: runs of several processes: on this machine, on a cluster, and their plan beforehand."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from core_flax import cli
from core_flax.types import UserError
from launch.jobs import Job, JobOptions, submit

PROG = "flax-launch"
C = TypeVar("C", bound=JobOptions)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    from core_flax.logs import quiet_libraries

    quiet_libraries()
    cli.main(
        PROG,
        {
            "plan": ("compile a preset's step for devices that are not here: memory, time, what bounds it", _plan),
            "local": ("run a training command as several processes on this machine", _local),
            "slurm": ("run it on nodes of a Slurm cluster", _slurm),
            "tpu-vm": ("run it on all workers of a Cloud TPU slice", _tpu_vm),
            "gke": ("run it on TPU slices of Google Kubernetes Engine", _gke),
        },
        argv,
    )


def _split(argv: Sequence[str], prog: str) -> tuple[list[str], list[str]]:
    """(options, command to run), which ``--`` parts."""
    before, parted, after = list(argv), "--" in argv, []
    if parted:
        at = before.index("--")
        before, after = before[:at], before[at + 1 :]
    if not after and not {"-h", "--help"} & set(before):
        raise UserError(f"no command to run; give one after --: {prog} [options] -- bert-flax pretrain ...")
    return before, after


def _local(argv: Sequence[str]) -> None:
    from launch.local import LocalCommand, run

    prog = f"{PROG} local"
    options, command = _split(argv, prog)
    doc = f"{prog} [options] -- COMMAND. {LocalCommand.__doc__}"
    status = run(cli.parse(LocalCommand, options, prog, description=doc), command)
    if status:
        sys.exit(status)


def _slurm(argv: Sequence[str]) -> None:
    from launch.slurm import SlurmCommand, make_job

    _submit(argv, "slurm", SlurmCommand, make_job)


def _tpu_vm(argv: Sequence[str]) -> None:
    from launch.tpu_vm import TpuVmCommand, make_job

    _submit(argv, "tpu-vm", TpuVmCommand, make_job)


def _gke(argv: Sequence[str]) -> None:
    from launch.gke import GkeCommand, make_job

    _submit(argv, "gke", GkeCommand, make_job)


def _submit(argv: Sequence[str], name: str, cls: type[C], make_job: Callable[[C, Sequence[str]], Job]) -> None:
    prog = f"{PROG} {name}"
    options, command = _split(argv, prog)
    parsed = cli.parse(cls, options, prog, description=f"{prog} [options] -- COMMAND. {cls.__doc__}")
    submit(make_job(parsed, command), parsed)


def _plan(argv: Sequence[str]) -> None:
    from launch.chips import prepare_environment
    from launch.families import PRESETS, PlanOptions, command_of, defaults
    from launch.search import plan

    words, rest = cli.take_words([command_of(name) for name in PRESETS], argv)
    if len(words) != 1 or words[0] not in PRESETS:
        what = f"unknown preset {words[0]!r}{cli.suggest(words[0], PRESETS)}" if len(words) == 1 else "give one preset"
        if not (not words and {"-h", "--help"} & set(argv)):
            raise UserError(f"{what}; there are {', '.join(PRESETS)}")
    name = words[0] if words else next(iter(PRESETS))
    prog = f"{PROG} plan"
    doc = f"{prog} PRESET --topology v5e:16x16 [options]. {PlanOptions.__doc__} Defaults are those of {name}."
    command = cli.parse(command_of(name), rest, f"{prog} {name}", defaults(name), doc)
    given = cli.options_given(command_of(name), rest)
    if {"--batch", "--train.batch-size"} <= given:
        raise UserError("--batch is short for --train.batch-size; give one of them")
    prepare_environment(command.topology)
    plan(name, command, given)


if __name__ == "__main__":
    main()
