"""Kubernetes: a headless Service and an Indexed Job (or a JobSet), from a job's description; data, then YAML.

One pod is one machine. All run the same command; the index that the Job gives a pod is its rank among the machines, and pod 0
is where they meet. A pod ends with the code of ``runtime.processes.node``, the run's outcome, and the pod failure policy makes
of it what happens next: 0 finished, 75 go on (the pod is replaced, and nothing is counted), 2 configuration (it would fail
again, so the Job has failed), anything else is counted as a failure.

References: https://kubernetes.io/docs/concepts/workloads/controllers/job, https://jobset.sigs.k8s.io.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from launch.job import JobSpec
from launch.manifest import manifest_text
from launch.pods import CONTAINER, PORT, REPLICATED, Pods, config_name, pod_spec, problems
from runtime.errors import ConfigurationError, Problem

_LONGEST_NAME = 40  # of 63 that a host name may have: a JobSet's adds -node-0-9999, and a pod's -abcde


def manifests(job: JobSpec, pods: Pods) -> str:
    """Return the manifests that start a job, as YAML for ``kubectl apply``. Paths in ``job`` are those in the container.

    Raises:
        ConfigurationError: what Kubernetes would refuse, or what would lose the run; all mistakes at once.
    """
    if found := list(problems(job, pods)):
        raise ConfigurationError(found)
    documents = list(_documents(job, pods))
    try:
        (text := json.dumps(documents, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        what = f"holds bytes that are no text in UTF-8: {text[error.start - 20 : error.end]!r}"
        raise ConfigurationError([Problem("command line", "", what)]) from None
    return manifest_text(documents)


def object_name(name: str) -> str:
    """Return a run's name as Kubernetes takes names; two that differ stay different."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain == name and plain[:1].isalpha() and len(plain) <= _LONGEST_NAME:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return "-".join(filter(None, ["run", plain[: _LONGEST_NAME - 11].strip("-"), digest]))


def _documents(job: JobSpec, pods: Pods) -> Iterator[dict[str, Any]]:
    name = object_name(job.name)
    yield {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, pods, config_name(name, pods)),
        "#": "What was submitted, whatever becomes of the file; mounted over the one in the image.",
        "immutable": True,
        "data": {"run.yaml": pods.config_text},
    }
    if pods.jobset:
        yield _jobset(name, job, pods)
        return
    if job.nodes > 1:
        yield _service(name, pods)
    yield {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name, pods),
        "spec": {
            "#backoffLimitPerIndex": f"A failure of one pod ends them all, and each pod counts its own: {job.max_requeues} "
            "restarts, and then the Job has failed as a whole.",
            "backoffLimitPerIndex": job.max_requeues,
            "maxFailedIndexes": 0,
            **_job_spec(name, job, pods),
        },
    }


def _service(name: str, pods: Pods) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, pods),
        "#": f"No address of its own: it gives the pods names, {name}-0.{name} and so on.",
        "spec": {
            "clusterIP": "None",
            "#": "The machines look for one another before any of them is ready.",
            "publishNotReadyAddresses": True,
            "selector": _labels(name),
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _jobset(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(name, pods),
        "spec": {
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
                    "name": REPLICATED,
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
        },
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
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [2]},
                },
                {
                    "#": "75 is a run that was asked to stop, has saved, and is to be continued. When one pod is to go, all "
                    "agree on a step and leave with it.",
                    "action": "Ignore",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [75]},
                },
                {
                    "#": "Preempted, drained or evicted, and killed before it had saved: not the run's fault either. "
                    "Everything else, signals included, is counted.",
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"metadata": {"labels": _labels(name)}, "spec": pod_spec(name, job, pods)},
    }


def _metadata(name: str, pods: Pods, own: str | None = None) -> dict[str, Any]:
    namespace = {} if pods.namespace is None else {"namespace": pods.namespace}
    return {"name": own or name, **namespace, "labels": _labels(name)}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "lockstep", "app.kubernetes.io/instance": name}
