"""The components of a run, built in order of dependence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.build.builder import Builder
from runtime.build.observers import build_observers
from runtime.build.preparation import RunComponents, prepare
from runtime.build.trackers import build_meter
from runtime.config.file import LoadedConfiguration
from runtime.reporting.meters import TrainingMeter
from runtime.run.evaluations import Evaluations
from runtime.run.services import RunServices
from runtime.run.state_saver import StateSaver
from runtime.run.trainer import Trainer
from runtime.run.training_windows import TrainingWindows
from runtime.strategies import Strategy
from runtime.training.observers import Observer
from runtime.training.triggers import Triggers


@dataclass(frozen=True)
class RunParts:
    """The components of a run: its state and data (``prepared``), and those that operate on them."""

    prepared: RunComponents
    triggers: Triggers
    windows: TrainingWindows
    evaluations: Evaluations
    meter: TrainingMeter
    saver: StateSaver
    trainer: Trainer


def build_parts(
    loaded: LoadedConfiguration,
    builder: Builder,
    strategy: Strategy,
    services: RunServices,
    observers: Sequence[Observer],
    *,
    before: Mapping[str, Any] | None,
) -> RunParts:
    """Build the components of a run. Collective: every rank must call this.

    Args:
        observers: called after those of ``reporting.observers``.
        before: training state of the checkpoint that the run resumes from; inspected, not loaded.

    Raises:
        LockstepError: configuration or data are wrong, or the ranks differ.
    """
    values = loaded.values
    prepared = prepare(loaded, builder, strategy, before, warn=services.reporter.warn, log=services.reporter.message)
    triggers = Triggers(
        values.limit,
        (values.reporting.every, values.evaluation.every, values.checkpoint.every),
        data=prepared.data,
        progress=prepared.state.progress,
        early_stopping=prepared.state.early_stopping,
    )
    windows = TrainingWindows(builder, strategy, prepared, triggers, services)
    services.closing.callback(windows.close)
    evaluations = Evaluations(builder, prepared, strategy, triggers, services)
    meter = build_meter(builder, prepared.state, times=services.times, groups=prepared.groups)
    saver = StateSaver(
        builder,
        strategy,
        prepared,
        services,
        meter=meter,
        evaluations=evaluations,
        windows=windows,
        verify=before is None and values.checks == "on",
    )
    trainer = Trainer(
        prepared.state,
        services,
        seed=values.seed,
        max_grad_norm=values.optimizer.max_grad_norm,
        report_every=values.reporting.every,
        save_every=values.checkpoint.every,
        triggers=triggers,
        stop_consensus=windows.stop_consensus,
        evaluations=evaluations,
        saver=saver,
        meter=meter,
        observers=build_observers(builder.components, observers),
    )
    return RunParts(prepared, triggers, windows, evaluations, meter, saver, trainer)
