"""What is written for Slurm, GKE and TPU VMs: as the golden files have it, and as each of them reads it.

``FLAX_WRITE_GOLDEN=1 pytest tests/launch/test_jobs.py`` writes the golden files anew.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Process

from launch import gke, slurm, tpu_vm
from launch.cli import main

GOLDEN = Path(__file__).parent / "golden"
COMMAND = ["bert-flax", "pretrain", "bert_large", "--workdir", "/shared/runs/a b", "--mesh.fsdp", "4"]
JOBS = {
    "slurm": slurm.make_job(slurm.SlurmCommand(name="bert", nodes=2, gpus_per_node=8, setup="source env"), COMMAND),
    "gke": gke.make_job(
        gke.GkeCommand(name="bert", topology="v5e:4x8", image="registry.example/bert:1", slices=2, spot=True), COMMAND
    ),
    "tpu-vm": tpu_vm.make_job(
        tpu_vm.TpuVmCommand(name="bert", topology="v5p:4x4x8", zone="us-east5-a", project="p", spot=True), COMMAND
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_files_are_as_committed(name):
    job = JOBS[name]
    written = f"{job.content}# {' '.join(job.command)} {job.file}\n"
    golden = GOLDEN / f"{job.file}.txt"
    if os.environ.get("FLAX_WRITE_GOLDEN"):
        golden.write_text(written, encoding="utf-8")
    assert written == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["slurm", "tpu-vm"])
def test_scripts_are_bash(name):
    checked = subprocess.run(["bash", "-n"], input=JOBS[name].content, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


PYTHON = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def check(value, schema, where="JobSet"):
    """That a value is what an OpenAPI schema says: no field that it does not have, all that it requires."""
    if not schema.get("x-kubernetes-int-or-string"):
        assert type(value) is PYTHON[schema["type"]], where
    assert value in schema.get("enum", [value]), where
    if isinstance(value, list):
        for number, each in enumerate(value):
            check(each, schema["items"], f"{where}[{number}]")
    if isinstance(value, dict) and schema.keys() > {"type"}:
        assert set(schema.get("required", ())) <= set(value), where
        for name, each in value.items():
            inner = schema["properties"][name] if "properties" in schema else schema["additionalProperties"]
            check(each, inner, f"{where}.{name}")


@pytest.mark.parametrize("more", [{}, {"spot": True, "service_account": "trainer", "slices": 4}])
def test_jobset_is_of_its_schema(more):
    """Of the custom resource definition: kubernetes-sigs/jobset, of its fields those that are written."""
    schema = json.loads((GOLDEN / "jobset_schema.json").read_text())["openAPIV3Schema"]
    options = gke.GkeCommand(name="bert", topology="v5e:16x16", image="registry.example/bert:1", **more)
    manifest = json.loads(gke.make_job(options, COMMAND).content)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    check(manifest, schema)
    manifest["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(KeyError, match="maxRestart"):
        check(manifest, schema)


def test_gcloud_is_asked_what_it_documents():
    """cloud.google.com/sdk/gcloud/reference/compute/tpus: flags that are required, and all that are written."""
    (line,) = (line for line in JOBS["tpu-vm"].content.splitlines() if line.startswith("create=("))
    flags = {word.partition("=")[0] for word in line.removeprefix("create=(").rstrip(")").split()}
    required = {"--node-id", "--accelerator-type", "--runtime-version"}
    assert required <= flags <= required | {"--spot"}
    (place,) = (line for line in JOBS["tpu-vm"].content.splitlines() if line.startswith("place=("))
    assert place == "place=(--zone=us-east5-a --project=p)"


def test_jobset_counts_hosts_and_chips():
    """4 x 8 chips of v5e in a slice of several hosts are eight nodes of four (GKE, "plan TPUs")."""
    (replicated,) = json.loads(JOBS["gke"].content)["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert replicated["replicas"] == 2 and job["parallelism"] == job["completions"] == 8
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["containers"][0]["command"] == COMMAND
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"


@pytest.mark.parametrize(
    ("topology", "expected"), [("v5e:16x16", "v5litepod-256"), ("v5p:4x4x8", "v5p-256"), ("v6e:4x4", "v6e-16")]
)
def test_accelerator_types_count_cores_where_google_does(topology, expected):
    """docs.cloud.google.com/tpu: v5p-256 is 128 chips, v5litepod-256 is 256."""
    assert tpu_vm.accelerator_type(topology) == expected


SBATCH = """#!/bin/bash
echo "$(basename "$0") $*" >> "$LOG"
case "$(basename "$0")" in srun) exit "$STATUS" ;; esac
"""


@pytest.mark.parametrize(
    ("status", "lost", "requeued"),
    [(0, 0, False), (75, 99, True), (2, 0, False), (70, 0, False), (1, 0, False), (137, 9, True), (76, 10, False)],
)
def test_a_slurm_job_is_requeued_only_if_it_can_go_on(tmp_path, status, lost, requeued):
    """The script is run with srun and scontrol of the test's own, after ``lost`` processes were lost before."""
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(SBATCH)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "env").write_text("")
    (tmp_path / "bert-17.lost").write_text("76\n" * lost)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "STATUS": str(status)}
    env |= {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1000"}
    done = subprocess.run(["bash"], input=JOBS["slurm"].content, env=env, cwd=tmp_path, text=True, check=False)
    ran = (tmp_path / "log").read_text().splitlines()
    assert ran[0] == "srun --wait=60 bert-flax pretrain bert_large --workdir /shared/runs/a b --mesh.fsdp 4"
    assert ("scontrol requeue 17" in ran) is requeued
    assert done.returncode == (0 if requeued else status)


def test_slurm_files_lie_in_the_folder_that_was_asked_for():
    """And steps are told again what the job has for each process."""
    options = slurm.SlurmCommand(name="bert", output="my jobs", cpus_per_task=8)
    lines = slurm.make_job(options, ["x"]).content.splitlines()
    assert "#SBATCH --output='my jobs/bert-%j.log'" in lines and "srun --wait=60 --cpus-per-task=8 x" in lines
    assert sum("'my jobs/bert'-\"$SLURM_JOB_ID\".lost" in line for line in lines) == 2


GCLOUD = """#!/bin/bash
[[ "$*" == *describe* ]] || echo "${*:3:2}" >> "$LOG"
case "$*" in
  *describe*) cat "$STATE" 2>/dev/null || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; } ;;
  *queued-resources\\ create*) echo ACTIVE > "$STATE" ;;
  *queued-resources\\ delete*) rm "$STATE" ;;
  *ssh*) bash -c "${!#/#--command=/}" ;;
esac
"""
CREATE, DELETE, SSH = "queued-resources create", "queued-resources delete", "tpu-vm ssh"


@pytest.fixture
def gcloud(tmp_path):
    """Environment with a gcloud of the test's own, whose workers are this machine; commands are noted in "log"."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    found = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    return found | {"LOG": str(tmp_path / "log"), "STATE": str(tmp_path / "state")}


def run_on_tpu(env, program):
    """Runs a line of shell by the script; what was done, line by line."""
    options = tpu_vm.TpuVmCommand(name="bert", topology="v5e:4x4", zone="z", setup="cd ~")
    script = tpu_vm.make_job(options, ["bash", "-c", program]).content
    done = subprocess.run(["bash"], input=script, env=env, text=True, capture_output=True, check=False, timeout=60)
    return done, Path(env["LOG"]).read_text().splitlines()


def test_a_slice_that_is_preempted_is_asked_for_again(gcloud):
    """It is taken away while the command runs the first time."""
    program = "[ -e again ] && exit 0; touch again; echo SUSPENDED > $STATE; exit 255"
    done, log = run_on_tpu(gcloud, program)
    assert done.returncode == 0, done.stderr
    assert log == [CREATE, SSH, DELETE, CREATE, SSH, DELETE]
    assert not Path(gcloud["STATE"]).exists()


SAVING = "trap 'sleep 0.3; echo saved >> $LOG; exit 75' TERM; touch started; while :; do sleep 0.1; done"


def test_what_a_lost_connection_left_saves_before_it_is_started_again(gcloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    with subprocess.Popen(["bash", "-c", SAVING], env=gcloud, cwd=tmp_path) as before:
        (tmp_path / ".bert.pid").write_text(str(before.pid))
        threading.Thread(target=before.wait).start()  # what has ended is there until someone has asked how
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        done, log = run_on_tpu(gcloud, "echo goes on >> $LOG")
    assert (done.returncode, before.returncode) == (0, 75), done.stderr
    assert log == [SSH, "saved", "goes on", DELETE]


def test_gcloud_that_does_not_answer_is_no_slice_that_is_gone(gcloud):
    (Path(gcloud["HOME"]) / "gcloud").write_text("#!/bin/bash\necho no network >&2; echo asked >> $LOG; exit 1\n")
    done, log = run_on_tpu(gcloud, "true")
    assert (done.returncode, done.stderr, log) == (1, "no network\n", ["asked"])  # once, and nothing was created


@pytest.mark.parametrize("to_all", [True, False], ids=["Ctrl-C", "SIGTERM to flax-launch"])
def test_a_job_on_tpus_that_is_told_to_stop_saves_and_gives_the_slice_back(gcloud, tmp_path, to_all):
    asked = ["tpu-vm", "--name=bert", "--topology=v5e:4x4", "--zone=z", "--setup=cd ~", f"--output={tmp_path}"]
    # Where the tests themselves were started to ignore Ctrl-C, as jobs in the background are, this one is not to.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "launch.cli", *asked, "--", "bash", "-c", SAVING]
    env = os.environ | gcloud | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with Process(command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as launcher:
        while not (tmp_path / "started").exists():
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.01)
        os.killpg(launcher.pid, signal.SIGINT) if to_all else launcher.send_signal(signal.SIGTERM)
        _, err = launcher.communicate(timeout=60)
    log = (tmp_path / "log").read_text().splitlines()
    assert (launcher.returncode, log) == (75, [CREATE, SSH, SSH, "saved", DELETE]), err
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("argv", "wrong"),
    [
        (["slurm", "--name", "bert"], "no command to run; give one after --"),
        (["slurm", "--name", "My Run", "--", "x"], "--name My Run: must begin with a letter"),
        (["slurm", "--", "x"], "--name must be given"),
        (["slurm", "--name", "bert", "--nodes", "0", "--", "x"], "--nodes 0: must be 1 or more"),
        (
            ["gke", "--name", "b", "--image", "i", "--topology", "v5e:3x5", "--", "x"],
            "unknown topology 'v5e:3x5'; there",
        ),
        (["gke", "--name", "b", "--image", "i", "--topology", "cpu:4", "--", "x"], "runs on TPU slices, as v5e:16x16"),
        (
            ["slurm", "--name", "bert", "--tasks-per-node", "2", "--gpus-per-node", "8", "--", "x"],
            "--gpus-per-node 8 for --tasks-per-node 2: of several processes each has one GPU, and one alone has all",
        ),
        (["local", "--processes", "0", "--", "x"], "--processes 0: must be 1 or more"),
        (["local", "--", "no-such-program"], "no-such-program: there is no such program"),
        (["plan", "bert_bse", "--topology", "cpu:4"], "unknown preset 'bert_bse'; did you mean bert_base?"),
        (["plan", "bert_base", "--topology", "v9:2x2"], "unknown topology 'v9:2x2'; there are cpu:N, local, and TPU"),
        (["plan", "bert_base"], "--topology must be given"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, wrong):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert len(err.splitlines()) == 1 and wrong in err


def test_dry_run_prints_what_would_be_run_and_does_nothing(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["slurm", "--name", "bert", "--output", str(tmp_path), "--dry-run", "--", *COMMAND])
    assert stop.value.code == 0 and list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert "srun --wait=60 bert-flax pretrain bert_large --workdir '/shared/runs/a b' --mesh.fsdp 4" in out
    assert out.splitlines()[-1] == f"sbatch {tmp_path}/bert.sbatch"


def test_a_scheduler_that_is_not_installed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["slurm", "--name", "bert", "--output", str(tmp_path), "--", *COMMAND])
    assert stop.value.code == 2 and "sbatch is not installed here" in capsys.readouterr().err
    # This process goes on as it was: with the default it would end without a word at the next pipe that nobody reads.
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN
