"""The exception hierarchy for errors reported to users.

LockstepError                     one clear message, never a traceback; ``exit_code`` is the process's exit status
 ├── ConfigurationError           mistakes in the YAML or on the command line, all at once (exit code 2)
 ├── MissingDependencyError       an optional package is needed and not installed (exit code 2)
 ├── WorldSizeError               the world size is not the requested one (exit code 2)
 ├── RunFolderError               the run folder belongs to another run, or cannot be written
 ├── CheckpointError              a checkpoint is damaged, of another format or of another run
 ├── DataError                    a data set is empty, inconsistent, or raised while it was read
 ├── ObjectiveError               the loss or its weight violates the loss contract
 │    └── ForwardError            the user's model or objective raised when it was called
 ├── GradientError                gradients were not summed over the ranks, so they cannot be used for an update
 ├── DivergenceError              a step's gradient is not finite or its loss jumped, or the learning rate is not finite
 ├── OutOfMemoryError             a rank's device is out of memory; the message names settings that would fit
 ├── OpenFilesError               a process has reached its limit of open files
 ├── RendezvousError              the rendezvous of the nodes failed, or they were started differently
 ├── RanksDifferError             the ranks were started with different configuration, code, data or versions
 ├── EvaluationError              evaluation did not see every sample once
 │    └── MetricError             a metric refused its input
 ├── SchedulerError               a cluster's scheduler is missing, refuses a job, or does not answer
 ├── ObserverError                an observer raised (train(observers=…), reporting.observers)
 ├── PredictionError              predictions cannot be written to the requested file or format
 └── PeerError                    another rank exited; see that rank's message
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class LockstepError(Exception):
    """Base class of errors reported to the user as one message."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Args:
        where: ``file:line`` of the mistake, or ``command line``.
        key: dotted path of the key, empty for the file as a whole.
        what: what is wrong and what to do.
    """

    where: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.key}: {self.what}" if self.key else f"{self.where}: {self.what}"


class ConfigurationError(LockstepError, ValueError):
    """One or more mistakes in a configuration, listed together."""

    exit_code = 2

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class MissingDependencyError(LockstepError):
    """An optional package is needed and not installed.

    Args:
        package: the package's name on PyPI.
        needed_for: what asked for it, as a noun phrase.
        extra: the extra of ``lockstep-train`` that installs it.
    """

    exit_code = 2

    def __init__(self, package: str, needed_for: str, extra: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed: "
            f"pip install 'lockstep-train[{extra}]' (or pip install {package})"
        )


class WorldSizeError(LockstepError):
    """The world size is not the requested one."""

    exit_code = 2


class RunFolderError(LockstepError):
    """The run folder cannot be used by this run."""


class CheckpointError(LockstepError):
    """A checkpoint cannot be written or read."""


class DataError(LockstepError):
    """A data set cannot be used, or raised while it was read."""


class ObjectiveError(LockstepError):
    """An objective violated the loss contract."""


class GradientError(LockstepError):
    """A step's gradients are not the global batch's."""


class ForwardError(ObjectiveError):
    """The user's model or objective raised when it was called."""


class DivergenceError(LockstepError):
    """Training diverged; parameters are unchanged since before the failing step."""


class OutOfMemoryError(LockstepError):
    """A rank's device is out of memory."""


class OpenFilesError(LockstepError):
    """A process has reached its limit of open files (``ulimit -n``)."""


class RanksDifferError(LockstepError):
    """The ranks were started with different inputs."""


class RendezvousError(LockstepError):
    """The rendezvous of a launch's nodes failed."""


class EvaluationError(LockstepError):
    """An evaluation is not exact, or a metric refused its input."""


class MetricError(EvaluationError):
    """A metric refused its input.

    Args:
        metric: its name in the configuration.
        message: the input, and why it was refused.
    """

    def __init__(self, metric: str, message: str) -> None:
        self.metric = metric
        super().__init__(message)


class ObserverError(LockstepError):
    """A user's observer raised, usually on one rank: each rank calls its own."""


class PredictionError(LockstepError):
    """Predictions cannot be written to the requested file or format."""


class SchedulerError(LockstepError):
    """A cluster's scheduler cannot be used, or did not carry out a request."""


class PeerError(LockstepError):
    """Contact with another rank was lost."""


EQUAL_ON_ALL_RANKS = (
    ConfigurationError,
    MissingDependencyError,
    RunFolderError,
    CheckpointError,
    DivergenceError,
    RanksDifferError,
    PredictionError,
)
"""Errors that every rank raises at the same place, so that rank 0 alone reports them."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its chain of causes and contexts."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
