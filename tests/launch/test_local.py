"""``flax-launch local``: two processes of two devices each, joined over gloo, are one run."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Process

from core_flax.checkpoint import list_steps
from core_flax.lock import only_writer

LONG = {"train__num_steps": 100_000, "checkpoint__every_steps": 0, "mesh__fsdp": 2}
SECONDS = 100


def launch(*argv, processes=2, devices=2):
    """The launcher as a user runs it, on as few optimizations as compile fastest."""
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    options = ["local", f"--processes={processes}", f"--devices={devices}", "--"]
    command = [sys.executable, "-m", "launch.cli", *options, *map(str, argv)]
    return Process(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def training(bert_flax, workdir, **changes):
    return [sys.executable, "-m", "bert_flax.cli", *bert_flax.pretrain(workdir, **changes)]


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate()[1])


def members(launcher):
    """Process numbers of the job's processes, by their number in it."""
    found = {}
    for task in Path(f"/proc/{launcher.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            env = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found[int(next(each for each in env if each.startswith(b"JAX_PROCESS_ID=")).partition(b"=")[2])] = int(
                child
            )
    return found


@pytest.fixture(scope="module")
def killed(bert_flax, tmp_path_factory):
    """A run of two processes, one of which was killed outright after six steps; what the launcher said."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    with launch(*training(bert_flax, workdir, **LONG | {"checkpoint__every_steps": 2})) as launcher:
        wait_for(launcher, "step 6/")
        family = members(launcher)
        os.kill(family[1], signal.SIGKILL)
        began = time.monotonic()
        out, err = launcher.communicate(timeout=SECONDS)
    return workdir, launcher.returncode, out, err, time.monotonic() - began, family


def test_one_that_is_killed_ends_the_others_and_is_named(killed):
    _, status, _, err, seconds, family = killed
    assert status == 128 + signal.SIGKILL
    assert "flax-launch: process 1 of 2 was killed by SIGKILL; ending the others" in err.splitlines()
    assert seconds < 60
    assert not any(os.path.exists(f"/proc/{pid}") for pid in family.values())


def test_a_run_that_lost_a_process_goes_on_with_one(killed, bert_flax, tmp_path):
    """On other devices, from the newest checkpoint, as the run that never stopped."""
    workdir, whole = killed[0], tmp_path / "whole"
    saved, last = list_steps(workdir / "checkpoints")[-1], max(losses(workdir)) + 4
    again, never = (bert_flax.run(*bert_flax.pretrain(each, train__num_steps=last)) for each in (workdir, whole))
    assert (again.returncode, again.stderr) == (never.returncode, never.stderr) == (0, "")
    assert f"resumes at step {saved}: " in again.stdout and saved <= last - 4
    assert sorted(losses(workdir)) == list(range(1, last + 1))
    assert losses(workdir) == pytest.approx(losses(whole), abs=1e-5)


def test_without_a_launcher_the_others_end_and_name_the_one_that_was_killed(bert_flax, tmp_path):
    """As on a cluster: nobody but the processes themselves watches over them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"}
    command, pipes = training(bert_flax, tmp_path, **LONG), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    envs = [os.environ | job | flags | {"JAX_PROCESS_ID": str(number)} for number in range(2)]
    with Process(command, env=envs[0], text=True, **pipes) as first, Process(command, env=envs[1]) as second:
        wait_for(first, "step 3/")
        second.send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, err = first.communicate(timeout=SECONDS)
    assert time.monotonic() - began < 60
    assert first.returncode == -signal.SIGABRT
    assert re.search(r"The following tasks are unhealthy \(stopped sending heartbeats\):\n1\n", err), err


ALONE_FOR_LONG = """
from core_flax import distributed
from seq2seq_flax import numbers
from seq2seq_flax.cli import main
distributed.LEAVE_SECONDS = 1
numbers._NUM_TRAINED, numbers._NUM_HELD_OUT = 60, 8
main()
"""


def test_the_others_wait_while_the_first_translates_what_was_held_out(tmp_path):
    """Which takes longer than a process that has gone is waited for."""
    model = {"num-layers": 1, "width": 32, "num-heads": 2, "mlp-width": 64}
    options = {f"model.{name}": value for name, value in model.items()}
    options |= {"train.num-steps": 2, "train.eval-every-steps": 0, "schedule.warmup-steps": 1}
    flags = [f"--{name}={value}" for name, value in options.items()]
    with launch(sys.executable, "-c", ALONE_FOR_LONG, "train", "--workdir", tmp_path / "run", *flags) as launcher:
        out, err = launcher.communicate(timeout=SECONDS)
    assert (launcher.returncode, err) == (0, "")
    assert "[0] exact match, beam 4: 0.0% of 8 numbers" in out and "[1]" not in out


