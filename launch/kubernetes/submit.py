"""``lockstep submit kubernetes``: manifests to review, or to hand to ``kubectl apply``.

The folder that the command is given in stands for ``--workdir`` in the image: CONFIG and the run folder lie below both under
the same path. The YAML travels with the manifests, code and data in the image or on a volume.
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
from launch.options import add_job_options, checked, described, variables
from runtime.arguments import count
from runtime.config.file import LoadedConfiguration
from runtime.errors import ConfigurationError, LockstepError, Problem

_LOGGER = logging.getLogger("lockstep.submit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lockstep submit kubernetes``."""
    add_job_options(parser)
    parser.add_argument(
        "--image", required=True, help="what the pods run: docker/Dockerfile, or one that begins FROM it"
    )
    parser.add_argument(
        "--volume",
        metavar="SOURCE:PATH[:ro]",
        type=volume,
        action="append",
        default=[],
        help="mount a PersistentVolumeClaim, or a folder of the machines (SOURCE begins with /); one must hold the run folder",
    )
    parser.add_argument(
        "--secret",
        metavar="NAME=SECRET[/KEY]",
        type=secret,
        action="append",
        default=[],
        help="a secret variable for the processes, from the cluster's Secret (default KEY: NAME)",
    )
    parser.add_argument("--namespace", help="default: the one that kubectl is set to")
    parser.add_argument("--cpus", metavar="N", type=count, help="processors of each pod, shared out to its processes")
    parser.add_argument("--memory", metavar="SIZE", help="memory of each pod, shared memory included, such as 64Gi")
    parser.add_argument(
        "--user",
        metavar="USER:GROUP",
        type=user,
        default=(1000, 1000),
        help="as whom the processes run, by number (default: 1000:1000, the image's own)",
    )
    parser.add_argument(
        "--workdir",
        metavar="PATH",
        type=PurePosixPath,
        default=PurePosixPath("/workspace"),
        help="folder in the image that this one stands for (default: /workspace)",
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--jobset",
        dest="kind",
        action="store_const",
        const=WorkloadKind.JOBSET,
        default=WorkloadKind.JOB,
        help="make a JobSet, which starts all pods anew when one has failed",
    )
    kinds.add_argument(
        "--trainjob",
        dest="kind",
        action="store_const",
        const=WorkloadKind.TRAINJOB,
        help="make a TrainJob of Kubeflow's Trainer, and the runtime that it refers to",
    )
    parser.add_argument(
        "--runtime",
        metavar="[KIND/]NAME",
        type=training_runtime,
        help="with --trainjob: the runtime that is to be used, a ClusterTrainingRuntime or trainingruntime/NAME of the "
        "namespace; whether pods are started again is its decision (default: one of its own)",
    )
    parser.add_argument("--apply", action="store_true", help="hand the manifests to kubectl (default: print them)")


