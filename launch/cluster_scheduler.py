"""What Lockstep asks of a cluster's scheduler. A further one is a folder beside ``slurm/`` and a row in ``schedulers.py``."""

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
    """The job that a process is part of.

    Args:
        job: its id, the same after a restart.
        restart: how often it was started again.
    """

    job: str
    restart: int


@dataclass(frozen=True)
class ClusterStep:
    """Tasks that a scheduler has started together, of which this process is one.

    Args:
        nodes: machines.
        tasks: on all of them.
        node_rank: of this task's machine, from 0.
    """

    nodes: int
    tasks: int
    node_rank: int


@dataclass(frozen=True)
class QueuedJob:
    """A job of one's own that Lockstep submitted, as its scheduler describes it.

    Args:
        number: its id.
        state: such as ``RUNNING``, in the scheduler's own word.
        elapsed: time of the present start; ``limit``: the longest time of one. Both as the scheduler writes them.
        nodes: how many machines.
        reason: why it waits.
        run: the run folder.
        waiting: whether it has not begun, or has gone back to the queue.
        active: whether it waits, runs or ends, rather than has ended.
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
        """Return what scripts are told of it."""
        shown = {name: value for name, value in asdict(self).items() if name not in ("waiting", "active")}
        return {**shown, "run": str(self.run)}


class ClusterScheduler:
    """One scheduler. It can at least submit; what it leaves out does not apply to it, and the commands do without.

    Importing its module must be quick: it is done on every rank, and on machines without torch.

    Attributes:
        name: of ``lockstep submit NAME``.
        title: as people write it.
        description: of what it does with a run, for ``--help``.
        queue_command: the program that lists its queue; where it is not installed, the queue is not asked. Empty: none.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    description: ClassVar[str]
    queue_command: ClassVar[str] = ""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of ``lockstep submit NAME``, those that all schedulers have in common among them."""
        raise NotImplementedError

    def submit(self, options: argparse.Namespace) -> int:
        """Submit the run that the options describe, or print what would be submitted; return the exit code.

        Raises:
            ConfigurationError: mistakes in the YAML or the options.
            SchedulerError: the scheduler refuses it, or is not there.
        """
        raise NotImplementedError

    @property
    def has_queue(self) -> bool:
        """Whether its queue can be asked on this machine."""
        return bool(self.queue_command) and shutil.which(self.queue_command) is not None

    def queued(self) -> list[QueuedJob]:
        """Return one's own jobs that Lockstep submitted, also those ended ones that the scheduler still remembers.

        Raises:
            SchedulerError: it does not answer.
        """
        return []

    def cancel(self, jobs: Sequence[str]) -> None:
        """Take jobs out of the queue for good."""
        raise SchedulerError(f"jobs of {self.title} are not cancelled from here")

    def requeue(self, job: str) -> None:
        """Put a job back into the queue; for the job itself, when it ends.

        Raises:
            SchedulerError: the scheduler refuses.
        """
        raise SchedulerError(f"{self.title} starts jobs again by itself")

    def own_job(self) -> JobIdentity | None:
        """Return the job that this process is part of, or None if this scheduler has not started it."""
        return None

    def own_step(self) -> ClusterStep | None:
        """Return the step that this process is a task of, or None."""
        return None

    def own_place(self, *, processes: int, port: int | None) -> NodeInfo | None:
        """Return this machine's place among those of the step; None where it is on its own.

        Args:
            processes: on each machine.
            port: on the first machine. Default: one that another job would not take.

        Raises:
            ConfigurationError: the step makes no place for this task.
            SchedulerError: the scheduler does not say where the first machine is.
        """
        return None
