"""The trackers that Lockstep brings, one row each: name to what makes it of a run, or None where it is not wanted.

A further one is a class in a file of its own and a row here, with a key in ``runtime/config/reporting.py`` if it has settings.
A user's own needs neither: ``reporting.trackers`` in the YAML names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.config.reporting import ReportingSection
from runtime.evaluation.class_results import ClassResults
from runtime.reporting.console import ConsoleTracker
from runtime.reporting.figures import FiguresTracker
from runtime.reporting.json_lines import JsonLines
from runtime.reporting.reporter import Reporter
from runtime.reporting.tracker import TrackedRun, Tracker


@dataclass(frozen=True, kw_only=True)
class TrackerInputs:
    """What a tracker can be made of.

    Args:
        run: the run.
        section: ``reporting`` in the YAML.
        pictures: whether evaluations are to be drawn.
        classes: finds the results per class.
        records: ``metrics.jsonl``, which was opened before all others since without it there is no run.
        reporter: takes warnings, and passes on to every tracker what one of them makes.
    """

    run: TrackedRun
    section: ReportingSection
    pictures: bool
    classes: ClassResults
    records: JsonLines
    reporter: Reporter


def _console(given: TrackerInputs) -> Tracker:
    return ConsoleTracker(progress=given.section.progress, classes=given.classes, earlier=given.records.earlier)


def _figures(given: TrackerInputs) -> Tracker:
    run, reporter = given.run, given.reporter
    return FiguresTracker(
        run.folder, given.classes, pictures=given.pictures, resumed_step=run.step, warn=reporter.warn, others=reporter
    )


def _wandb(given: TrackerInputs) -> Tracker | None:
    if given.section.wandb is None:
        return None
    from runtime.reporting.wandb_tracker import WandbTracker

    return WandbTracker(given.section.wandb, warn=given.reporter.warn, classes=given.classes)


TRACKERS: dict[str, Callable[[TrackerInputs], Tracker | None]] = {
    "console": _console,
    "metrics.jsonl": lambda given: given.records,
    "figures": _figures,
    "wandb": _wandb,
}
"""They are called in this order."""


def make_trackers(given: TrackerInputs) -> list[Tracker]:
    """Make those trackers of the table that are wanted."""
    return [tracker for make in TRACKERS.values() if (tracker := make(given)) is not None]