def test_a_signal_to_one_makes_all_save_the_same_step(bert_flax, tmp_path):
    with launch(*training(bert_flax, tmp_path, **LONG)) as launcher:
        wait_for(launcher, "step 3/")
        os.kill(members(launcher)[1], signal.SIGTERM)
        out, err = launcher.communicate(timeout=SECONDS)
    (step,) = list_steps(tmp_path / "checkpoints")
    assert launcher.returncode == 75
    saved = f"bert-flax: SIGTERM: step {step} is saved; run the same command to resume"
    assert sorted(err.splitlines()) == [f"[{number}] {saved}" for number in range(2)]
    assert all(line.startswith("[0] step") for line in out.splitlines())  # only the first process prints
    assert sorted(losses(tmp_path)) == list(range(1, step + 1))  # and writes


def test_a_folder_that_another_run_writes_to_is_refused_by_all(bert_flax, tmp_path):
    with only_writer(tmp_path / "run.lock", ""), launch(*training(bert_flax, tmp_path, **LONG)) as launcher:
        out, err = launcher.communicate(timeout=SECONDS)
    refusal = f"bert-flax: error: another run is writing to {tmp_path}; stop it or give another --workdir"
    assert (launcher.returncode, out) == (2, "")
    lines = err.splitlines()
    assert {f"[0] {refusal}", f"[1] {refusal}"} >= {line for line in lines if line.startswith("[")} != set()
    assert len(lines) <= 3 and all(line.startswith("[") or "failed with exit status 2" in line for line in lines)


ONE_DIFFERS = """
import os, sys
from bert_flax.cli import main
from core_flax import distributed
distributed.SEEN_SECONDS = 2
first, other = sys.argv.pop(1).split("=>")
if os.environ["JAX_PROCESS_ID"] == "1":
    sys.argv = [argument.replace(first, other) for argument in sys.argv]
main()
"""


def one_differs(bert_flax, workdir, first, other):
    """Trains with two processes, in the second one's command line ``other`` in the place of ``first``."""
    command = [sys.executable, "-c", ONE_DIFFERS, f"{first}=>{other}", *bert_flax.pretrain(workdir, seed=0, **LONG)]
    with launch(*command, devices=1) as launcher:
        out, err = launcher.communicate(timeout=SECONDS)
    return launcher.returncode, out, err


def test_what_one_process_lacks_none_begins_without(bert_flax, tmp_path):
    status, out, err = one_differs(bert_flax, tmp_path / "run", bert_flax.data, tmp_path / "gone")
    assert (status, out) == (2, "") and err.count(str(tmp_path / "gone")) >= 2, err  # both say so
    assert not list(tmp_path.glob("run/*.json")) and not list(tmp_path.glob("run/*.txt"))


def test_a_process_with_other_data_is_found_out(bert_flax, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bert_flax.data, other)
    manifest = json.loads((other / "manifest.json").read_text())
    name = next(name for name in manifest["files"] if name.startswith("valid.index"))
    manifest["files"][name]["sha256"] = "0" * 64  # as of another text
    (other / "manifest.json").write_text(json.dumps(manifest))
    status, out, err = one_differs(bert_flax, tmp_path / "run", bert_flax.data, other)
    assert (status, out) == (2, "") and err.count("process 1 does not have the data of the first") == 2, err
    assert not list(tmp_path.glob("run/*.json"))


def test_a_process_that_was_not_given_the_data_is_found_out(bert_flax, tmp_path):
    status, out, err = one_differs(bert_flax, tmp_path / "run", f"--data={bert_flax.data}", "--seed=0")
    assert (status, out) == (2, "") and err.count("process 1 does not have the option --data of the first") == 2, err


def test_a_process_with_other_settings_is_found_out(bert_flax, tmp_path):
    status, out, err = one_differs(bert_flax, tmp_path / "run", "--seed=0", "--seed=1")
    assert (status, out) == (2, "") and err.count("process 1 does not have the settings of the first") == 2, err
    assert not list(tmp_path.glob("run/*.json"))


def test_a_workdir_that_is_not_shared_is_found_out(bert_flax, tmp_path):
    status, out, err = one_differs(bert_flax, tmp_path / "run", tmp_path / "run", tmp_path / "mine")
    assert (status, out) == (2, "") and "is not the same folder for all processes: process 1 does not find" in err, err


