"""Pods of a job on Kubernetes: the pod spec shared by all workload kinds, and validation."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from launch.job import JobSpec
from runtime.errors import Problem

PORT = 29500  # of the rendezvous
NODE = "node"  # name of the container and of the JobSet's replicated job; Kubeflow's Trainer requires it for both
_QUANTITY = re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_SECRET_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")


class WorkloadKind(StrEnum):
    """Kind of object that starts the pods, as named in kubectl."""

    JOB = "job"
    JOBSET = "jobset"
    TRAINJOB = "trainjob"


@dataclass(frozen=True)
class TrainingRuntime:
    """A runtime of Kubeflow's Trainer that is installed in the cluster.

    Args:
        kind: ``ClusterTrainingRuntime``, or ``TrainingRuntime`` for one in the job's namespace.
    """

    name: str
    kind: str = "ClusterTrainingRuntime"


@dataclass(frozen=True)
class Volume:
    """A volume mounted in every pod.

    Args:
        source: name of a PersistentVolumeClaim; or absolute path of a folder that every machine has.
        path: mount path.
    """

    source: str
    path: PurePosixPath
    read_only: bool = False


@dataclass(frozen=True)
class SecretKey:
    """A key of a Secret in the cluster."""

    secret: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Pods:
    """Kubernetes settings of a job.

    Args:
        config_text: content of the YAML file, mounted at ``job.config``.
        namespace: default: the current one of ``kubectl``.
        secrets: Secret keys that hold the values of ``job.secrets``, by variable name.
        cpus, memory: requests of each pod; ``memory`` is also its limit, as a Kubernetes quantity. Default: none.
        user, group: numeric ids, not root's.
        kind: kind of object that starts the pods.
        runtime: runtime of a TrainJob. Default: a generated one, with the policies of our JobSet.
    """

    config_text: str
    namespace: str | None = None
    volumes: Sequence[Volume] = ()
    secrets: Mapping[str, SecretKey] = field(default_factory=dict)
    cpus: int | None = None
    memory: str | None = None
    user: int = 1000
    group: int = 1000
    kind: WorkloadKind = WorkloadKind.JOB
    runtime: TrainingRuntime | None = None


def pod_spec(name: str, job: JobSpec, pods: Pods) -> dict[str, Any]:
    """Return the spec of each pod; ``name`` is that of the Job, JobSet or TrainJob."""
    mounts, volumes = _mounts_and_volumes(name, job, pods)
    named = {"subdomain": name} if pods.kind is WorkloadKind.JOB and job.nodes > 1 else {}
    return {
        "restartPolicy": "Never",
        **named,
        "#terminationGracePeriodSeconds": f"limit.grace_seconds ({job.grace_seconds:g}) for the current step, the same for "
        "the save, and 30 s for the processes to exit.",
        "terminationGracePeriodSeconds": math.ceil(2 * job.grace_seconds) + 30,
        "#enableServiceLinks": "A Service named 'master' would set MASTER_PORT to a URL.",
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": pods.user,
            "runAsGroup": pods.group,
            "#fsGroup": "Makes the run folder writable.",
            "fsGroup": pods.group,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": NODE,
                "image": job.image,
                "#args": "Not 'command', which would replace the image's entrypoint, tini, which forwards SIGTERM.",
                "args": [
                    escaped(argument) if literal else argument for argument, literal in _arguments(name, job, pods)
                ],
                "workingDir": str(job.working_folder),
                "env": list(_environment(job, pods)),
                "resources": _resources(job, pods),
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _arguments(name: str, job: JobSpec, pods: Pods) -> Iterator[tuple[str, bool]]:
    """Yield the arguments, each with whether it is literal; the other is a variable that Kubernetes fills in."""
    yield from ((argument, True) for argument in ("python", "-m", "launch.node", str(job.config), *job.overrides))
    yield from ((argument, True) for argument in ("--processes", str(job.processes_per_node)))
    if job.use_gpus:
        yield "--gpus", True
    if job.nodes == 1:
        return
    first = f"{name}-0" if pods.kind is WorkloadKind.JOB else f"{name}-{NODE}-0-0"
    for argument in ("--nodes", str(job.nodes), "--main-address", f"{first}.{name}", "--main-port", str(PORT)):
        yield argument, True
    yield "--node-rank", True
    yield "$(JOB_COMPLETION_INDEX)", False


def _environment(job: JobSpec, pods: Pods) -> Iterator[dict[str, Any]]:
    plain = {"PYTHONSAFEPATH": "1"}  # modules in the working folder must not shadow libraries
    if pods.cpus is not None:  # processes see all cores of the machine, and would start a thread for each
        plain["OMP_NUM_THREADS"] = str(max(1, pods.cpus // job.processes_per_node))
    for variable, value in {**plain, **job.environment}.items():
        yield {"name": variable, "value": escaped(value)}
    for variable in job.secrets:
        source = pods.secrets[variable]
        yield {"name": variable, "valueFrom": {"secretKeyRef": {"name": source.secret, "key": source.key}}}


def _resources(job: JobSpec, pods: Pods) -> dict[str, Any]:
    memory = {} if pods.memory is None else {"memory": pods.memory}
    limits = {**memory, **({"nvidia.com/gpu": str(job.processes_per_node)} if job.use_gpus else {})}
    # No CPU limit: while one pod is throttled, all others wait.
    requests = {**memory, **({} if pods.cpus is None else {"cpu": str(pods.cpus)})}
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _mounts_and_volumes(name: str, job: JobSpec, pods: Pods) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    mounts: list[dict[str, Any]] = [
        {
            "name": "config",
            "mountPath": str(job.config),
            "subPath": "run.yaml",
            "readOnly": True,
        },
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": config_name(name, pods)}},
        {
            "#": "Loader workers pass batches through /dev/shm, and NCCL uses it between processes. The default has 64 MiB; "
            "this one may use all the memory of the pod.",
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory"},
        },
    ]
    for number, volume in enumerate(pods.volumes):
        read_only = {"readOnly": True} if volume.read_only else {}
        mounts.append({"name": f"volume-{number}", "mountPath": str(volume.path), **read_only})
        source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": volume.source, **read_only}}
        if volume.source.startswith("/"):
            source = {"hostPath": {"path": volume.source, "type": "Directory"}}
        volumes.append({"name": f"volume-{number}", **source})
    return mounts, volumes


def config_name(name: str, pods: Pods) -> str:
    """Return the ConfigMap's name, which depends on its content: a restarted pod gets what was submitted."""
    return f"{name}-{hashlib.sha256(pods.config_text.encode()).hexdigest()[:10]}"


