"""Collect and save a run's complete state; verify its first checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, get_num_threads, nn

from runtime.build.builder import Builder
from runtime.build.preparation import RunComponents
from runtime.checks.checkpoint import verify_checkpoint
from runtime.checks.objective import coupled_parts
from runtime.code_digests import loaded_code
from runtime.data.batches import Window
from runtime.data.order import SamplerOrder
from runtime.data.training_data import MappedData, StreamedData, gather_reader_states
from runtime.distributed.rank_consistency import compare_values
from runtime.reporting.facts import versions
from runtime.reporting.meters import TrainingMeter
from runtime.run.evaluations import Evaluations
from runtime.run.services import RunServices
from runtime.run.training_windows import TrainingWindows
from runtime.state.module_buffers import places_of
from runtime.strategies import Strategy


class StateSaver:
    """Saves a run's state to its folder. Collective: every rank must call its methods.

    Args:
        windows: provide the states of a stream's readers.
        verify: whether to compare the run's first checkpoint with the running state.
    """

    def __init__(
        self,
        builder: Builder,
        strategy: Strategy,
        prepared: RunComponents,
        services: RunServices,
        *,
        meter: TrainingMeter,
        evaluations: Evaluations,
        windows: TrainingWindows,
        verify: bool,
    ) -> None:
        self._builder, self._strategy, self._folder = builder, strategy, services.folder
        self._data, self._identity, self._state = prepared.data, prepared.fingerprint, prepared.state
        self._meter, self._evaluations, self._windows = meter, evaluations, windows
        self._reporter = services.reporter
        self._of_reading: dict[str, Any] = {"stream": {}, "meter": {}}
        self._compares = builder.values.checks == "on" and strategy.world_size > 1 and strategy.state_io.held_whole
        self._verify_next = verify

    @property
    def prepared(self) -> bool:
        """Whether :meth:`prepare` was called."""
        return self._folder.saving_prepared

    def prepare(self) -> None:
        """Start allocating host buffers for saves, once the optimizer has its state."""
        if not self.prepared:
            self._folder.prepare_saving(self._collector())

    def is_best(self) -> bool:
        """Whether results of this step are among the best of ``checkpoint.best``, so that it must be saved."""
        return self._folder.is_best(self._evaluations.judged_results_of_this_step)

    def save(self) -> None:
        """Save the state, between two steps.

        Raises:
            RanksDifferError: the ranks' weights differ, or they have drawn different samples.
        """
        progress, results = self._state.progress, self._evaluations.results_of_this_step
        if isinstance(self._data, MappedData) and isinstance(self._data.order, SamplerOrder):
            self._windows.stop_consensus.check_drawn()  # save only what all ranks have trained
        if self._compares:
            compare_values(_replicated_tensors(self._state.module), self._strategy.device)
        if isinstance(self._data, StreamedData):
            self._of_reading["stream"] = gather_reader_states(
                self._windows.reader_states, self._data.samples.sharded_by, self._strategy.device
            )
        self._of_reading["meter"] = self._meter.state()
        self.report_written()
        counters: dict[str, Any] = {"step": progress.step, "attempt": progress.attempt, "epoch": progress.epoch}
        judged = self._evaluations.judged or not results
        self._folder.save(self._collector(), results=results, judged=judged, **counters)

    def report_written(self) -> None:
        """Report the digest of the checkpoint that was written last, unless it was reported."""
        written = self._folder.take_written()
        if written is not None and written.digest:
            self._reporter.log_checkpoint(written.path.name, step=written.step, digest=written.digest)

    def verify_first(self, window: Window, *, leaving: bool) -> None:
        """Compare the run's first checkpoint with the running state, unless already done or the process is about to exit.

        Args:
            window: of the last step; its first microbatch is used for the comparison.
        """
        if not self._verify_next or not self._state.progress.updates:
            return
        self._verify_next = False
        if leaving:
            self._reporter.message("The first checkpoint was not verified (the run is being stopped).")
            return

        def saved() -> Path | None:
            self._folder.finish_saving()
            return self._folder.last_saved()

        batch = window.microbatches[0].batch
        verify_checkpoint(
            self._builder,
            self._strategy,
            self._state,
            saved=saved,
            batch=batch,
            warn=self._reporter.warn,
            log=self._reporter.message,
        )

    def _collector(self) -> Callable[[], dict[str, dict[str, Any]]]:
        """Return a function that collects the state. If rank 0 writes sharded state, all ranks collect it here already."""
        if self._strategy.state_io.held_whole or self._strategy.state_io.writers == self._strategy.world_size:
            return self._collected
        collected = self._collected()
        return lambda: collected

    def _collected(self) -> dict[str, dict[str, Any]]:
        state = self._state.collect()
        state["training"] |= {
            "identity": asdict(self._identity),
            "coupled": coupled_parts(self._state.module.objective),
            "preparation": self._builder.sources.preparation,
            "code": loaded_code(self._builder.code, self._identity.configuration),
            **self._of_reading,
            "made_by": {**versions(), "threads": get_num_threads()},
        }
        return state


def _replicated_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and floating-point persistent buffers by name: equal on every rank unless sharded."""
    buffers = [
        (place.name, held) for place in places_of(module) if place.persistent and (held := place.held) is not None
    ]
    floating = [(name, held) for name, held in buffers if held.is_floating_point() and held.itemsize > 1]
    return {name.removeprefix("model."): tensor for name, tensor in [*module.named_parameters(), *floating]}
