"""Generate Kubernetes manifests from a job's description: Service and Indexed Job, JobSet, or TrainJob.

One pod is one machine. All pods run the same command; a pod's index in the Job is its node rank, and pod 0 is the main host. A
pod exits with the code of ``launch.node``, the run's outcome, and the pod failure policy decides what follows: 0 finished, 75
resume (the pod is replaced, which does not count as a failure), 2 would fail again (the Job fails), anything else counts as a
failure.
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

_LONGEST_NAME = 40  # host names have at most 63 characters: a JobSet adds -node-0-9999, a pod -abcde


def manifests(job: JobSpec, pods: Pods) -> str:
    """Return the manifests of a job, as YAML for ``kubectl apply``. Paths in ``job`` are paths in the container.

    Raises:
        ConfigurationError: Kubernetes would refuse the job, or the run would be lost; all mistakes at once.
    """
    if found := list(problems(job, pods)):
        raise ConfigurationError(found)
    documents = list(_documents(job, pods))
    try:
        (text := json.dumps(documents, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        what = f"contains bytes that are not valid UTF-8: {text[error.start - 20 : error.end]!r}"
        raise ConfigurationError([Problem("command line", "", what)]) from None
    return manifest_text(documents)


def object_name(name: str) -> str:
    """Return a valid Kubernetes name for a run; a name that is changed gets a digest, to stay unique."""
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
        "#": "The submitted YAML, mounted over the one in the image; later changes to the file have no effect.",
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