def escaped(text: str) -> str:
    """Escape ``$``: Kubernetes expands ``$(NAME)`` in arguments and in variables."""
    return text.replace("$", "$$")


def problems(job: JobSpec, pods: Pods) -> Iterator[Problem]:
    """Yield the problems of a job that Kubernetes would refuse, or whose run would be lost."""
    if not job.image:
        yield _problem("--image", "is required: image that the pods run")
    if pods.namespace is not None and not _LABEL.fullmatch(pods.namespace):
        yield _problem(
            "--namespace", f"{pods.namespace!r} is not a valid namespace name (a-z, 0-9 and -, at most 63 characters)"
        )
    if 0 in (pods.user, pods.group):
        yield _problem("--user", "must not be root; give USER:GROUP as numbers, such as 1000:1000")
    if pods.runtime is not None:
        if pods.kind is not WorkloadKind.TRAINJOB:
            yield _problem("--runtime", "needs --trainjob")
        if not _OBJECT.fullmatch(pods.runtime.name):
            yield _problem("--runtime", f"{pods.runtime.name!r} is not a valid name of a runtime")
    if pods.memory is not None and not _QUANTITY.fullmatch(pods.memory):
        yield _problem("--memory", f"{pods.memory!r} is not a quantity of memory, such as 64Gi")
    if len(pods.config_text.encode()) > 1_000_000:
        yield _problem("CONFIG", "is larger than a megabyte, which a ConfigMap cannot hold")
    if ":" in str(job.config):
        yield _problem("CONFIG", f"{str(job.config)!r} contains a colon, which Kubernetes allows in no mount path")
    yield from _problems_of_secrets(job, pods)
    yield from _problems_of_volumes(job, pods)


def _problems_of_secrets(job: JobSpec, pods: Pods) -> Iterator[Problem]:
    for variable, source in pods.secrets.items():
        if not _OBJECT.fullmatch(source.secret) or not _SECRET_KEY.fullmatch(source.key):
            yield _problem(
                f"--secret {variable}",
                f"'{source.secret}/{source.key}' is not a valid name of a Secret and of a key in it",
            )
    for variable in job.secrets:
        if variable in job.environment:
            yield _problem(variable, "is given by both --env and --secret: leave one out")
        elif variable not in pods.secrets:
            what = f"is a secret: store it in a Secret of the cluster, and give --secret {variable}=SECRET/KEY"
            yield _problem(variable, what)


def _problems_of_volumes(job: JobSpec, pods: Pods) -> Iterator[Problem]:
    seen = set()
    for volume in pods.volumes:
        key = f"--volume {volume.source}:{volume.path}"
        if not volume.path.is_absolute() or ":" in str(volume.path) or ".." in volume.path.parts:
            yield _problem(key, "must be mounted at an absolute path without colons or '..'")
        if not volume.source.startswith("/") and not _OBJECT.fullmatch(volume.source):
            yield _problem(
                key, f"{volume.source!r} is neither the name of a PersistentVolumeClaim nor an absolute path"
            )
        if volume.path in seen:
            yield _problem(key, "is mounted at the same path as another volume")
        seen.add(volume.path)
    assert job.run_folder is not None
    folder = PurePosixPath(job.run_folder)
    parents = [volume for volume in pods.volumes if volume.path in (folder, *folder.parents)]
    if not parents or max(parents, key=lambda volume: len(volume.path.parts)).read_only:
        what = f"{folder} is on no writable volume, and would be lost with its pod: add --volume CLAIM:{folder.parent}"
        several = ", a claim that all machines can write to (ReadWriteMany)" if job.nodes > 1 else ""
        yield _problem("output", f"{what}{several}")


def _problem(key: str, what: str) -> Problem:
    return Problem("command line", key, what)
