"""Observers: user functions called after each step with a report of plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.config.component import described
from runtime.errors import ObserverError

if TYPE_CHECKING:
    from runtime.evaluation.metrics import Result
    from runtime.training.stop_reason import StopReason


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One step, as known at its end without waiting for the device.

    All fields are plain values and copies, so an observer cannot change the run through them. Each rank reports its own steps;
    except for ``rank`` and the times in ``figures`` the reports are equal on every rank. A step that ends in a rollback or an
    error is not reported. After a rollback step numbers repeat, with a higher ``attempt``.

    Args:
        step: global batches consumed, this one included.
        epoch: of this step, counted from 1.
        batch: number of the global batch within its epoch, counted from 1.
        attempt: how often the run has been rolled back.
        rank: of this process.
        samples: in the whole global batch, over all ranks.
        weight: divisor of the step's loss sum; one for each sum if the objective has several.
        epoch_ends: whether it was the last global batch of its epoch.
        applied: whether the update was applied; None if the device decided and the host does not know yet.
        learning_rates: of the step's update, one for each parameter group of the optimizer.
        figures: the training report, if ``reporting.every`` was due after this step: ``loss`` (mean since the last report),
            ``grad_norm``, ``samples_per_second`` …; else empty.
        results: of the evaluation of the validation data, if there was one after this step; else empty.
        stop_reason: why the run ends after this step; None if it continues.
    """

    step: int
    epoch: int
    batch: int
    attempt: int
    rank: int
    samples: int
    weight: float | tuple[float, ...]
    epoch_ends: bool
    applied: bool | None
    learning_rates: tuple[float, ...]
    figures: Mapping[str, Result]
    results: Mapping[str, Result]
    stop_reason: StopReason | None

    @property
    def loss(self) -> float | None:
        """Mean training loss since the last report, if one was due after this step."""
        return _number(self.figures.get("loss"))

    @property
    def grad_norm(self) -> float | None:
        """2-norm of the step's gradient before clipping, if a report was due after it and the update was applied."""
        return _number(self.figures.get("grad_norm"))


Observer = Callable[[StepReport], object]
"""Called with each step's report; the return value is ignored."""


@dataclass(frozen=True)
class NamedObserver:
    """An observer and its name in messages."""

    name: str
    call: Observer

    @classmethod
    def of(cls, observer: Observer) -> NamedObserver:
        """Name an observer by its module and its own name, or its class's."""
        named = observer if hasattr(observer, "__qualname__") else type(observer)
        return cls(f"{named.__module__}:{named.__qualname__}", observer)


def notify(observers: Sequence[NamedObserver], report: StepReport) -> None:
    """Call observers in order.

    Raises:
        ObserverError: one of them raised. Only this rank knows; like any failure of one rank, it ends the run.
    """
    for observer in observers:
        try:
            observer.call(report)
        except Exception as error:
            raise ObserverError(
                f"the observer {observer.name} raised {described(error)}, after step {report.step}"
            ) from error


def _number(value: Result | None) -> float | None:
    return value if isinstance(value, float) else None
