"""Headless Service, Indexed Job and JobSet as data: how pods are started, and what follows when they end.

References: https://kubernetes.io/docs/concepts/workloads/controllers/job, https://jobset.sigs.k8s.io.
"""

from __future__ import annotations

from typing import Any

from launch.job import JobSpec
from launch.kubernetes.pods import NODE, PORT, Pods, pod_spec


def service(name: str, pods: Pods) -> dict[str, Any]:
    """Return the headless Service that gives a Job's pods host names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, pods),
        "#": f"Headless: it only gives the pods host names, {name}-0.{name} and so on.",
        "spec": {
            "clusterIP": "None",
            "#": "The machines look each other up before any of them is ready.",
            "publishNotReadyAddresses": True,
            "selector": labels(name),
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def indexed_job(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the Job."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(name, pods),
        "spec": {
            "#backoffLimitPerIndex": f"When one pod fails, all exit, and each pod counts its own failures: after "
            f"{job.max_requeues} restarts the whole Job has failed.",
            "backoffLimitPerIndex": job.max_requeues,
            "maxFailedIndexes": 0,
            **_job_spec(name, job, pods),
        },
    }


def jobset(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the JobSet."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata(name, pods),
        "spec": jobset_spec(name, job, pods),
    }


def jobset_spec(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the spec of the JobSet, also used for the runtime of a TrainJob."""
    return {
        "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": job.max_requeues,
            "#": "All pods end before new ones start, so that no pod joins one that is about to exit.",
            "restartStrategy": "BlockingRecreate",
            "rules": [
                {
                    "#": "The pod failure policy found a failure that would repeat.",
                    "name": "configuration",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": NODE,
                "replicas": 1,
                "template": {
                    "spec": {
                        "#": "Failures are counted by the JobSet.",
                        "backoffLimit": 0,
                        **_job_spec(name, job, pods),
                    }
                },
            }
        ],
    }


def _job_spec(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    return {
        "completions": job.nodes,
        "parallelism": job.nodes,
        "#completionMode": "Each pod has an index, which is its node rank.",
        "completionMode": "Indexed",
        "#podReplacementPolicy": "Do not replace a pod that is still saving.",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {
                    "#": "2: a mistake in the configuration, or another failure that would repeat, such as a NaN loss.",
                    "action": "FailJob",
                    "onExitCodes": {"containerName": NODE, "operator": "In", "values": [2]},
                },
                {
                    "#": "75: the run was asked to stop, has saved, and will be resumed. When one pod must stop, all agree "
                    "on a step and exit after it.",
                    "action": "Ignore",
                    "onExitCodes": {"containerName": NODE, "operator": "In", "values": [75]},
                },
                {
                    "#": "Preempted, drained or evicted, and killed before it had saved: not a failure of the run. "
                    "Everything else, signals included, counts as one.",
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"metadata": {"labels": labels(name)}, "spec": pod_spec(name, job, pods)},
    }


def metadata(name: str, pods: Pods, own: str | None = None) -> dict[str, Any]:
    """Return the metadata of an object of the job; ``own`` is its name if it differs from the job's."""
    namespace = {} if pods.namespace is None else {"namespace": pods.namespace}
    return {"name": own or name, **namespace, "labels": labels(name)}


def labels(name: str) -> dict[str, str]:
    """Return the labels of all objects of a job."""
    return {"app.kubernetes.io/name": "lockstep", "app.kubernetes.io/instance": name}
