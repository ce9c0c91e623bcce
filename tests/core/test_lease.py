"""A lease on an object in a bucket is lost to another process, and not to a bad line."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_gcs
import pytest

from core_flax.signals import EXIT_PEER_LOST

HOLDER = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from core_flax import lease
lease.RENEW_SECONDS, lease.LOST_SECONDS = 0.1, 1.0
with lease.leased("gs://{fake_gcs.BUCKET}/run/run.lock", "refused"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def bucket(monkeypatch):
    with fake_gcs.serve() as bucket:
        for name, value in bucket.environment().items():
            monkeypatch.setenv(name, value)
        yield bucket


@pytest.fixture
def holder(bucket):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", HOLDER], text=True, **pipes) as process:
        deadline = threading.Timer(60, process.kill)
        deadline.start()
        assert process.stdout.readline() == "held\n"
        yield process
        deadline.cancel()


def wait_for_writes(bucket, count):
    stop, deadline = len(bucket.written) + count, time.monotonic() + 30
    while len(bucket.written) < stop and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_write_that_was_made_and_not_answered_is_ones_own(bucket, holder):
    bucket.unanswered = 1
    wait_for_writes(bucket, 4)
    assert bucket.unanswered == 0
    said = holder.communicate("\n")[1]
    assert holder.returncode == 0 and "error" not in said
    assert not bucket.objects


def test_an_object_that_another_has_written_is_lost(bucket, holder):
    with bucket.lock:
        bucket.objects["run/run.lock"] = next(bucket.generations), b'{"host": "another"}'
    assert holder.wait(timeout=60) == EXIT_PEER_LOST
    said = holder.stderr.read()
    assert said.count("error") == 1 and "gs://bucket/run/run.lock was taken by another run" in said
    assert bucket.objects["run/run.lock"][1] == b'{"host": "another"}'
