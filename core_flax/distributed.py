"""One run of several processes: how they find each other, what only the first does, how the loss of one is told.

All of it is jax.distributed: its coordination service, run by the first process, knows who is there and who has gone.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed as _jax_distributed  # the coordination service has no public name; Orbax does the same

from core_flax.lock import only_writer
from core_flax.signals import EXIT_PEER_LOST, Stopped
from core_flax.types import UserError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment that a launcher gives: where the first process listens, how many there are, which one this is."""
WAIT = "FLAX_JOIN_SECONDS"
"""Environment: how long to wait for the others to start; by default DEFAULT_WAIT_SECONDS."""
DEFAULT_WAIT_SECONDS = 300
HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is lost, and the others end."""
LEAVE_SECONDS = 30
"""How long a process that is done waits for the others to be done as well."""
REFUSED_SECONDS = 3600
"""How long a process that is refused before training begins waits for the others to hear of it."""
SEEN_SECONDS = 90
"""How long what one host has written may take to be seen by another: NFS keeps for a minute what it knows of names."""


def join() -> None:
    """Makes this process one of its job's, if it is in one; from then on only the first prints to standard output.

    The job is told by a launcher's environment (``ADDRESS``, ``COUNT``, ``NUMBER``), or it is what JAX recognises: a
    Slurm step, Open MPI, a Cloud TPU slice of one or several hosts, GKE. Call it before anything asks for devices.

    Raises:
      UserError: the environment is incomplete, or not all processes came together in time.
    """
    if jax.distributed.is_initialized():
        return
    wait = _number(os.environ, WAIT, DEFAULT_WAIT_SECONDS)
    arguments = _from_launcher(os.environ) or _from_scheduler(os.environ)
    if arguments is None:
        return
    deadline = time.monotonic() + wait
    if arguments.get("process_id"):
        _reach(arguments["coordinator_address"], deadline, wait)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would swallow SIGTERM, also where nobody asks it whether one has come: before training begins.
    jax.config.update("jax_enable_preemption_service", False)
    with _giving_up_at(deadline, wait):
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=wait + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=LEAVE_SECONDS,
            )
        except ValueError as error:
            if "should be defined" in str(error) or "must be defined" in str(error):
                return  # a TPU of one host, outside of Google's cloud
            raise
    if jax.default_backend() == "gpu":
        # XLA's autotuning is shared among the processes that compile. Entries are written by the first one alone: it
        # would find the program, and the others would wait for its share.
        jax.config.update("jax_enable_compilation_cache", False)
    _keep_output_to_the_first()


@contextlib.contextmanager
def _giving_up_at(deadline: float, wait: int) -> Iterator[None]:
    """Ends the process with one line if what is inside takes longer: JAX would abort it with its own stack."""

    def give_up() -> None:
        print(
            f"{Path(sys.argv[0]).name}: error: not all processes of this job came together within {wait} s; see that "
            f"each of them runs, with the same coordinator and number of processes ({WAIT} sets the time)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _keep_output_to_the_first() -> None:
    """From here on only the first process's Python writes to standard output.

    Libraries' C++ goes nowhere: gloo greets there.
    """
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    if not leads():
        os.dup2(nowhere, own)
    os.close(nowhere)
    sys.stdout = os.fdopen(own, "w", buffering=1, encoding="utf-8")


def _from_launcher(env: Mapping[str, str]) -> dict | None:
    given = [name for name in (ADDRESS, COUNT, NUMBER) if env.get(name)]
    if COUNT not in given and NUMBER not in given:
        return None  # the address alone is JAX's own setting, beside a scheduler's
    missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
    if missing:
        raise UserError(f"{', '.join(given)} set, but not {', '.join(missing)}; set all three or none")
    count, number = _number(env, COUNT), _number(env, NUMBER)
    host, _, port = env[ADDRESS].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS}={env[ADDRESS]}: must be HOST:PORT")
    if number >= count:
        raise UserError(f"{NUMBER}={number}: must be less than {COUNT}={count}")
    if count == 1:
        return None
    return {"coordinator_address": env[ADDRESS], "num_processes": count, "process_id": number}


def _from_scheduler(env: Mapping[str, str]) -> dict | None:
    """What to tell JAX in a scheduler's job; None where there is none, or its only process is this one."""
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        if env.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1" and env.get("SLURM_GPUS_ON_NODE"):
            # JAX gives a Slurm task one GPU, though a node's only task is to have all of them.
            return {"local_device_ids": list(range(int(env["SLURM_GPUS_ON_NODE"])))}
        return {}
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {}
    has_tpu = importlib.util.find_spec("libtpu") and (any(Path("/dev").glob("accel*")) or Path("/dev/vfio").is_dir())
    return {} if has_tpu and env.get("JAX_PLATFORMS", "tpu").startswith("tpu") else None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a whole number, 0 or more")
    return int(text)


