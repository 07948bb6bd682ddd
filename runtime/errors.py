"""Everything that can go wrong for a user, as one tree.

LockstepError                     one clear message, never a traceback; ``exit_code`` says how a process ends
 ├── ConfigurationError           mistakes in the YAML or on the command line, all at once (exit code 2)
 ├── MissingDependencyError       an optional package is asked for and not installed (exit code 2)
 ├── WorldSizeError               the processes that run are not the ones that were asked for (exit code 2)
 ├── RunFolderError               the run folder belongs to another run, or cannot be written
 ├── CheckpointError              a checkpoint is damaged, of another format or of another run
 ├── DataError                    a data set is empty, inconsistent, or raised while it was read
 ├── ObjectiveError               the loss or its weight is not what the contract says
 │    └── ForwardError            the user's model or objective raised when it was called
 ├── GradientError                gradients were not summed over the ranks, so no update can be made of them
 ├── DivergenceError              a step's gradient is not finite or its loss jumped, or the learning rate is not finite
 ├── OutOfMemoryError             a rank's device has no memory left; says what would fit
 ├── OpenFilesError               a process has as many files open as it may
 ├── RendezvousError                 the machines of one launch do not come together, or were started differently
 ├── RanksDifferError             the ranks were started with different configuration, code, data or versions
 ├── EvaluationError              evaluation did not see every sample once
 │    └── MetricError             a metric refused its input
 ├── SchedulerError               a cluster's scheduler is missing, refuses a job, or does not answer
 ├── ObserverError                an observer raised (train(observers=…), reporting.observers)
 ├── PredictionError              predictions cannot be written where, or into what, they are to go
 └── PeerError                    another rank left; its own message tells why
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class LockstepError(Exception):
    """Base of every error that is told to a user as one message."""

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
        extra: the extra of ``lockstep-train`` that brings it.
    """

    exit_code = 2

    def __init__(self, package: str, needed_for: str, extra: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed: "
            f"pip install 'lockstep-train[{extra}]' (or pip install {package})"
        )


class WorldSizeError(LockstepError):
    """The world size is not the one that was asked for."""

    exit_code = 2


class RunFolderError(LockstepError):
    """The run folder cannot be used by this run."""


class CheckpointError(LockstepError):
    """A checkpoint cannot be written or read."""


class DataError(LockstepError):
    """A data set cannot be used, or raised while it was read."""


class ObjectiveError(LockstepError):
    """An objective broke the loss contract."""


class GradientError(LockstepError):
    """A step's gradients are not the global batch's."""


class ForwardError(ObjectiveError):
    """The user's model or objective raised when it was called."""


class DivergenceError(LockstepError):
    """Training went astray; parameters are as they were before the step that showed it."""


class OutOfMemoryError(LockstepError):
    """A rank's device has no memory left."""


class OpenFilesError(LockstepError):
    """A process has as many files open as it may (``ulimit -n``)."""


class RanksDifferError(LockstepError):
    """The ranks were not started alike."""


class RendezvousError(LockstepError):
    """The machines of one launch did not come together."""


class EvaluationError(LockstepError):
    """An evaluation is not exact, or a metric refused its input."""


class MetricError(EvaluationError):
    """A metric refused its input.

    Args:
        metric: its name in the configuration.
        message: what it was given, and why it refused.
    """

    def __init__(self, metric: str, message: str) -> None:
        self.metric = metric
        super().__init__(message)


class ObserverError(LockstepError):
    """An observer of the user's raised. On one rank, as a rule: each calls its own."""


class PredictionError(LockstepError):
    """Predictions cannot be written where, or into what, they are to go."""


class SchedulerError(LockstepError):
    """A cluster's scheduler cannot be used, or does not do what it was asked."""


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
"""What every rank raises at the same place, so that rank 0 tells it for all."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came of, which other code may have caught and raised anew."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
