"""What a run's figures are gathered in, and where they go, from the YAML's sections."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.build import components, sources
from runtime.checkpoints.run_state import RunState
from runtime.config import yaml_file
from runtime.config.file import LoadedConfiguration
from runtime.errors import RunFolderError
from runtime.evaluation.class_results import ClassResults
from runtime.evaluation.metrics import MetricSet
from runtime.reporting.console import ConsoleTracker
from runtime.reporting.figures import FiguresTracker
from runtime.reporting.meters import PhaseTimes, TrainingMeter
from runtime.reporting.reporter import JsonLines, Tracker
from runtime.run_files import RunFiles
from runtime.state.durable_files import replace_file
from runtime.state.shards import in_memory
from runtime.strategies import Strategy
from runtime.training.progress import Progress


def build_meter(
    loaded: LoadedConfiguration, state: RunState, *, times: PhaseTimes, groups: Sequence[str]
) -> TrainingMeter:
    """Build what sums up the figures of training between two reports.

    Args:
        groups: names of the optimizer's parameter groups.
    """
    metrics = components.build_metrics(loaded) if loaded.values.evaluation.metrics_on_train else {}
    device = state.strategy.device
    return TrainingMeter(device, state.module.objective, MetricSet(metrics, device), times, groups)


def restore_meter(
    meter: TrainingMeter, training: Mapping[str, Any], loaded: LoadedConfiguration, strategy: Strategy
) -> None:
    """Go on with what was summed since the last report when a checkpoint was made.

    Args:
        training: the checkpoint's training state.
    """
    meter.forget()
    if not training.get("meter"):
        return
    stored = in_memory(training["meter"])
    if training["identity"]["configuration"]["evaluation"] != loaded.resolved()["evaluation"]:
        stored["metrics"] = []  # of other metrics
    meter.go_on_from(stored, rank=strategy.rank, world_size=strategy.world_size)


def build_trackers(
    loaded: LoadedConfiguration, progress: Progress, *, run_id: str, warn: Callable[[str], None]
) -> list[Tracker]:
    """Build what figures go to. For rank 0.

    Args:
        run_id: the same at every start of the run.

    Raises:
        RunFolderError: the run folder cannot be written.
    """
    files = RunFiles(loaded.output)
    folder, reporting, resolved = files.folder, loaded.values.reporting, loaded.resolved()
    try:
        # The code's folder as it is: the one of this file is the run folder.
        replace_file(files.config, yaml_file.dump({**resolved, "code": str(loaded.code)}))
        path, due = files.metrics, progress.evaluation_due
        records = JsonLines(path, resumed_step=progress.step, evaluation_due=due)
        fitted = sources.preparation(loaded)["fitted"]
        if fitted is not None:
            replace_file(folder / "preprocessing.json", json.dumps(fitted, indent=1))
    except OSError as error:
        raise RunFolderError(f"the run folder {folder} cannot be written: {error.strerror}") from error
    section = loaded.values.evaluation
    classes = ClassResults.of(
        components.build_metrics(loaded), section.class_names or sources.preparation(loaded)["classes"]
    )
    figures = FiguresTracker(folder, classes, pictures=section.pictures, resumed_step=progress.step, warn=warn)
    console = ConsoleTracker(progress=reporting.progress, classes=classes, earlier=records.earlier)
    trackers: list[Tracker] = [console, records, figures]
    if reporting.wandb is not None:
        from runtime.reporting.wandb_tracker import WandbTracker

        trackers.append(
            WandbTracker(
                reporting.wandb,
                name=loaded.name,
                run_id=run_id,
                folder=folder,
                configuration=resolved,
                warn=warn,
                classes=classes,
                pictures=figures.pictures,
            )
        )
    return trackers
