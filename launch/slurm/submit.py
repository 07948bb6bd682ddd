"""``lockstep submit slurm``: a job script, what it needs beside the run, and sbatch.

In the run folder a submission leaves ``jobs/TIME/`` with ``job.sh``, the YAML, ``code/`` (a copy), ``submission.json`` and
``changes.diff`` (what was not committed), and secret variables in a file for its owner alone, which goes when the job is done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.code_copy import revision, snapshot
from launch.job import JobSpec
from launch.options import Variables, add_job_options, checked, count, described, variables
from launch.slurm.script import SlurmOptions, script, secrets_text
from runtime.config.file import LoadedConfiguration
from runtime.errors import SchedulerError
from runtime.run_files import RunFiles

# What would make the job's srun, or its ranks, take this shell's job for theirs.
_OF_ANOTHER_LAUNCH = ("SLURM_", "SRUN_", "PMI", "LOCKSTEP_LAUNCH", "LOCKSTEP_WORLD_SIZE", "TORCHELASTIC_")


def add(schedulers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lockstep submit slurm``."""
    parser = schedulers.add_parser(
        "slurm",
        help="submit to Slurm",
        description="Submit a run to Slurm. Before its time limit, or preempted, the job saves and goes back to the queue; "
        "when a machine is lost, it goes on from the last checkpoint.",
    )
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
    parser.set_defaults(run=_submit)


def _submit(options: argparse.Namespace) -> int:
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
    folder = RunFiles(job.run_folder).jobs / time.strftime("%Y%m%d-%H%M%S")
    secrets_file = folder / "secrets" if given.secret else None
    job = replace(job, config=folder / options.config.name, overrides=[*job.overrides, *_settled(loaded, folder)])
    module = "runtime.train" if options.container else None
    text = script(job, chosen, python=sys.executable, secrets_file=secrets_file, module=module)
    if options.dry_run:
        print(text, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise SchedulerError("there is no sbatch here: submit on a machine of the cluster, or look at it by --dry-run")
    _write(loaded, job, folder, text=text, given=given)
    _tell(job, _sbatch(folder / "job.sh", job))
    return 0


def _settled(loaded: LoadedConfiguration, folder: Path) -> list[str]:
    """Return overrides that say where things are which the YAML says relative to itself, since it is a copy that is read."""
    found = [f"code={json.dumps(str(folder / 'code'))}"]  # JSON's text is YAML's, whatever is in it
    if (weights := loaded.values.model.weights) is not None:
        found.append(f"model.weights.file={json.dumps(str(loaded.beside(weights.file).absolute()))}")
    return found


def _write(loaded: LoadedConfiguration, job: JobSpec, folder: Path, *, text: str, given: Variables) -> None:
    """Put beside the run what the job needs; take it away again if that cannot be done whole."""
    assert loaded.source is not None
    try:
        folder.mkdir(parents=True)
        RunFiles(folder.parent.parent).logs.mkdir(exist_ok=True)  # Slurm makes no folder for a log
        snapshot(loaded, folder / "code")
        shutil.copyfile(loaded.source, job.config)
        state = revision(loaded.code)
        if state.changes:
            (folder / "changes.diff").write_bytes(state.changes)
        if given.secret:
            with os.fdopen(os.open(folder / "secrets", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets_text(dict(given.secret)))
        (folder / "job.sh").write_text(text)
        record = {
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": str(loaded.source.resolve()),
            "overrides": list(job.overrides),
            "nodes": job.nodes,
            "processes": job.processes,
            "commit": state.commit,
            "changes": "cut" if state.cut else "whole" if state.changes else "none",
        }
        (folder / "submission.json").write_text(json.dumps(record, indent=2) + "\n")
    except FileExistsError as error:
        raise SchedulerError(f"{folder} is there already: another submission of the same second; try again") from error
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SchedulerError(f"what is submitted cannot be written to {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sbatch(path: Path, job: JobSpec) -> str:
    """Submit a script; return the job's id."""
    kept: dict[str, Any] = {
        name: value
        for name, value in os.environ.items()
        if (name not in job.secrets and not name.startswith(_OF_ANOTHER_LAUNCH)) or name == "SLURM_CONF"
    }
    done = subprocess.run(["sbatch", "--parsable", str(path)], env=kept, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        (path.parent / "secrets").unlink(missing_ok=True)
        raise SchedulerError(f"sbatch refuses {path}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]


def _tell(job: JobSpec, number: str) -> None:
    run = job.run_folder
    print(f"submitted job {number}: {job.name}, {job.nodes} node(s), {job.processes} process(es)")
    print(f"  log:    {run}/logs/slurm-{number}.log    (a file for each rank beneath {run}/logs/slurm-{number}/)")
    print("  follow: lockstep jobs")
    print(f"  stop:   lockstep stop {run}    (saves; scancel {number} saves too, if Slurm gives it the time)")
