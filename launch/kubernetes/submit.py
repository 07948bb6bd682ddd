"""``lockstep submit kubernetes``: print manifests for review, or apply them with kubectl.

The current folder corresponds to ``--workdir`` in the image: CONFIG and the run folder have the same path below both. The
YAML is part of the manifests; code and data are in the image or on a volume.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

from launch.job import JobSpec, is_secret
from launch.kubernetes.manifests import manifests, object_name
from launch.kubernetes.pods import Pods, SecretKey, TrainingRuntime, Volume, WorkloadKind
from launch.options import add_job_options, job_spec, load_checked, variables
from runtime.arguments import count
from runtime.config.file import LoadedConfiguration
from runtime.errors import ConfigurationError, LockstepError, Problem

_LOGGER = logging.getLogger("lockstep.submit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lockstep submit kubernetes``."""
    add_job_options(parser)
    parser.add_argument(
        "--image", required=True, help="image that the pods run: built from docker/Dockerfile, or based on it"
    )
    parser.add_argument(
        "--volume",
        metavar="SOURCE:PATH[:ro]",
        type=volume,
        action="append",
        default=[],
        help="mount a PersistentVolumeClaim, or a folder of the machines (SOURCE starts with /); one must hold the run folder",
    )
    parser.add_argument(
        "--secret",
        metavar="NAME=SECRET[/KEY]",
        type=secret,
        action="append",
        default=[],
        help="secret environment variable for the processes, from a Secret of the cluster (default KEY: NAME)",
    )
    parser.add_argument("--namespace", help="default: kubectl's current namespace")
    parser.add_argument("--cpus", metavar="N", type=count, help="CPUs of each pod, divided among its processes")
    parser.add_argument("--memory", metavar="SIZE", help="memory of each pod, shared memory included, such as 64Gi")
    parser.add_argument(
        "--user",
        metavar="USER:GROUP",
        type=user,
        default=(1000, 1000),
        help="numeric user and group to run as (default: 1000:1000, those of the image)",
    )
    parser.add_argument(
        "--workdir",
        metavar="PATH",
        type=PurePosixPath,
        default=PurePosixPath("/workspace"),
        help="folder in the image that corresponds to the current folder (default: /workspace)",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--jobset",
        dest="kind",
        action="store_const",
        const=WorkloadKind.JOBSET,
        default=WorkloadKind.JOB,
        help="generate a JobSet, which restarts all pods when one fails",
    )
    kinds.add_argument(
        "--trainjob",
        dest="kind",
        action="store_const",
        const=WorkloadKind.TRAINJOB,
        help="generate a TrainJob of Kubeflow's Trainer, and the runtime that it refers to",
    )
    parser.add_argument(
        "--runtime",
        metavar="[KIND/]NAME",
        type=training_runtime,
        help="with --trainjob: installed runtime to use, a ClusterTrainingRuntime or trainingruntime/NAME of the "
        "namespace; it decides whether pods are restarted (default: generate a runtime)",
    )
    parser.add_argument("--apply", action="store_true", help="apply the manifests with kubectl (default: print them)")


