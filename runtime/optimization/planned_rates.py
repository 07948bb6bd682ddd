"""The learning rates of a whole run, simulated without training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from runtime.optimization.schedule import Schedule

_MOST_STEPS = 200_000  # about two seconds


@dataclass
class PlannedRates:
    """The rate of each update.

    Args:
        total: steps of the run; more than the number of rates if it is very long.
        rates: by parameter group, then by step; groups with equal rates are listed once.
        groups: for each entry of ``rates``, the number of parameter groups with these rates.
        marks: step to the label of what begins there.
    """

    total: int
    rates: list[list[float]]
    groups: list[int]
    marks: dict[int, str] = field(default_factory=dict)


def simulate(schedule: Schedule, *, steps: int, steps_per_epoch: int | None) -> PlannedRates:
    """Step a schedule through a run in which every update is applied; its optimizer must not be used afterwards.

    Args:
        steps: of the whole run.
        steps_per_epoch: None if unknown; epochs are then not counted.
    """
    rows: list[list[float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the optimizer was not stepped
        for step in range(1, min(steps, _MOST_STEPS) + 1):
            rows.append(schedule.learning_rates)
            schedule.after_update()
            if steps_per_epoch and step % steps_per_epoch == 0:
                schedule.after_epoch()
    by_group = [list(rates) for rates in zip(*rows, strict=True)]
    distinct: dict[tuple[float, ...], int] = {}
    for rates in by_group:
        distinct[tuple(rates)] = distinct.get(tuple(rates), 0) + 1
    return PlannedRates(steps, [list(rates) for rates in distinct], list(distinct.values()))
