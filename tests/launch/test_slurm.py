"""``flax-launch slurm`` on a real Slurm: a job of two tasks trains, is told to stop, is requeued and goes on."""

import json
import re
import subprocess
import sys
import time

import pytest
from slurm_cluster import cluster, missing

SECONDS, NUM_STEPS = 150, 120
pytestmark = pytest.mark.skipif(bool(missing()), reason="not installed: slurm-wlm, munge")


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def wait_for(what, describe):
    deadline = time.monotonic() + SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)
    return found


def test_a_job_that_is_preempted_is_requeued_and_resumes(bert_flax, tmp_path):
    one_device = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    workdir, options = tmp_path / "run", {"train__num_steps": NUM_STEPS, "checkpoint__every_steps": 0}
    with cluster(tmp_path / "slurm") as env:
        env |= one_device

        def run(*command):
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done
            return done.stdout

        def job():
            return dict(re.findall(r"(\w+)=(\S+)", run("scontrol", "show", "job", number)))

        def said():
            return log.read_text() if log.exists() else ""

        training = [sys.executable, "-m", "bert_flax.cli", *bert_flax.pretrain(workdir, mesh__fsdp=2, **options)]
        asked = ["slurm", "--name=here", "--tasks-per-node=2", "--cpus-per-task=1", "--time=10", f"--output={tmp_path}"]
        out = run(sys.executable, "-m", "launch.cli", *asked, "--", *training)
        (number,) = re.findall(r"^Submitted batch job (\d+)$", out, re.M)
        log = tmp_path / f"here-{number}.log"
        wait_for(lambda: "step 3/" in said(), said)
        run("scancel", "--signal=TERM", number)
        wait_for(lambda: job()["JobState"] == "COMPLETED", lambda: f"{said()}\n{job()}")
        assert (job()["Restarts"], job()["ExitCode"]) == ("1", "0:0")
    saved = set(re.findall(r"bert-flax: SIGTERM: step (\d+) is saved; run the same command to resume", said()))
    (step,) = saved  # both tasks have said so, of one step
    assert said().count("starts: ") == 1 and f"resumes at step {step}: " in said()
    assert said().count(f"step {NUM_STEPS}/{NUM_STEPS}") == 1
    whole = bert_flax.run(*bert_flax.pretrain(tmp_path / "whole", **options))
    assert whole.returncode == 0, whole.stderr
    steps, found = zip(*losses(workdir), strict=True)
    assert steps == tuple(range(1, NUM_STEPS + 1))
    assert found == pytest.approx([loss for _, loss in losses(tmp_path / "whole")], abs=1e-5)
