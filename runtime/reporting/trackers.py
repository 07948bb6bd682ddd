"""Table of the built-in trackers: name to a function that constructs the tracker, or returns None where it is not configured.

To add one, write a class in a separate file and a row here, and a key in ``runtime/config/reporting.py`` if it has settings.
A user's tracker needs neither: it is listed in ``reporting.trackers`` in the YAML.
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
    """Inputs for constructing a tracker.

    Args:
        run: the run.
        section: ``reporting`` in the YAML.
        pictures: whether to draw figures of evaluations.
        classes: extracts the results per class.
        records: ``metrics.jsonl``, opened before all others because a run requires it.
        reporter: receives warnings, and forwards files made by one tracker to all.
    """

    run: TrackedRun
    section: ReportingSection
    pictures: bool
    classes: ClassResults
    records: JsonLines
    reporter: Reporter


def _console(inputs: TrackerInputs) -> Tracker:
    return ConsoleTracker(progress=inputs.section.progress, classes=inputs.classes, earlier=inputs.records.earlier)


def _figures(inputs: TrackerInputs) -> Tracker:
    run, reporter = inputs.run, inputs.reporter
    return FiguresTracker(
        run.folder, inputs.classes, pictures=inputs.pictures, resumed_step=run.step, warn=reporter.warn, others=reporter
    )


def _wandb(inputs: TrackerInputs) -> Tracker | None:
    if inputs.section.wandb is None:
        return None
    from runtime.reporting.wandb_tracker import WandbTracker

    return WandbTracker(inputs.section.wandb, warn=inputs.reporter.warn, classes=inputs.classes)


TRACKERS: dict[str, Callable[[TrackerInputs], Tracker | None]] = {
    "console": _console,
    "metrics.jsonl": lambda inputs: inputs.records,
    "figures": _figures,
    "wandb": _wandb,
}
"""In the order in which they are called."""


def make_trackers(inputs: TrackerInputs) -> list[Tracker]:
    """Construct the configured trackers of the table."""
    return [tracker for make in TRACKERS.values() if (tracker := make(inputs)) is not None]
