"""``flax-launch gke``: a JobSet manifest that runs a training command on TPU slices of Google Kubernetes Engine."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core_flax.config import check_range
from core_flax.types import UserError
from launch.jobs import JOIN_WAIT, Job, JobOptions

MACHINES: dict[str, tuple[str, int]] = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
}
"""TPU version -> (label of its nodes, chips of a node in a slice of several). cloud.google.com/kubernetes-engine/docs/
concepts/plan-tpus."""


@dataclass(frozen=True, kw_only=True)
class GkeCommand(JobOptions):
    """Runs a training command on TPU slices through JobSet, which starts all pods again when one is lost.

    It then goes on from its newest checkpoint: the workdir has to lie in storage that all pods share.
    """

    topology: str
    """Slice, as in v5e:16x16."""
    image: str
    """Container image with this package and jax[tpu]."""
    slices: int = 1
    """Slices of that shape."""
    namespace: str = "default"
    """Kubernetes namespace."""
    service_account: str | None = None
    """Kubernetes service account, for access to gs:// buckets; None: the namespace's default."""
    max_restarts: int = 100
    """How often the job is started again when a pod is lost."""
    save_seconds: int = 120
    """How long a pod has to save when it is told to go."""
    spot: bool = False
    """Take spot nodes, which may be taken away at any time."""

    def __post_init__(self) -> None:
        """Raises UserError on a value out of range."""
        super().__post_init__()
        check_range("", self, "slices", "save_seconds", least=1)
        check_range("", self, "max_restarts", least=0)


def make_job(options: GkeCommand, argv: Sequence[str]) -> Job:
    """The manifest, and the command that submits it. It is JSON, which is YAML too."""
    from launch.chips import parse_topology

    kind, shape = parse_topology(options.topology)
    if kind not in MACHINES:
        raise UserError(f"--topology {options.topology}: flax-launch gke runs on TPU slices, as v5e:16x16")
    label, per_node = MACHINES[kind]
    hosts = max(1, math.prod(shape) // per_node)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, shape)),
    }
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    pod = _pod(options, argv, selector, min(per_node, math.prod(shape)))
    manifest = _jobset(options, pod, hosts)
    file = f"{options.name}.jobset.json"
    return Job(file, json.dumps(manifest, indent=2) + "\n", ("kubectl", "apply", "--filename"))


def _pod(options: GkeCommand, argv: Sequence[str], selector: dict[str, str], chips: int) -> dict[str, Any]:
    account = {} if options.service_account is None else {"serviceAccountName": options.service_account}
    return {
        **account,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.save_seconds,
        "nodeSelector": selector,
        "containers": [
            {
                "name": "train",
                "image": options.image,
                "command": list(argv),
                "env": [{"name": name, "value": value} for name, value in JOIN_WAIT.items()],
                "ports": [{"containerPort": 8471}, {"containerPort": 8476}],
                "resources": {"limits": {"google.com/tpu": chips}},
            }
        ],
    }


def _jobset(options: GkeCommand, pod: dict[str, Any], hosts: int) -> dict[str, Any]:
    # Any pod's end but success starts the whole set again: a single process cannot come back into a running job. What
    # would fail again, the user's mistakes and a loss that is not finite, fails the set at once.
    would_fail_again = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2, 70]}}
    end_it_all = {"name": "wouldFailAgain", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [would_fail_again]},
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "namespace": options.namespace,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "rules": [end_it_all],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }
