"""PBS, as Lockstep asks it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from launch.cluster_scheduler import ClusterScheduler, JobIdentity, QueuedJob
from launch.options import add_job_options, job_spec, load_checked, variables
from launch.submission_folder import SCRIPT, SECRETS, absolute_paths, new_folder, write
from runtime.arguments import count
from runtime.environment import whole_number

from . import queue
from .script import script


class Pbs(ClusterScheduler):
    """Jobs by qsub, which put themselves back into the queue by qrerun."""

    name = "pbs"
    title = "PBS"
    description = "Submit a run to PBS. A job that is preempted, or loses a machine, is requeued."
    queue_command = "qstat"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        add_job_options(parser)
        parser.add_argument("--queue", metavar="NAME", help="default: PBS's")
        parser.add_argument("--cpus-per-process", metavar="N", type=count, default=1, help="cores of each process")

    def submit(self, options: argparse.Namespace) -> int:
        loaded, given = load_checked(options), variables(options.env)
        job = job_spec(loaded, options, given)
        assert job.run_folder is not None
        folder = new_folder(job.run_folder)
        job = replace(
            job, config=folder / options.config.name, overrides=[*job.overrides, *absolute_paths(loaded, folder)]
        )
        text = script(
            job,
            python=sys.executable,
            queue=options.queue,
            cpus_per_process=options.cpus_per_process,
            secrets_file=folder / SECRETS if given.secret else None,
        )
        if options.dry_run:
            print(text, end="")
            return 0
        write(loaded, job, folder, script=text, secrets=given.secret)
        print(f"submitted job {queue.submit(folder / SCRIPT)}: {job.name}")
        return 0

    def queued(self) -> list[QueuedJob]:
        return queue.queued()

    def cancel(self, jobs: Sequence[str]) -> None:
        queue.cancel(jobs)

    def requeue(self, job: str) -> None:
        queue.requeue(job)

    def own_job(self) -> JobIdentity | None:
        job = os.environ.get("PBS_JOBID")
        return JobIdentity(job, whole_number("LOCKSTEP_RESTART") or 0) if job else None
