"""The pods of a job on Kubernetes: what is the same whatever starts them, and what is refused."""

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

PORT = 29500  # where the machines meet
NODE = "node"  # of the container, and of the one replicated job in a JobSet: Kubeflow's Trainer knows both by this name
_QUANTITY = re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_SECRET_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")


class WorkloadKind(StrEnum):
    """What starts the pods, as kubectl names it."""

    JOB = "job"
    JOBSET = "jobset"
    TRAINJOB = "trainjob"


@dataclass(frozen=True)
class TrainingRuntime:
    """A runtime of Kubeflow's Trainer that is installed in the cluster.

    Args:
        kind: ``ClusterTrainingRuntime``, or ``TrainingRuntime`` for one of the job's own namespace.
    """

    name: str
    kind: str = "ClusterTrainingRuntime"


@dataclass(frozen=True)
class Volume:
    """What is mounted in every pod.

    Args:
        source: a PersistentVolumeClaim's name; or a path that begins with ``/``, of a folder that every machine has.
        path: where it is mounted.
    """

    source: str
    path: PurePosixPath
    read_only: bool = False


@dataclass(frozen=True)
class SecretKey:
    """One key of a Secret of the cluster."""

    secret: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What only Kubernetes is told about a job.

    Args:
        config_text: the YAML file's content, which is mounted at ``job.config``.
        namespace: default: the one that ``kubectl`` is set to.
        secrets: where the values of ``job.secrets`` are, by name.
        cpus, memory: that each pod gets, as Kubernetes writes quantities. Default: whatever is free.
        user, group: by number; neither is root's.
        kind: what is to start the pods.
        runtime: that a TrainJob refers to. Default: one of its own, which starts and ends pods as a JobSet of ours does.
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
    """Return what each pod is; ``name`` is that of the Job, JobSet or TrainJob."""
    mounts, volumes = _mounts_and_volumes(name, job, pods)
    named = {"subdomain": name} if pods.kind is WorkloadKind.JOB and job.nodes > 1 else {}
    return {
        "restartPolicy": "Never",
        **named,
        "#terminationGracePeriodSeconds": f"limit.grace_seconds ({job.grace_seconds:g}) to come to the end of a step, as many "
        "for the save, and half a minute for the processes to leave.",
        "terminationGracePeriodSeconds": math.ceil(2 * job.grace_seconds) + 30,
        "#enableServiceLinks": "A Service called 'master' would set MASTER_PORT, to no port.",
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": pods.user,
            "runAsGroup": pods.group,
            "#fsGroup": "So that the run folder can be written to.",
            "fsGroup": pods.group,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": NODE,
                "image": job.image,
                "#args": "Not 'command', which would replace the image's own first process; that one is to pass SIGTERM on.",
                "args": [
                    literal(argument) if as_it_is else argument for argument, as_it_is in _arguments(name, job, pods)
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
    """Yield the arguments, each with whether it is to arrive as it is; the other is a variable that Kubernetes fills in."""
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
    plain = {"PYTHONSAFEPATH": "1"}  # nothing that lies in the working folder is imported in the place of a library
    if pods.cpus is not None:  # processes see all cores of the machine, and would start as many threads
        plain["OMP_NUM_THREADS"] = str(max(1, pods.cpus // job.processes_per_node))
    for variable, value in {**plain, **job.environment}.items():
        yield {"name": variable, "value": literal(value)}
    for variable in job.secrets:
        found = pods.secrets[variable]
        yield {"name": variable, "valueFrom": {"secretKeyRef": {"name": found.secret, "key": found.key}}}


def _resources(job: JobSpec, pods: Pods) -> dict[str, Any]:
    asked = {} if pods.memory is None else {"memory": pods.memory}
    limits = {**asked, **({"nvidia.com/gpu": str(job.processes_per_node)} if job.use_gpus else {})}
    # No limit on processor time: a pod that is throttled for an instant holds up all the others.
    requests = {**asked, **({} if pods.cpus is None else {"cpu": str(pods.cpus)})}
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
            "#": "Loader workers hand batches over in /dev/shm, and NCCL's processes meet there. A pod's own has 64 MiB; this "
            "one may take as much memory as the pod.",
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
    """Return the ConfigMap's name, another for other content: a pod that is started again gets what was submitted."""
    return f"{name}-{hashlib.sha256(pods.config_text.encode()).hexdigest()[:10]}"


def literal(text: str) -> str:
    """Return a text so that it arrives as it is: Kubernetes fills in ``$(NAME)`` in arguments and in variables."""
    return text.replace("$", "$$")


def problems(job: JobSpec, pods: Pods) -> Iterator[Problem]:
    """Yield what Kubernetes would refuse, and what would lose the run."""
    if not job.image:
        yield _problem("--image", "is required: what the pods run")
    if pods.namespace is not None and not _LABEL.fullmatch(pods.namespace):
        yield _problem("--namespace", f"{pods.namespace!r} is no name of a namespace (a-z, 0-9 and -, at most 63)")
    if 0 in (pods.user, pods.group):
        yield _problem("--user", "is root, as whom no pod is to run; give USER:GROUP by number, 1000:1000")
    if pods.runtime is not None:
        if pods.kind is not WorkloadKind.TRAINJOB:
            yield _problem("--runtime", "is what a TrainJob refers to: add --trainjob")
        if not _OBJECT.fullmatch(pods.runtime.name):
            yield _problem("--runtime", f"{pods.runtime.name!r} is no name of a runtime")
    if pods.memory is not None and not _QUANTITY.fullmatch(pods.memory):
        yield _problem("--memory", f"{pods.memory!r} is no quantity of memory, such as 64Gi")
    if len(pods.config_text.encode()) > 1_000_000:
        yield _problem("CONFIG", "has more than a megabyte, which a ConfigMap cannot hold")
    if ":" in str(job.config):
        yield _problem("CONFIG", f"{str(job.config)!r} has a colon, which Kubernetes takes in no path to mount")
    yield from _problems_of_secrets(job, pods)
    yield from _problems_of_volumes(job, pods)


def _problems_of_secrets(job: JobSpec, pods: Pods) -> Iterator[Problem]:
    for variable, found in pods.secrets.items():
        if not _OBJECT.fullmatch(found.secret) or not _SECRET_KEY.fullmatch(found.key):
            yield _problem(
                f"--secret {variable}", f"'{found.secret}/{found.key}' is no name of a Secret and of a key in it"
            )
    for variable in job.secrets:
        if variable in job.environment:
            yield _problem(variable, "is a variable and a secret: leave out --env or --secret")
        elif variable not in pods.secrets:
            what = f"is a secret: keep it in one of the cluster's, and name that: --secret {variable}=SECRET/KEY"
            yield _problem(variable, what)


def _problems_of_volumes(job: JobSpec, pods: Pods) -> Iterator[Problem]:
    seen = set()
    for volume in pods.volumes:
        key = f"--volume {volume.source}:{volume.path}"
        if not volume.path.is_absolute() or ":" in str(volume.path) or ".." in volume.path.parts:
            yield _problem(key, "is to be mounted at an absolute path without colons or '..'")
        if not volume.source.startswith("/") and not _OBJECT.fullmatch(volume.source):
            yield _problem(key, f"{volume.source!r} is neither a claim's name nor an absolute path")
        if volume.path in seen:
            yield _problem(key, "is mounted where another volume is")
        seen.add(volume.path)
    assert job.run_folder is not None
    folder = PurePosixPath(job.run_folder)
    over = [volume for volume in pods.volumes if volume.path in (folder, *folder.parents)]
    if not over or max(over, key=lambda volume: len(volume.path.parts)).read_only:
        what = f"{folder} is on no volume that can be written to, and would end with its pod: --volume CLAIM:{folder.parent}"
        several = ", a claim that all machines can write to (ReadWriteMany)" if job.nodes > 1 else ""
        yield _problem("output", f"{what}{several}")


def _problem(key: str, what: str) -> Problem:
    return Problem("command line", key, what)
