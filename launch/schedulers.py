"""The list of schedulers, and which of them started this process. Imports no torch."""

from __future__ import annotations

from launch.cluster_scheduler import ClusterScheduler, JobIdentity
from launch.kubernetes.scheduler import Kubernetes
from launch.slurm.scheduler import Slurm
from runtime import environment

SCHEDULERS: tuple[ClusterScheduler, ...] = (Slurm(), Kubernetes())


def own_job() -> JobIdentity | None:
    """Return the job that this process belongs to: a scheduler's, or else torchrun's."""
    job = next((own for scheduler in SCHEDULERS if (own := scheduler.own_job()) is not None), None)
    if job is None and (agent := environment.launch_agent()) is not None:
        return JobIdentity(*agent)
    return job


def scheduler_of_step() -> ClusterScheduler | None:
    """Return the scheduler whose step this process belongs to, or None."""
    return next((scheduler for scheduler in SCHEDULERS if scheduler.own_step() is not None), None)
