"""``lockstep submit slurm``: a job script, what it needs beside the run, and sbatch."""

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
from launch.options import add_job_options, checked, described, variables
from launch.slurm.script import SlurmOptions, script
from launch.submission_folder import SCRIPT, SECRETS, new_folder, settled, write
from runtime.arguments import count
from runtime.errors import SchedulerError

# What would make the job's srun, or its ranks, take this shell's job for theirs.
_OF_ANOTHER_LAUNCH = ("SLURM_", "SRUN_", "PMI", "LOCKSTEP_LAUNCH", "LOCKSTEP_WORLD_SIZE", "TORCHELASTIC_")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lockstep submit slurm``."""
    add_job_options(parser)
    parser.add_argument("--partition", metavar="NAME", help="default: Slurm's")
    parser.add_argument("--account", metavar="NAME", help="whom the job is charged to")
    parser.add_argument("--qos", metavar="NAME", help="quality of service")
    parser.add_argument("--constraint", metavar="FEATURES", help="what the nodes must have")
    parser.add_argument("--cpus-per-process", metavar="N", type=count, help="cores of each process")
    parser.add_argument(
        "--interface",
        metavar="NAME",
        help="network interface of gloo and NCCL (default: that of the first node's address)",
    )
    parser.add_argument(
        "--container",
        metavar="IMAGE",
        help="image that the processes run in, by srun with pyxis: REGISTRY#NAME:TAG, or a squashfs file",
    )
    parser.add_argument(
        "--container-mount",
        metavar="PATH[:PATH[:ro]]",
        action="append",
        default=[],
        help="what it sees besides this folder and the run folder, such as data; may be given again",
    )
    parser.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="any other option of sbatch, such as --sbatch=--mem=64G; may be given again",
    )


def submit(options: argparse.Namespace) -> int:
    """Write the job's folder and hand its script to sbatch; with ``--dry-run`` print the script."""
    loaded = checked(options)
    given = variables(options.env)
    job = described(loaded, options, given)
    chosen = SlurmOptions(
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
    secrets_file = folder / SECRETS if given.secret else None
    job = replace(job, config=folder / options.config.name, overrides=[*job.overrides, *settled(loaded, folder)])
    module = "runtime.train" if options.container else None
    text = script(job, chosen, python=sys.executable, secrets_file=secrets_file, module=module)
    if options.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise SchedulerError("there is no sbatch here: submit on a machine of the cluster, or look at it by --dry-run")
    write(loaded, job, folder, script=text, secrets=given.secret)
    _tell(job, _sbatch(folder / SCRIPT, job))
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
        raise SchedulerError(f"sbatch refuses {path}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]


def _tell(job: JobSpec, number: str) -> None:
    run = job.run_folder
    print(f"submitted job {number}: {job.name}, {job.nodes} node(s), {job.processes} process(es)")
    print(f"  log:    {run}/logs/slurm-{number}.log    (a file for each rank beneath {run}/logs/slurm-{number}/)")
    print("  follow: lockstep jobs")
    print(f"  stop:   lockstep stop {run}    (saves; scancel {number} saves too, if Slurm gives it the time)")
