"""Kubeflow's Trainer (v2): a TrainJob, and the TrainingRuntime that it refers to.

The Trainer's controller makes a JobSet of the runtime's template: into the container ``node`` of the Job that is labelled as
the trainer's it puts what the TrainJob says of image, arguments, variables and resources, and as many pods as that has nodes.
So a runtime of ours is the JobSet of ``launch.kubernetes.workloads`` less these, and pods end and are started again as there.
Of an installed runtime, what it cannot know is patched: the YAML, volumes, as whom the pods run, the time to save in. Whether
and how often pods are started again stays its own decision. References: the custom resource definitions, ``pkg/runtime`` and
``pkg/webhooks`` of https://github.com/kubeflow/trainer, v2.3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from launch.job import JobSpec
from launch.kubernetes.pods import NODE, Pods, TrainingRuntime, literal, pod_spec
from launch.kubernetes.workloads import jobset_spec, labels, metadata

_GROUP = "trainer.kubeflow.org"
_IN_TRAINJOB = ("image", "args", "env", "resources")  # of a container; all else is the runtime's
_PATCHABLE = ("terminationGracePeriodSeconds", "securityContext", "volumes")  # of a pod
_PATCHABLE_OF_CONTAINER = ("name", "securityContext", "volumeMounts")


def trainjob_documents(name: str, job: JobSpec, pods: Pods) -> Iterator[dict[str, Any]]:
    """Yield the TrainJob, and before it the runtime unless that is installed: a TrainJob without one is refused."""
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
    """Return what is put into the runtime's container ``node``."""
    (container,) = pod_spec(name, job, pods)["containers"]
    command = {
        "#command": "As the image does by itself: its first process passes SIGTERM on. A runtime of other people's may name "
        "another, and no folder to work in.",
        "command": ["tini", "--", "env", literal(f"--chdir={job.working_folder}")],
    }
    return {
        "image": container["image"],
        "numNodes": job.nodes,
        **(_only(container, ("args",)) if pods.runtime is None else {**command, "args": container["args"]}),
        "env": container["env"],
        **({"resourcesPerNode": container["resources"]} if container["resources"] else {}),
    }


def _runtime(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the runtime that starts and ends pods as a JobSet of ours does."""
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
            "#": "No policy for torch: it would set variables for torchrun, which is not what the pods run.",
            "mlPolicy": {"numNodes": job.nodes},
            "template": {"spec": spec},
        },
    }


def _patch(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return what is changed of an installed runtime for this job."""
    spec = pod_spec(name, job, pods)
    patched = _only(spec, _PATCHABLE)
    patched["containers"] = [_only(container, _PATCHABLE_OF_CONTAINER) for container in spec["containers"]]
    pod = {"metadata": {"labels": labels(name)}, "spec": patched}
    return {
        "#": "Whose patch it is: a domain and a path.",
        "manager": "lockstep/submit",
        "trainingRuntimeSpec": {
            "template": {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": pod}}}]}}
        },
    }


def _only(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return some keys of a mapping, and the comments on them."""
    return {key: value for key, value in values.items() if key.removeprefix("#") in keys}


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.removeprefix("#") not in keys}
