"""Slurm as a :class:`ClusterScheduler`. Slow imports are inside the methods."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from launch.cluster_scheduler import ClusterScheduler, ClusterStep, JobIdentity, QueuedJob
from launch.node_rendezvous import NodeInfo
from launch.slurm.variables import slurm_job, slurm_step


class Slurm(ClusterScheduler):
    """Jobs submitted by sbatch, which requeue themselves with scontrol; recognised in squeue by their comment."""

    name = "slurm"
    title = "Slurm"
    description = (
        "Submit a run to Slurm. Before its time limit, or when preempted, the job saves and is requeued; when "
        "a machine is lost, it is requeued and resumes from the last checkpoint."
    )
    queue_command = "squeue"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See :class:`ClusterScheduler`."""
        from launch.slurm.submit import add_options

        add_options(parser)

    def submit(self, options: argparse.Namespace) -> int:
        """See :class:`ClusterScheduler`."""
        from launch.slurm.submit import submit

        return submit(options)

    def queued(self) -> list[QueuedJob]:
        """See :class:`ClusterScheduler`."""
        from launch.slurm.queue import queued

        return queued()

    def cancel(self, jobs: Sequence[str]) -> None:
        """See :class:`ClusterScheduler`."""
        from launch.slurm.queue import cancel

        cancel(jobs)

    def requeue(self, job: str) -> None:
        """See :class:`ClusterScheduler`."""
        from launch.slurm.requeue import requeue

        requeue(job)

    def own_job(self) -> JobIdentity | None:
        """See :class:`ClusterScheduler`."""
        return slurm_job()

    def own_step(self) -> ClusterStep | None:
        """See :class:`ClusterScheduler`."""
        return slurm_step()

    def own_place(self, *, processes: int, port: int | None) -> NodeInfo | None:
        """See :class:`ClusterScheduler`."""
        from launch.slurm.step import place_in_step

        step = slurm_step()
        return place_in_step(step, processes=processes, port=port) if step is not None else None