SLOW = """
import os, time
from bert_flax import runs
from bert_flax.cli import main
from core_flax import distributed
distributed.LEAVE_SECONDS = 2
def slow(*_):
    if os.environ["JAX_PROCESS_ID"] == "1":
        raise distributed.UserError("this host has no such file")
    time.sleep(8)
runs.check_model = slow
main()
"""


def test_a_refusal_waits_until_the_others_listen(bert_flax, tmp_path):
    """Longer than one waits at the end of a run."""
    with launch(sys.executable, "-c", SLOW, *bert_flax.pretrain(tmp_path / "run"), devices=1) as launcher:
        out, err = launcher.communicate(timeout=SECONDS)
    assert (launcher.returncode, out) == (2, "") and err.count("error: this host has no such file") == 2, err
    assert not list(tmp_path.glob("run/*.json"))


BEHIND = """
import os, sys
from core_flax import distributed, snapshot
from bert_flax.cli import main
distributed.SEEN_SECONDS, fault = 1, sys.argv.pop(1)
if os.environ["JAX_PROCESS_ID"] == "1":  # as a shared folder may be for a while, or one that errs
    from core_flax import checkpoint
    whole, check = checkpoint.list_steps, snapshot._check_bits
    def failing(manifest, arrays):
        if manifest["step"] == 6:
            raise snapshot.DamagedError("w does not have the bits that were saved")
        check(manifest, arrays)
    read = snapshot.read_manifest
    def stale(folder):
        if folder.name == "6":
            raise snapshot.DamagedError("stale file handle")
        return read(folder)
    if fault == "unseen":
        checkpoint.list_steps = lambda directory: whole(directory)[:-1]
    elif fault == "unreadable":
        snapshot.read_manifest = stale
    else:
        snapshot._check_bits = failing
main()
"""


def resume_with_one_behind(bert_flax, run, fault):
    with launch(sys.executable, "-c", BEHIND, fault, *bert_flax.pretrain(run), devices=1) as launcher:
        out, err = launcher.communicate(timeout=SECONDS)
    return launcher.returncode, out, err


def test_all_processes_go_on_from_the_same_step(bert_flax, finished_run, tmp_path):
    """Though one alone finds that the newest is damaged."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    status, out, err = resume_with_one_behind(bert_flax, run, "damaged")
    assert status == 0, err
    assert "[0] resumes at step 4" in out and "checkpoint of step 6 is damaged (process 1: w does not have" in err
    assert losses(run) == pytest.approx(losses(finished_run), abs=1e-5)


def test_a_checkpoint_that_one_process_cannot_read_stays(bert_flax, finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    status, out, err = resume_with_one_behind(bert_flax, run, "unreadable")
    assert status == 0, err
    said = "checkpoint of step 6 cannot be read by all (process 1: stale file handle): going back to step 4"
    assert "[0] resumes at step 4" in out and said in err
    assert not list(run.glob("checkpoints/*.corrupt")) and 6 in list_steps(run / "checkpoints")


def test_a_checkpoint_that_one_process_does_not_see_is_no_damaged_one(bert_flax, finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    status, _, err = resume_with_one_behind(bert_flax, run, "unseen")
    assert status == 2 and err.count("process 1 does not see in") == 2, err
    assert list_steps(run / "checkpoints") == list_steps(finished_run / "checkpoints")


def test_a_signal_to_the_launcher_is_passed_on_and_a_mistake_is_told():
    sleeping = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(100)"]
    with launch(*sleeping) as launcher:
        wait_for(launcher, "ready")
        wait_for(launcher, "ready")
        launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "was killed by SIGTERM" in err


def test_the_status_is_that_of_the_first_failure():
    program = "import os, sys, time; n = int(os.environ['JAX_PROCESS_ID']); time.sleep(3 * (1 - n)); sys.exit(3 + n)"
    with launch(sys.executable, "-c", program) as launcher:
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 4
    assert "process 1 of 2 failed with exit status 4; ending the others" in err


@pytest.mark.parametrize(
    ("env", "wrong"),
    [
        ({"JAX_PROCESS_ID": "1"}, "the coordinator at localhost:1 cannot be reached within 1 s (Connection refused)"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: must be less than JAX_NUM_PROCESSES=2"),
        ({"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID=x: must be a whole number"),
        ({}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES set, but not JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS=here: must be HOST:PORT"),
    ],
)
def test_a_job_that_cannot_be_joined_is_refused_in_one_line(monkeypatch, call, bert_flax, tmp_path, env, wrong):
    job = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "FLAX_JOIN_SECONDS": "1"}
    for name, value in (job | env).items():
        monkeypatch.setenv(name, value)
    done = call(*bert_flax.pretrain(tmp_path / "run"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and wrong in done.stderr
    assert not (tmp_path / "run").exists()
