"""``flax-launch slurm``: a batch script that runs a training command on several nodes, and goes on when requeued."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core_flax.config import check_range
from core_flax.signals import EXIT_INTERRUPTED, EXIT_PEER_LOST
from core_flax.types import UserError
from launch.jobs import Job, JobOptions


@dataclass(frozen=True, kw_only=True)
class SlurmCommand(JobOptions):
    """Runs a training command on nodes of a Slurm cluster, one process a node unless told otherwise.

    A job that is preempted, reaches its time limit or loses a node is requeued and goes on from its newest checkpoint:
    the workdir has to lie on a file system that all nodes share.
    """

    nodes: int = 1
    """Nodes."""
    tasks_per_node: int = 1
    """Processes of a node; with one, it has all of the node's GPUs, with more, each has one."""
    gpus_per_node: int = 0
    """GPUs of a node; 0: none are asked for."""
    cpus_per_task: int | None = None
    """CPU cores of a process; None: as the cluster has it."""
    partition: str | None = None
    """Partition; None: the cluster's default."""
    account: str | None = None
    """Account; None: your default."""
    time: str = "24:00:00"
    """Time limit, as sbatch has it; the job saves before it and is requeued."""
    save_seconds: int = 120
    """How long before the time limit, or before it is preempted, the job is told to save."""
    max_restarts: int = 10
    """How often the job is requeued after a process was killed or lost; preemption and the time limit do not count."""
    setup: str = ""
    """Line of shell, as in "source venv/bin/activate": it is run on the first node, and all processes have the
    environment that it leaves."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        super().__post_init__()
        check_range("", self, "nodes", "tasks_per_node", "cpus_per_task", "save_seconds", least=1)
        check_range("", self, "gpus_per_node", "max_restarts", least=0)
        if self.tasks_per_node > 1 and self.gpus_per_node not in (0, self.tasks_per_node):
            raise UserError(
                f"--gpus-per-node {self.gpus_per_node} for --tasks-per-node {self.tasks_per_node}: of several "
                f"processes each has one GPU, and one alone has all; give --tasks-per-node {self.gpus_per_node} or 1"
            )


def make_job(options: SlurmCommand, argv: Sequence[str]) -> Job:
    """The batch script, and the command that submits it."""
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_task,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "signal": f"TERM@{options.save_seconds}",
        "output": shlex.quote(str(Path(options.output) / f"{options.name}-%j.log")),
        "open-mode": "append",
    }
    head = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
    file = f"{options.name}.sbatch"
    content = "\n".join(["#!/bin/bash", *head, "#SBATCH --requeue", *_body(options, argv), ""])
    return Job(file, content, ("sbatch",))


def _body(options: SlurmCommand, argv: Sequence[str]) -> list[str]:
    # Said again: steps do not take it over from the job.
    cpus = [] if options.cpus_per_task is None else [f"--cpus-per-task={options.cpus_per_task}"]
    lost = shlex.quote(str(Path(options.output) / options.name))
    return [
        "",
        *([options.setup, ""] if options.setup else []),
        "# Signals go to the steps; this shell waits for them. Processes find each other by Slurm's own variables.",
        'trap "" TERM',
        "# A process that fails leaves the others a minute to save or to say why.",
        shlex.join(["srun", "--wait=60", *cpus, *argv]),
        "status=$?",
        "case $status in",
        f"  {EXIT_INTERRUPTED}) ;;  # told to stop, and saved",
        f"  {EXIT_PEER_LOST}|129|13[0-9]|14[0-3])  # killed, or it lost another process: that is counted",
        f'    echo $status >> {lost}-"$SLURM_JOB_ID".lost',
        f'    [ "$(wc -l < {lost}-"$SLURM_JOB_ID".lost)" -le {options.max_restarts} ] || exit $status ;;',
        "  *) exit $status ;;  # done, or a mistake that would be made again",
        "esac",
        'exec scontrol requeue "$SLURM_JOB_ID"',
    ]
