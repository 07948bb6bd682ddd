"""A headless Service, an Indexed Job and a JobSet as data: what starts the pods, and what becomes of them when they end.

References: https://kubernetes.io/docs/concepts/workloads/controllers/job, https://jobset.sigs.k8s.io.
"""

from __future__ import annotations

from typing import Any

from launch.job import JobSpec
from launch.kubernetes.pods import NODE, PORT, Pods, pod_spec


def service(name: str, pods: Pods) -> dict[str, Any]:
    """Return the Service that gives the pods of a Job names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, pods),
        "#": f"No address of its own: it gives the pods names, {name}-0.{name} and so on.",
        "spec": {
            "clusterIP": "None",
            "#": "The machines look for one another before any of them is ready.",
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
            "#backoffLimitPerIndex": f"A failure of one pod ends them all, and each pod counts its own: {job.max_requeues} "
            "restarts, and then the Job has failed as a whole.",
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
    """Return what a JobSet is, which may also be made of a TrainJob."""
    return {
        "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": job.max_requeues,
            "#": "All pods are gone before new ones start, so that none joins one that is about to leave.",
            "restartStrategy": "BlockingRecreate",
            "rules": [
                {
                    "#": "The Job's own policy has found what would fail again.",
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
                        "#": "A failure is the JobSet's to count.",
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
        "#completionMode": "Each pod has an index, which is its rank among the machines.",
        "completionMode": "Indexed",
        "#podReplacementPolicy": "Not while the old pod is still saving.",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {
                    "#": "2 is a mistake in the configuration, or another failure that would repeat: a loss that is NaN.",
                    "action": "FailJob",
                    "onExitCodes": {"containerName": NODE, "operator": "In", "values": [2]},
                },
                {
                    "#": "75 is a run that was asked to stop, has saved, and is to be continued. When one pod is to go, all "
                    "agree on a step and leave with it.",
                    "action": "Ignore",
                    "onExitCodes": {"containerName": NODE, "operator": "In", "values": [75]},
                },
                {
                    "#": "Preempted, drained or evicted, and killed before it had saved: not the run's fault either. "
                    "Everything else, signals included, is counted.",
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"metadata": {"labels": labels(name)}, "spec": pod_spec(name, job, pods)},
    }


def metadata(name: str, pods: Pods, own: str | None = None) -> dict[str, Any]:
    """Return the metadata of an object of the job; ``own`` is its name where that is not the job's."""
    namespace = {} if pods.namespace is None else {"namespace": pods.namespace}
    return {"name": own or name, **namespace, "labels": labels(name)}


def labels(name: str) -> dict[str, str]:
    """Return what all objects of a job are found by."""
    return {"app.kubernetes.io/name": "lockstep", "app.kubernetes.io/instance": name}
