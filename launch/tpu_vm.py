"""``flax-launch tpu-vm``: a script that waits for a TPU slice in the queue and runs a command on all its workers."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from core_flax.config import check_range
from core_flax.types import UserError
from launch.jobs import JOIN_WAIT, Job, JobOptions

_ACCELERATOR = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}
"""TPU version -> (accelerator type, what its number counts for each chip: chips or cores)."""
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""TPU version -> software of its VMs. cloud.google.com/tpu/docs/runtimes."""
SAVING_SECONDS = 120
"""How long processes that a lost connection has left may take to save before a new one is started."""


@dataclass(frozen=True, kw_only=True)
class TpuVmCommand(JobOptions):
    """Runs a training command on all workers of a Cloud TPU slice, which is waited for in the queue and given back.

    The script that is written runs here as long as the job does. A slice that is preempted is asked for again, and the
    run goes on from its newest checkpoint: the workdir has to lie in storage that outlives the slice.
    """

    topology: str
    """Slice, as in v5e:16x16."""
    zone: str
    """Zone of Google Cloud."""
    project: str | None = None
    """Project; None: gcloud's default."""
    runtime_version: str | None = None
    """Software of the VMs; None: the one for this version of TPU."""
    spot: bool = False
    """Take a spot slice, which may be taken away at any time."""
    setup: str = ""
    """Line of shell that installs what is needed on each worker, as in "pip install ..."; run before each start."""
    max_restarts: int = 100
    """How often to start again."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        super().__post_init__()
        check_range("", self, "max_restarts", least=0)


def make_job(options: TpuVmCommand, argv: Sequence[str]) -> Job:
    """The script, and the command that runs it."""
    file = f"{options.name}.tpu.sh"
    return Job(file, "\n".join([*_head(options, argv), *_LOOP, ""]), ("bash",))


def accelerator_type(topology: str) -> str:
    """ "v5litepod-256" for "v5e:16x16". Raises UserError if it is no TPU slice."""
    from launch.chips import parse_topology

    kind, shape = parse_topology(topology)
    if kind not in _ACCELERATOR:
        raise UserError(f"--topology {topology}: flax-launch tpu-vm runs on TPU slices, as v5e:16x16")
    name, each = _ACCELERATOR[kind]
    return f"{name}-{each * math.prod(shape)}"


def _head(options: TpuVmCommand, argv: Sequence[str]) -> list[str]:
    kind = options.topology.partition(":")[0]
    place = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    create = [
        f"--node-id={options.name}",
        f"--accelerator-type={accelerator_type(options.topology)}",
        f"--runtime-version={options.runtime_version or RUNTIMES[kind]}",
        *(["--spot"] if options.spot else []),
    ]
    pid = f"~/.{options.name}.pid"  # of the process itself, so that it can be told to save
    wait = "export " + " ".join(f"{name}=${{{name}:-{value}}}" for name, value in JOIN_WAIT.items())
    remote = " && ".join([f"echo $$ > {pid}", *filter(None, [options.setup]), wait, f"exec {shlex.join(argv)}"])
    return [
        "#!/bin/bash",
        f"name={shlex.quote(options.name)}",
        f"place=({shlex.join(place)})",
        f"create=({shlex.join(create)})",
        f"command={shlex.quote(f'{_end(pid)}; {remote}')}",
        f"restarts={options.max_restarts}",
    ]


def _end(pid: str) -> str:
    """Shell that lets a process of before, which a lost connection has left, save and end."""
    gone = "kill -0 $old 2>/dev/null || break; sleep 1"
    wait = f"for i in $(seq {SAVING_SECONDS}); do {gone}; done; kill -KILL $old 2>/dev/null"
    return f"old=$(cat {pid} 2>/dev/null) && kill -TERM $old 2>/dev/null && {{ {wait}; }}"


_LOOP = r"""
stopped= running= status=1 errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
queue() { gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }
# What has become of the slice: NONE if there is none, UNKNOWN if that cannot be told.
state() {
  queue describe --format='value(state.state)' 2>"$errors" && return
  if grep -q NOT_FOUND "$errors"; then echo NONE; else cat "$errors" >&2; echo UNKNOWN; fi
}
ask() { queue create "${create[@]}" || { [ -z "$stopped" ] || give_back; exit 1; }; }
give_back() { queue delete --force --quiet; }
tell() { gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"; }
# Told to stop: so are the processes, which save; then the slice is given back.
trap 'stopped=1; [ -z "$running" ] || tell "kill -TERM \$(cat ~/.$name.pid)"' TERM INT

for ((attempt = 0; attempt <= restarts; attempt++)); do
  case "$(state)" in
    NONE) ask ;;
    SUSPENDING|SUSPENDED|FAILED) give_back && ask || exit 1 ;;
    UNKNOWN) [ "$attempt$stopped" != 0 ] || exit 1 ;;
  esac
  while now=$(state); [ -n "$stopped" ] || [ "$now" != ACTIVE ]; do
    [ -z "$stopped" ] || { give_back; exit 75; }
    case $now in NONE|FAILED|SUSPENDED) continue 2 ;; esac
    sleep 30 & wait $!
  done
  running=1
  set -m  # in a group of its own, which Ctrl-C does not reach: it is to end by itself
  tell "$command" </dev/null &
  set +m
  wait $!
  status=$?
  [ -z "$stopped" ] || { wait; give_back; exit 75; }
  running=
  case $status in
    0|1|2|70) give_back; exit $status ;;  # done, or a mistake that would be made again
  esac
  echo "$name: ended with status $status; starting again" >&2
done
give_back
exit "$status"
""".strip("\n").splitlines()
