"""What Slurm's variables say about the process that reads them.

SLURM_JOB_ID, SLURM_RESTART_COUNT    tell a restart of this job from another job
SLURM_STEP_NUM_NODES, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_NODEID    what srun has started, and which of it this is
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from launch.cluster_scheduler import ClusterStep, JobIdentity
from runtime.environment import whole_number


@dataclass(frozen=True)
class SlurmStep(ClusterStep):
    """What ``srun`` has started.

    Args:
        node_list: as Slurm writes it: ``n[1-4]``.
        job: its id.
    """

    node_list: str
    job: int


def slurm_job() -> JobIdentity | None:
    """Return the job that this process is part of, or None."""
    job = os.environ.get("SLURM_JOB_ID")
    return JobIdentity(job, whole_number("SLURM_RESTART_COUNT") or 0) if job else None


def slurm_step() -> SlurmStep | None:
    """Return the step that this process is a task of, or None."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    nodes, tasks, rank, node_list, job = (os.environ.get(name, "") for name in names)
    if not node_list or not all(value.isdigit() for value in (nodes, tasks, rank, job)):
        return None
    return SlurmStep(int(nodes), int(tasks), int(rank), node_list, int(job))
