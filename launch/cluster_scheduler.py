"""Interface to a cluster's scheduler. To add one: a folder next to ``slurm/``, and a row in ``schedulers.py``."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from launch.node_rendezvous import NodeInfo
from runtime.errors import SchedulerError


@dataclass(frozen=True)
class JobIdentity:
    """The scheduler's job that this process belongs to.

    Args:
        job: job id, the same after a restart.
        restart: number of restarts so far.
    """

    job: str
    restart: int


@dataclass(frozen=True)
class ClusterStep:
    """Tasks that a scheduler started together, this process among them.

    Args:
        nodes: number of machines.
        tasks: tasks on all machines.
        node_rank: rank of this task's machine, from 0.
    """

    nodes: int
    tasks: int
    node_rank: int


@dataclass(frozen=True)
class QueuedJob:
    """One of the user's jobs that Lockstep submitted, as the scheduler describes it.

    Args:
        number: job id.
        state: the scheduler's name for the state, such as ``RUNNING``.
        elapsed, limit: time since the present start, and time limit of one start, as the scheduler writes them.
        nodes: number of machines.
        reason: why it waits.
        run: the run folder.
        waiting: whether it waits in the queue, requeued jobs included.
        active: whether it has not ended.
    """

    number: str
    state: str
    elapsed: str
    limit: str
    nodes: str
    reason: str
    run: Path
    waiting: bool
    active: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``lockstep jobs --json``."""
        shown = {name: value for name, value in asdict(self).items() if name not in ("waiting", "active")}
        return {**shown, "run": str(self.run)}


class ClusterScheduler:
    """A scheduler. Only ``add_options`` and ``submit`` are required; the commands do without the other methods.

    Its module must be quick to import: it is imported on every rank, and on machines without torch.

    Attributes:
        name: the NAME of ``lockstep submit NAME``.
        title: its name in messages.
        description: text for ``--help``.
        queue_command: program that lists the queue; the queue is read only where it is installed. Empty: none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    queue_command: ClassVar[str] = ""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of ``lockstep submit NAME``, including those common to all schedulers."""
        raise NotImplementedError

    def submit(self, options: argparse.Namespace) -> int:
        """Submit a run, or print what would be submitted; return the exit code.

        Raises:
            ConfigurationError: mistakes in the YAML or the options.
            SchedulerError: the scheduler refuses the run, or is not installed.
        """
        raise NotImplementedError

    @property
    def has_queue(self) -> bool:
        """Whether its queue can be read on this machine."""
        return bool(self.queue_command) and shutil.which(self.queue_command) is not None

    def queued(self) -> list[QueuedJob]:
        """Return the user's jobs that Lockstep submitted, including ended ones that the scheduler still lists.

        Raises:
            SchedulerError: the scheduler does not answer.
        """
        return []

    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel jobs."""
        raise SchedulerError(f"jobs of {self.title} cannot be cancelled with lockstep")

    def requeue(self, job: str) -> None:
        """Put a job back into the queue. Called by the job itself when it ends.

        Raises:
            SchedulerError: the scheduler refuses.
        """
        raise SchedulerError(f"{self.title} restarts jobs automatically")

    def own_job(self) -> JobIdentity | None:
        """Return the job that this process belongs to, or None if this scheduler did not start it."""
        return None

    def own_step(self) -> ClusterStep | None:
        """Return the step that this process belongs to, or None."""
        return None

    def own_place(self, *, processes: int, port: int | None) -> NodeInfo | None:
        """Return this machine's place among those of the step; None if the step has only one machine.

        Args:
            processes: processes on each machine.
            port: port on the first machine. Default: one derived from the job, to avoid conflicts.

        Raises:
            ConfigurationError: the step has several tasks on a machine.
            SchedulerError: the address of the first machine is unknown.
        """
        return None