def _reach(address: str, deadline: float, wait: int) -> None:
    """Waits until the coordinator listens. JAX would wait as well, but not say what is wrong."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the coordinator at {address} cannot be reached within {wait} s ({error.strerror or error}); see "
                    f"that process 0 runs there, that {ADDRESS} is right and that the port is open"
                ) from error
        time.sleep(0.2)


def leads() -> bool:
    """Whether this is the first process: the one that prints and writes."""
    return jax.process_index() == 0


class PeerLost(Stopped):
    """Another process of the run has gone, and nobody said which."""

    status = EXIT_PEER_LOST


_NETWORK = re.compile("gloo|nccl|connection|peer|unavailable|heartbeat|socket|aborted|deadline_exceeded", re.IGNORECASE)


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """When a collective fails because a process has gone, lets the coordination service say which.

    It knows when the heartbeats have stayed away for HEARTBEAT_SECONDS, and then ends this process, naming the other.

    Raises:
      PeerLost: it did not.
    """
    global _training
    _training = True
    try:
        yield
        _training = False
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jaxlib makes a ValueError of some statuses
        said = " ".join(str(error).split())[:200]
        if jax.process_count() == 1 or not _NETWORK.search(said):
            raise
        number = jax.process_index()
        print(f"process {number}: lost contact with another ({said}); waiting to hear with which", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(HEARTBEAT_SECONDS + 20)
        raise PeerLost(f"process {number} lost contact with another; run the same command to resume") from error


_calls = itertools.count()
_training = False  # whether this process has come so far
_REFUSED = "core_flax/refused"
_LISTEN_MILLISECONDS = 1000


def first_does(action: Callable[[], None]) -> None:
    """The first process does it; all go on when it is done. Every process must come here, in the same order.

    Raises:
      UserError: the first one's, in all of them.
    """

    def done() -> str:
        action()
        return ""

    first_tells(done)


def first_tells(find: Callable[[], str]) -> str:
    """What the first process finds, in all of them. Every process must come here, in the same order.

    Raises:
      UserError: the first one's, in all of them.
    """
    if jax.process_count() == 1:
        return find()
    key = f"core_flax/first/{next(_calls)}"
    if not leads():
        found = _hear(key)
        if found.startswith("!"):
            raise UserError(found[1:])
        return found[1:]
    try:
        found = find()
    except UserError as error:
        _client().key_value_set(key, f"!{error}")
        raise
    _client().key_value_set(key, f"={found}")
    return found


def agree(said: str) -> list[str]:
    """What every process says here, by its number. Every process must come here, in the same order.

    Raises:
      UserError: that of a process which cannot come here.
    """
    if jax.process_count() == 1:
        return [said]
    key = f"core_flax/said/{next(_calls)}"
    _client().key_value_set(f"{key}/{jax.process_index()}", f"={said}")
    return [_hear(f"{key}/{number}")[1:] for number in range(jax.process_count())]


def all_have(what: Mapping[str, str]) -> None:
    """Every process must come here, in the same order.

    Args:
      what: names of what must be the same for all, and fingerprints of it.

    Raises:
      UserError: in all of them, unless each has the same as the first.
    """
    told = [json.loads(said) for said in agree(json.dumps(what))]
    for number, theirs in enumerate(told):
        for name in what:
            if theirs[name] != told[0][name]:
                raise UserError(f"process {number} does not have the {name} of the first; give all of them the same")


def is_seen(condition: Callable[[], bool]) -> bool:
    """Whether it is true, or comes true while what another host has written may take to be seen here."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (seen := condition()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return seen


def tell_refusal(why: str) -> None:
    """Lets the others know that this process ends with a mistake of the user's, and which; waits until they do.

    Before training begins they may be long at something else before they listen; and if they do not, JAX aborts them.
    """
    if not jax.distributed.is_initialized():
        return
    deadline = time.monotonic() + (LEAVE_SECONDS if _training else REFUSED_SECONDS)
    with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError, KeyboardInterrupt):  # the first may have gone
        _client().key_value_set(f"{_REFUSED}/{jax.process_index()}", why, allow_overwrite=True)
        while len(_refusals()) < jax.process_count() and time.monotonic() < deadline:
            time.sleep(0.5)


def _client() -> Any:
    client = _jax_distributed.global_state.client
    assert client is not None
    return client


def _hear(key: str) -> str:
    """What is said under a key, however long it takes: that a process has gone, its heartbeats would tell.

    Raises:
      UserError: that of a process that has been refused in the meantime.
    """
    while True:
        try:
            return _client().blocking_key_value_get(key, _LISTEN_MILLISECONDS)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for why in _refusals():
            raise UserError(why)


def _refusals() -> list[str]:
    return [why for _, why in _client().key_value_dir_get(f"{_REFUSED}/")]


@contextlib.contextmanager
def only_run(path: Path, refusal: str) -> Iterator[None]:
    """``lock.only_writer`` for all processes of a run: the first holds the lock, and all are refused alike."""
    with contextlib.ExitStack() as stack:
        first_does(lambda: stack.enter_context(only_writer(path, refusal)))
        yield