def volume(text: str) -> Volume:
    """Parse ``SOURCE:PATH[:ro]``."""
    source, _, rest = text.partition(":")
    path, colon, mode = rest.partition(":")
    if not source or not path or (colon and mode != "ro"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form CLAIM:/path or CLAIM:/path:ro")
    return Volume(source, PurePosixPath(path), read_only=bool(mode))


def secret(text: str) -> tuple[str, SecretKey]:
    """Parse ``NAME=SECRET[/KEY]``."""
    name, _, source = text.partition("=")
    secret_name, _, key = source.partition("/")
    if not name or not secret_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SECRET or NAME=SECRET/KEY")
    return name, SecretKey(secret_name, key or name)


def user(text: str) -> tuple[int, int]:
    """Parse ``USER:GROUP``, both numeric."""
    first, _, second = text.partition(":")
    if not (text.isascii() and first.isdigit() and second.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form USER:GROUP with numbers, such as 1000:1000")
    return int(first), int(second)


def training_runtime(text: str) -> TrainingRuntime:
    """Parse ``[KIND/]NAME``, the kind in any case, as in kubectl."""
    *kind, name = text.split("/")
    kinds = {kind.lower(): kind for kind in ("ClusterTrainingRuntime", "TrainingRuntime")}
    runtime_kind = kinds.get("/".join(kind).lower() or "clustertrainingruntime")
    if runtime_kind is None or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME or trainingruntime/NAME")
    return TrainingRuntime(name, runtime_kind)


def submit(options: argparse.Namespace) -> int:
    """Print the manifests; with ``--apply`` apply them with kubectl."""
    if options.apply and options.dry_run:
        raise ConfigurationError([Problem("command line", "--apply", "and --dry-run contradict each other")])
    if options.runtime is not None and options.max_requeues is not None:
        what = "is decided by the installed runtime: leave out this option or --runtime"
        raise ConfigurationError([Problem("command line", "--max-requeues", what)])
    if options.time is not None:
        # The run stops by itself and is resumed; a deadline of Kubernetes would end it permanently.
        options.overrides.append(f"limit.time={options.time}s")
    loaded = load_checked(options)
    job, pods = _job_and_pods(loaded, options)
    text = manifests(job, pods)
    if not options.apply:
        sys.stdout.write(text)
        return 0
    _apply(text, namespace=options.namespace)
    _log_commands(job, pods)
    return 0


def _job_and_pods(loaded: LoadedConfiguration, options: argparse.Namespace) -> tuple[JobSpec, Pods]:
    """Return the job with paths in the container, and its Kubernetes settings."""
    secrets = dict(options.secret)
    job_variables = variables(options.env)
    named = {text.partition("=")[0] for text in options.env}
    secret_names = sorted({*secrets, *(name for name in named if is_secret(name))})
    for name in sorted({*job_variables.secret} - {*secret_names}):
        _LOGGER.warning("%s is set here but not in the pods; to pass it, add --secret %s=SECRET", name, name)
    local_job = job_spec(loaded, options, job_variables)
    assert local_job.run_folder is not None
    job = replace(
        local_job,
        config=Path(options.workdir / _relative(options.config, "CONFIG")),
        run_folder=Path(options.workdir / loaded.output),
        working_folder=Path(options.workdir),
        secrets=secret_names,
        image=options.image,
    )
    pods = Pods(
        config_text=options.config.read_text(encoding="utf-8"),
        namespace=options.namespace,
        volumes=options.volume,
        secrets=secrets,
        cpus=options.cpus,
        memory=options.memory,
        user=options.user[0],
        group=options.user[1],
        kind=options.kind,
        runtime=options.runtime,
    )
    return job, pods


def _relative(path: Path, key: str) -> PurePosixPath:
    """Return a path relative to the current folder. Links are not followed, since the image does not have them."""
    relative = os.path.relpath(path)
    if relative.startswith(".."):
        what = f"must be below the current folder, which corresponds to --workdir in the image: {path}"
        raise ConfigurationError([Problem("command line", key, what)])
    return PurePosixPath(relative)


def _apply(text: str, *, namespace: str | None) -> None:
    """Apply manifests with kubectl, whose output the user sees.

    Raises:
        LockstepError: kubectl is not installed or failed.
    """
    if shutil.which("kubectl") is None:
        raise LockstepError("--apply needs kubectl, which is not installed; without --apply, the manifests are printed")
    flags = [] if namespace is None else ["--namespace", namespace]
    done = subprocess.run(["kubectl", "apply", *flags, "--filename", "-"], input=text, text=True, check=False)
    if done.returncode:
        raise LockstepError(
            "kubectl failed to apply the manifests. A Job that already exists, even a finished one, cannot be changed: delete "
            "it first with kubectl delete; the run resumes from its folder"
        )


def _log_commands(job: JobSpec, pods: Pods) -> None:
    name, kind = object_name(job.name), pods.kind
    others = {
        WorkloadKind.JOB: "service,",
        WorkloadKind.JOBSET: "",
        WorkloadKind.TRAINJOB: "" if pods.runtime else "trainingruntime,",
    }
    kinds = f"{kind},{others[kind]}configmap"
    instance = f"app.kubernetes.io/instance={name}"
    selector = f"{instance},batch.kubernetes.io/job-completion-index=0"
    where = "" if pods.namespace is None else f" --namespace {pods.namespace}"
    _LOGGER.info("follow: kubectl logs%s --follow --selector %s", where, selector)
    patch = f"""kubectl patch{where} {kind} {name} --type merge --patch '{{"spec":{{"suspend":true}}}}'"""
    _LOGGER.info("save and stop: %s", patch)
    _LOGGER.info(
        "resume: the same with false; save and delete: kubectl delete%s %s --selector %s", where, kinds, instance
    )
