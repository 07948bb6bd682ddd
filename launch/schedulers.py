"""The schedulers there are, and which of them has started this process. Imports no torch."""

from __future__ import annotations

from launch.cluster_scheduler import ClusterScheduler, JobIdentity
from launch.kubernetes.scheduler import Kubernetes
from launch.slurm.scheduler import Slurm
from runtime import environment

SCHEDULERS: tuple[ClusterScheduler, ...] = (Slurm(), Kubernetes())


def own_job() -> JobIdentity | None:
    """Return the job that this process is part of: a scheduler's, or else torchrun's."""
    found = next((job for scheduler in SCHEDULERS if (job := scheduler.own_job()) is not None), None)
    if found is None and (agent := environment.launch_agent()) is not None:
        return JobIdentity(*agent)
    return found


def scheduler_of_step() -> ClusterScheduler | None:
    """Return the scheduler of whose step this process is a task, or None."""
    return next((scheduler for scheduler in SCHEDULERS if scheduler.own_step() is not None), None)