def volume(text: str) -> Volume:
    """Parse ``SOURCE:PATH[:ro]``."""
    source, _, rest = text.partition(":")
    path, colon, mode = rest.partition(":")
    if not source or not path or (colon and mode != "ro"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form CLAIM:/path or CLAIM:/path:ro")
    return Volume(source, PurePosixPath(path), read_only=bool(mode))


def secret(text: str) -> tuple[str, SecretKey]:
    """Parse ``NAME=SECRET[/KEY]``."""
    name, _, found = text.partition("=")
    secret_name, _, key = found.partition("/")
    if not name or not secret_name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SECRET or NAME=SECRET/KEY")
    return name, SecretKey(secret_name, key or name)


def user(text: str) -> tuple[int, int]:
    """Parse ``USER:GROUP``, both by number."""
    first, _, second = text.partition(":")
    if not (text.isascii() and first.isdigit() and second.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form USER:GROUP by number, such as 1000:1000")
    return int(first), int(second)


def training_runtime(text: str) -> TrainingRuntime:
    """Parse ``[KIND/]NAME``, the kind as kubectl takes it."""
    *kind, name = text.split("/")
    kinds = {kind.lower(): kind for kind in ("ClusterTrainingRuntime", "TrainingRuntime")}
    found = kinds.get("/".join(kind).lower() or "clustertrainingruntime")
    if found is None or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME or trainingruntime/NAME")
    return TrainingRuntime(name, found)


def submit(options: argparse.Namespace) -> int:
    """Print the manifests; with ``--apply`` hand them to kubectl."""
    if options.apply and options.dry_run:
        raise ConfigurationError([Problem("command line", "--apply", "and --dry-run contradict each other")])
    if options.runtime is not None and options.max_requeues is not None:
        what = "is for the installed runtime to say: leave it out, or leave out --runtime"
        raise ConfigurationError([Problem("command line", "--max-requeues", what)])
    if options.time is not None:
        # The run leaves by itself and is continued; a limit of Kubernetes' own would end it for good.
        options.overrides.append(f"limit.time={options.time}s")
    loaded = checked(options)
    job, pods = _job_and_pods(loaded, options)
    text = manifests(job, pods)
    if not options.apply:
        sys.stdout.write(text)
        return 0
    _apply(text, namespace=options.namespace)
    _tell(job, pods)
    return 0


def _job_and_pods(loaded: LoadedConfiguration, options: argparse.Namespace) -> tuple[JobSpec, Pods]:
    """Return the job as it is in the container, and what only Kubernetes is told of it."""
    secrets = dict(options.secret)
    given = variables(options.env)
    asked = {text.partition("=")[0] for text in options.env}
    wanted = sorted({*secrets, *(name for name in asked if is_secret(name))})
    for name in sorted({*given.secret} - {*wanted}):
        _LOGGER.warning("%s is set here and will not be in the pods, but for --secret %s=SECRET", name, name)
    there = described(loaded, options, given)
    assert there.run_folder is not None
    job = replace(
        there,
        config=Path(options.workdir / _below_here(options.config, "CONFIG")),
        run_folder=Path(options.workdir / loaded.output),
        working_folder=Path(options.workdir),
        secrets=wanted,
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


def _below_here(path: Path, key: str) -> PurePosixPath:
    """Return a path relative to the folder that stands for the image's. Links are not followed: the image has none of them."""
    relative = os.path.relpath(path)
    if relative.startswith(".."):
        what = f"is to be below the folder that this is called in, which stands for --workdir in the image: {path}"
        raise ConfigurationError([Problem("command line", key, what)])
    return PurePosixPath(relative)


def _apply(text: str, *, namespace: str | None) -> None:
    """Hand manifests to kubectl, whose own words reach the user.

    Raises:
        LockstepError: there is no kubectl, or it refused them.
    """
    if shutil.which("kubectl") is None:
        raise LockstepError("--apply needs the command kubectl; or leave it out, and apply what is printed elsewhere")
    chosen = [] if namespace is None else ["--namespace", namespace]
    done = subprocess.run(["kubectl", "apply", *chosen, "--filename", "-"], input=text, text=True, check=False)
    if done.returncode:
        raise LockstepError(
            "kubectl did not take the manifests. Where a Job of this name is still there, finished ones included, Kubernetes "
            "does not let it be changed: kubectl delete it first; the run goes on from its folder"
        )


def _tell(job: JobSpec, pods: Pods) -> None:
    name, kind = object_name(job.name), pods.kind
    beside = {
        WorkloadKind.JOB: "service,",
        WorkloadKind.JOBSET: "",
        WorkloadKind.TRAINJOB: "" if pods.runtime else "trainingruntime,",
    }
    made = f"{kind},{beside[kind]}configmap"
    ours = f"app.kubernetes.io/instance={name}"
    selector = f"{ours},batch.kubernetes.io/job-completion-index=0"
    where = "" if pods.namespace is None else f" --namespace {pods.namespace}"
    _LOGGER.info("follow it: kubectl logs%s --follow --selector %s", where, selector)
    patch = f"""kubectl patch{where} {kind} {name} --type merge --patch '{{"spec":{{"suspend":true}}}}'"""
    _LOGGER.info("stop it, saved: %s", patch)
    _LOGGER.info(
        "and go on: the same with false. Remove it, saved: kubectl delete%s %s --selector %s", where, made, ours
    )
