"""Slurm's environment variables about this process.

SLURM_JOB_ID, SLURM_RESTART_COUNT    distinguish a restart of this job from another job
SLURM_STEP_NUM_NODES, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_NODEID    the step, and this machine's rank in it
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from launch.cluster_scheduler import ClusterStep, JobIdentity
from runtime.environment import whole_number


@dataclass(frozen=True)
class SlurmStep(ClusterStep):
    """A step started by ``srun``.

    Args:
        node_list: nodes in Slurm's notation, such as ``n[1-4]``.
        job: job id.
    """

    node_list: str
    job: int


def slurm_job() -> JobIdentity | None:
    """Return the job that this process belongs to, or None."""
    job = os.environ.get("SLURM_JOB_ID")
    return JobIdentity(job, whole_number("SLURM_RESTART_COUNT") or 0) if job else None


def slurm_step() -> SlurmStep | None:
    """Return the step that this process belongs to, or None."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    nodes, tasks, rank, node_list, job = (os.environ.get(name, "") for name in names)
    if not node_list or not all(value.isdigit() for value in (nodes, tasks, rank, job)):
        return None
    return SlurmStep(int(nodes), int(tasks), int(rank), node_list, int(job))
