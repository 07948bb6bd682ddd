"""Kubeflow's Trainer (v2): a TrainJob, and the TrainingRuntime that it refers to.

The Trainer's controller creates a JobSet from the runtime's template. Image, arguments, variables, resources and the number of
nodes come from the TrainJob, and go into the container ``node`` of the Job labelled as the trainer's. So our generated runtime
is the JobSet of ``launch.kubernetes.workloads`` without these, with the same policies for failures and restarts. An installed
runtime is patched with what it lacks: the YAML, volumes, user and group, the grace period. It decides itself whether and how
often pods are restarted. References: the custom resource definitions, ``pkg/runtime`` and ``pkg/webhooks`` of
https://github.com/kubeflow/trainer, v2.3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from launch.job import JobSpec
from launch.kubernetes.pods import NODE, Pods, TrainingRuntime, escaped, pod_spec
from launch.kubernetes.workloads import jobset_spec, labels, metadata

_GROUP = "trainer.kubeflow.org"
_IN_TRAINJOB = (
    "image",
    "args",
    "env",
    "resources",
)  # fields of the container set by the TrainJob; the others are the runtime's
_PATCHABLE = ("terminationGracePeriodSeconds", "securityContext", "volumes")  # fields of a pod
_PATCHABLE_OF_CONTAINER = ("name", "securityContext", "volumeMounts")


def trainjob_documents(name: str, job: JobSpec, pods: Pods) -> Iterator[dict[str, Any]]:
    """Yield the runtime, unless an installed one is used, then the TrainJob, which is refused without a runtime."""
    if pods.runtime is None:
        yield _runtime(name, job, pods)
    runtime = pods.runtime or TrainingRuntime(name, "TrainingRuntime")
    yield {
        "apiVersion": f"{_GROUP}/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata(name, pods),
        "spec": {
            "runtimeRef": {"apiGroup": _GROUP, "kind": runtime.kind, "name": runtime.name},
            "trainer": _trainer(name, job, pods),
            **({} if pods.runtime is None else {"runtimePatches": [_patch(name, job, pods)]}),
        },
    }


def _trainer(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the fields for the runtime's container ``node``."""
    (container,) = pod_spec(name, job, pods)["containers"]
    command = {
        "#command": "The image's entrypoint, which forwards SIGTERM; an installed runtime may set another command, and no "
        "working folder.",
        "command": ["tini", "--", "env", escaped(f"--chdir={job.working_folder}")],
    }
    return {
        "image": container["image"],
        "numNodes": job.nodes,
        **(_only(container, ("args",)) if pods.runtime is None else {**command, "args": container["args"]}),
        "env": container["env"],
        **({"resourcesPerNode": container["resources"]} if container["resources"] else {}),
    }


def _runtime(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the generated runtime, with the policies of our JobSet."""
    spec = jobset_spec(name, job, pods)
    (replicated,) = spec["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    pod["containers"] = [_without(container, _IN_TRAINJOB) for container in pod["containers"]]
    replicated["template"] = {
        "metadata": {"labels": {f"{_GROUP}/trainjob-ancestor-step": "trainer"}},
        **replicated["template"],
    }
    return {
        "apiVersion": f"{_GROUP}/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {**metadata(name, pods), "labels": {**labels(name), f"{_GROUP}/framework": "torch"}},
        "spec": {
            "#": "No torch policy: it would set variables for torchrun, which the pods do not use.",
            "mlPolicy": {"numNodes": job.nodes},
            "template": {"spec": spec},
        },
    }


def _patch(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the patch of an installed runtime for this job."""
    spec = pod_spec(name, job, pods)
    patched = _only(spec, _PATCHABLE)
    patched["containers"] = [_only(container, _PATCHABLE_OF_CONTAINER) for container in spec["containers"]]
    pod = {"metadata": {"labels": labels(name)}, "spec": patched}
    return {
        "#": "Owner of the patch: a domain and a path.",
        "manager": "lockstep/submit",
        "trainingRuntimeSpec": {
            "template": {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": pod}}}]}}
        },
    }


def _only(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return some keys of a mapping, with their comments."""
    return {key: value for key, value in values.items() if key.removeprefix("#") in keys}


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.removeprefix("#") not in keys}
