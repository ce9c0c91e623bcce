"""A Slurm of one node with two processors, on this machine: Debian's slurmctld, slurmd and munged (package slurm-wlm).

``python tests/launch/slurm_cluster.py COMMAND ...`` runs a command with the cluster as its Slurm, and ends both.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

NODE, CPUS = "localhost", 2
"""The node's name, by which processes of a job find each other. A machine runs one of Debian's slurmd."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
START_SECONDS = 30


def missing() -> list[str]:
    """Programs that are not installed here."""
    return [name for name in PROGRAMS if not _program(name)]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _configuration(folder: Path, ports: Sequence[int]) -> str:
    """slurm.conf: nothing that needs cgroups, a database, or to be root."""
    settings = {
        "ClusterName": "here",
        "SlurmctldHost": f"{socket.gethostname().partition('.')[0]}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "SlurmdPort": ports[1],
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A job that is requeued waits until credentials of its last run have expired: two minutes by default.
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SlurmdParameters": "config_overrides",
        "MpiDefault": "none",
        "ReturnToService": 2,
    }
    node = f"NodeName={NODE} NodeAddr=127.0.0.1 CPUs={CPUS} State=UNKNOWN"
    partition = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    return "\n".join([*(f"{name}={value}" for name, value in settings.items()), node, partition, ""])


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in held]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The cluster, in this context; its files and logs lie in ``folder``.

    Yields:
      The environment for commands that are to talk to it.

    Raises:
      RuntimeError: it did not start; the text has its logs.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(_configuration(folder, _free_ports(2)), encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log"}
    files |= {"pid-file": "munged.pid", "seed-file": "munged.seed"}
    # Folders above may be writable by all, as /tmp is: then munged wants to be told that this is meant.
    munge = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    daemons = {"munged": munge, "slurmctld": ["slurmctld", "-D"], "slurmd": ["slurmd", "-D", "-N", NODE]}
    with contextlib.ExitStack() as stack:
        for name, command in daemons.items():
            stack.enter_context(_daemon(command, folder / f"{name}.txt", env))
            _wait(folder, lambda: (folder / "munge.socket").exists())
        _wait(folder, lambda: _state(env) == "idle")
        yield env
        subprocess.run(["scancel", "--user", getpass.getuser()], env=env, check=False)


@contextlib.contextmanager
def _daemon(command: Sequence[str], output: Path, env: dict[str, str]) -> Iterator[None]:
    program = _program(command[0])
    assert program, f"{command[0]} is not installed"
    with output.open("w") as log:
        process = subprocess.Popen([program, *command[1:]], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _state(env: dict[str, str]) -> str:
    said = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=env, capture_output=True, text=True, check=False)
    return said.stdout.strip()


def _wait(folder: Path, is_so) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.[tl][xo][tg]"))]
            raise RuntimeError("the cluster does not start\n" + "\n".join(logs))
        time.sleep(0.1)


def main(argv: Sequence[str]) -> int:
    """Runs a command with the cluster. Returns its exit status."""
    if missing():
        print(f"{', '.join(missing())} not installed: apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, cluster(Path(folder) / "slurm") as env:
        return subprocess.run(argv, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
