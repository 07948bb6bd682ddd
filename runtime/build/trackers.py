"""Builds the meter of a run's training figures, and the trackers that they are reported to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.build.builder import Builder
from runtime.build.own_trackers import make_own_trackers
from runtime.checkpoints.run_state import RunState
from runtime.config import yaml_file
from runtime.config.file import LoadedConfiguration
from runtime.errors import RunFolderError
from runtime.evaluation.class_results import ClassResults
from runtime.evaluation.metrics import MetricSet
from runtime.reporting.json_lines import JsonLines
from runtime.reporting.meters import PhaseTimes, TrainingMeter
from runtime.reporting.reporter import Reporter
from runtime.reporting.tracker import TrackedRun
from runtime.reporting.trackers import TrackerInputs, make_trackers
from runtime.run_files import RunFiles
from runtime.state.durable_files import replace_file
from runtime.state.shards import in_memory
from runtime.strategies import Strategy
from runtime.training.progress import Progress


def build_meter(builder: Builder, state: RunState, *, times: PhaseTimes, groups: Sequence[str]) -> TrainingMeter:
    """Build the meter that accumulates training figures between two reports.

    Args:
        groups: names of the optimizer's parameter groups.
    """
    metrics = builder.metrics() if builder.values.evaluation.metrics_on_train else {}
    device = state.strategy.device
    return TrainingMeter(
        device,
        state.module.objective,
        MetricSet(metrics, device, ordered=builder.values.determinism == "exact"),
        times,
        groups,
    )


def restore_meter(
    meter: TrainingMeter, training: Mapping[str, Any], configuration: Mapping[str, Any], strategy: Strategy
) -> None:
    """Restore what was accumulated between the last report and a checkpoint.

    Args:
        training: the checkpoint's training state.
        configuration: all keys with their values.
    """
    meter.forget()
    if not training.get("meter"):
        return
    stored = in_memory(training["meter"])
    if training["identity"]["configuration"]["evaluation"] != configuration["evaluation"]:
        stored["metrics"] = []  # the metrics may have changed
    meter.load_state(stored)


def open_trackers(
    reporter: Reporter, loaded: LoadedConfiguration, builder: Builder, progress: Progress, *, run_id: str
) -> None:
    """Open the configured trackers for a reporter, and log the files that exist already. For rank 0.

    Args:
        run_id: constant over all starts of the run.

    Raises:
        RunFolderError: the run folder cannot be written.
    """
    files = RunFiles(loaded.output)
    folder, resolved = files.folder, loaded.resolved()
    preparation = builder.sources.preparation
    try:
        # An absolute code folder: the default, the YAML file's folder, would be the run folder here.
        replace_file(files.config, yaml_file.dump({**resolved, "code": str(loaded.code)}))
        records = JsonLines(files.metrics, resumed_step=progress.step, evaluation_due=progress.evaluation_due)
        if preparation["fitted"] is not None:
            replace_file(files.preprocessing, json.dumps(preparation["fitted"], indent=1))
    except OSError as error:
        raise RunFolderError(f"the run folder {folder} cannot be written: {error.strerror}") from error
    section = loaded.values.evaluation
    inputs = TrackerInputs(
        run=TrackedRun(name=loaded.name, id=run_id, folder=folder, configuration=resolved, step=progress.step),
        section=loaded.values.reporting,
        pictures=section.pictures,
        classes=ClassResults.of(builder.metrics(), section.class_names or preparation["classes"]),
        records=records,
        reporter=reporter,
    )
    own = make_own_trackers(builder.components.below("reporting", "trackers").values(), warn=reporter.warn)
    reporter.open([*make_trackers(inputs), *own], inputs.run)
    reporter.log_artifact("config", files.config, step=progress.step)
    if preparation["fitted"] is not None:
        reporter.log_artifact("preprocessing", files.preprocessing, step=progress.step)
