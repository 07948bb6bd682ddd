"""The learning rates of a whole run, found without training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from runtime.optimization.schedule import Schedule

_MOST_STEPS = 200_000  # about two seconds


@dataclass
class PlannedRates:
    """The rate of each update.

    Args:
        total: steps of the run; more than there are rates if it is very long.
        rates: by parameter group, then by step; groups of equal rates are told once.
        groups: how many parameter groups each of them stands for.
        marks: steps at which something begins, by what.
    """

    total: int
    rates: list[list[float]]
    groups: list[int]
    marks: dict[int, str] = field(default_factory=dict)


def simulate(schedule: Schedule, *, steps: int, steps_per_epoch: int | None) -> PlannedRates:
    """Drive a schedule through a run in which every update is applied; its optimizer is not used afterwards.

    Args:
        steps: of the whole run.
        steps_per_epoch: None where nobody knows; epochs then do not count.
    """
    rows: list[list[float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch misses the optimizer's steps
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
