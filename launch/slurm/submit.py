"""``lockstep submit slurm``: write a job script and its folder, and run sbatch."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.job import JobSpec
from launch.options import add_job_options, job_spec, load_checked, variables
from launch.slurm.script import SlurmOptions, script
from launch.submission_folder import SCRIPT, SECRETS, absolute_paths, new_folder, write
from runtime.arguments import count
from runtime.errors import SchedulerError

# Variables of a job that this shell belongs to, which would mislead the new job's srun or ranks.
_OF_ANOTHER_LAUNCH = ("SLURM_", "SRUN_", "PMI", "LOCKSTEP_LAUNCH", "LOCKSTEP_WORLD_SIZE", "TORCHELASTIC_")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lockstep submit slurm``."""
    add_job_options(parser)
    parser.add_argument("--partition", metavar="NAME", help="default: Slurm's")
    parser.add_argument("--account", metavar="NAME", help="account to charge")
    parser.add_argument("--qos", metavar="NAME", help="quality of service")
    parser.add_argument("--constraint", metavar="FEATURES", help="features that the nodes must have")
    parser.add_argument("--cpus-per-process", metavar="N", type=count, help="cores per process")
    parser.add_argument(
        "--interface",
        metavar="NAME",
        help="network interface for gloo and NCCL (default: the one to the first node's address)",
    )
    parser.add_argument(
        "--container",
        metavar="IMAGE",
        help="image that the processes run in, with the pyxis plugin: REGISTRY#NAME:TAG, or a squashfs file",
    )
    parser.add_argument(
        "--container-mount",
        metavar="PATH[:PATH[:ro]]",
        action="append",
        default=[],
        help="mount in addition to this folder and the run folder, such as data; repeatable",
    )
    parser.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="any other option of sbatch, such as --sbatch=--mem=64G; repeatable",
    )


def submit(options: argparse.Namespace) -> int:
    """Write the submission's folder and run sbatch on its script; with ``--dry-run`` print the script."""
    loaded = load_checked(options)
    job_variables = variables(options.env)
    job = job_spec(loaded, options, job_variables)
    slurm_options = SlurmOptions(
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        constraint=options.constraint,
        cpus_per_process=options.cpus_per_process,
        interface=options.interface,
        container=options.container,
        mounts=options.container_mount,
        extra=options.sbatch,
    )
    assert job.run_folder is not None
    folder = new_folder(job.run_folder)
    secrets_file = folder / SECRETS if job_variables.secret else None
    job = replace(job, config=folder / options.config.name, overrides=[*job.overrides, *absolute_paths(loaded, folder)])
    module = "runtime.train" if options.container else None
    text = script(job, slurm_options, python=sys.executable, secrets_file=secrets_file, module=module)
    if options.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise SchedulerError(
            "sbatch is not installed here: submit on a machine of the cluster, or print the script with --dry-run"
        )
    write(loaded, job, folder, script=text, secrets=job_variables.secret)
    _print_submitted(job, _sbatch(folder / SCRIPT, job))
    return 0


def _sbatch(path: Path, job: JobSpec) -> str:
    """Submit a script; return the job's id."""
    kept: dict[str, Any] = {
        name: value
        for name, value in os.environ.items()
        if (name not in job.secrets and not name.startswith(_OF_ANOTHER_LAUNCH)) or name == "SLURM_CONF"
    }
    done = subprocess.run(["sbatch", "--parsable", str(path)], env=kept, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        (path.parent / SECRETS).unlink(missing_ok=True)
        raise SchedulerError(f"sbatch rejected {path}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]


def _print_submitted(job: JobSpec, number: str) -> None:
    run = job.run_folder
    print(f"submitted job {number}: {job.name}, {job.nodes} node(s), {job.processes} process(es)")
    print(f"  log:    {run}/logs/slurm-{number}.log    (one file per rank in {run}/logs/slurm-{number}/)")
    print("  follow: lockstep jobs")
    print(
        f"  stop:   lockstep stop {run}    (saves a checkpoint; scancel {number} does too if Slurm allows enough time)"
    )
