"""Yield the windows that a run trains on, from its cursor; unfreezes parameters before an epoch's first window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from runtime.build.builder import Builder
from runtime.build.preparation import RunComponents
from runtime.data.batches import Window
from runtime.data.stream_pieces import ReaderState
from runtime.data.training_data import MappedData, ReadOptions, WindowReader, reader_states_of
from runtime.distributed.collectives import StopConsensus, begin_sum_over_ranks
from runtime.losses.rows import with_rows_checked
from runtime.run.services import RunServices
from runtime.strategies import Strategy
from runtime.training.triggers import Triggers


class TrainingWindows:
    """Reads windows. Collective: every rank must call its methods.

    Attributes:
        stop_consensus: exchanges stop requests between steps, and compares the samples that the ranks have drawn.
    """

    def __init__(
        self,
        builder: Builder,
        strategy: Strategy,
        prepared: RunComponents,
        triggers: Triggers,
        services: RunServices,
    ) -> None:
        self._builder, self._strategy, self._triggers, self._services = builder, strategy, triggers, services
        self._data, self._assignment, self._freezing = prepared.data, prepared.assignment, prepared.freezing
        self._module, self._progress = prepared.state.module, prepared.state.progress
        self._reading: WindowReader | None = None
        self._reader_states: dict[int, ReaderState] = {}
        self._epoch = -1  # of the current step
        self._warmed_up = False
        self.stop_consensus = StopConsensus(
            world_size=strategy.world_size, device=strategy.device, drawn=self._num_drawn
        )

    @property
    def reader_states(self) -> Mapping[int, ReaderState]:
        """States of this rank's readers of a stream, by worker."""
        return self._reader_states if self._reading is None else self._reading.reader_states

    def resume_from(self, training: Mapping[str, Any]) -> None:
        """Restore the readers' states from a checkpoint.

        Args:
            training: the checkpoint's training state.
        """
        self._reading = None
        self._reader_states = reader_states_of(training.get("stream", {}), self._strategy.rank)

    def begin(self) -> Iterator[Window]:
        """Start reading at the run's cursor. The loader's workers live until the next call or :meth:`close`."""
        self._reading = reading = self._read()
        if not self._warmed_up:
            self._strategy.warm_up(reading.filler)
            self._warmed_up = True
        return self._unfrozen(reading)

    def close(self) -> None:
        """End the loader's workers."""
        self._reading = None

    def _read(self) -> WindowReader:
        objective, loader = self._module.objective, self._builder.values.data.loader
        options = ReadOptions(
            assignment=self._assignment,
            make_loader=self._builder.loader(self._strategy.device),
            num_workers=loader.num_workers,
            weigh=None if objective.counts_samples else objective.checked_weight,
            num_weights=objective.num_weights,
            begin_sum=self._begin_sum,
            ahead=lambda: self.stop_consensus.steps_ahead,
            notify=self._services.reporter.message,
        )
        return self._data.read(
            options,
            start=self._progress.cursor,
            stop=self._triggers.limit_from_here(),
            skipped=self._progress.skipped_batches,
            reader_states=self._reader_states,
        )

    def _unfrozen(self, reading: WindowReader) -> Iterator[Window]:
        """Yield windows, after unfreezing the parameters of the window's epoch. Collective."""
        self._epoch = -1
        windows = reading.windows
        if self._data.samples.own_batches:
            windows = with_rows_checked(windows, self._module.objective, self._services.reporter.warn)
        for window in windows:
            changed = window.cursor.epoch != self._epoch and self._freezing.apply(window.cursor.epoch)
            self._epoch = window.cursor.epoch
            if changed:
                self._strategy.rewrap()
                self._strategy.warm_up(reading.filler)
                trainable = sum(p.numel() for p in self._module.parameters() if p.requires_grad)
                self._services.reporter.message(
                    f"epoch {window.cursor.epoch + 1}: {trainable:,} parameters are trained"
                )
            yield window

    def _num_drawn(self) -> int:
        return self._data.order.drawn_until(self._epoch) if isinstance(self._data, MappedData) else 0

    def _begin_sum(self, weights: Tensor) -> Callable[[], Tensor]:
        finish = begin_sum_over_ranks(weights, self._strategy.device)

        def waited() -> Tensor:
            self._services.times.enter("weigh", self._progress.step + 1)  # the ranks wait here for the slowest reader
            total = finish()
            self._services.times.enter("data", self._progress.step + 1)
            return total

        return waited
