"""Kubernetes: a headless Service and an Indexed Job, a JobSet or a TrainJob, from a job's description; data, then YAML.

One pod is one machine. All run the same command; the index that the Job gives a pod is its rank among the machines, and pod 0
is where they meet. A pod ends with the code of ``launch.node``, the run's outcome, and the pod failure policy makes
of it what happens next: 0 finished, 75 go on (the pod is replaced, and nothing is counted), 2 configuration (it would fail
again, so the Job has failed), anything else is counted as a failure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from launch.job import JobSpec
from launch.kubernetes.pods import Pods, WorkloadKind, config_name, problems
from launch.kubernetes.trainjob import trainjob_documents
from launch.kubernetes.workloads import indexed_job, jobset, metadata, service
from launch.kubernetes.yaml_text import manifest_text
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
        "metadata": metadata(name, pods, config_name(name, pods)),
        "#": "What was submitted, whatever becomes of the file; mounted over the one in the image.",
        "immutable": True,
        "data": {"run.yaml": pods.config_text},
    }
    if pods.kind is WorkloadKind.TRAINJOB:
        yield from trainjob_documents(name, job, pods)
    elif pods.kind is WorkloadKind.JOBSET:
        yield jobset(name, job, pods)
    else:
        if job.nodes > 1:
            yield service(name, pods)
        yield indexed_job(name, job, pods)
