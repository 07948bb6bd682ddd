"""The training loop: one visible call for each action of a step, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from runtime.checkpoints.run_state import RunState
from runtime.config.types import Interval
from runtime.data.batches import Window
from runtime.distributed.collectives import StopConsensus
from runtime.evaluation.metrics import Result
from runtime.optimization.combined import members
from runtime.randomness import Purpose, derive, seed_everything
from runtime.reporting.meters import TrainingMeter
from runtime.reporting.stragglers import Stragglers
from runtime.run.evaluations import Evaluations
from runtime.run.services import RunServices
from runtime.run.state_saver import StateSaver
from runtime.strategies.placement import to_device
from runtime.strategies.update import Update
from runtime.training.buffers import buffer_rule
from runtime.training.observers import NamedObserver, StepReport, notify
from runtime.training.step_outcomes import StepOutcomes
from runtime.training.stop_reason import StopReason
from runtime.training.triggers import Triggers

_NO_VALUES: Mapping[str, Result] = MappingProxyType({})


class Trainer:
    """Trains step by step, and reports, evaluates and saves after steps. Collective: every rank must call its methods.

    Args:
        state: the state to train.
        seed: of the run.
        max_grad_norm: the gradient is clipped to this 2-norm; None does not clip.
        report_every: interval of training reports.
        save_every: interval of checkpoints, besides those of best results and of a run that stops before its limit.
        observers: called at the end of each step.
    """

    def __init__(
        self,
        state: RunState,
        services: RunServices,
        *,
        seed: int,
        max_grad_norm: float | None,
        report_every: Interval,
        save_every: Interval,
        triggers: Triggers,
        stop_consensus: StopConsensus,
        evaluations: Evaluations,
        saver: StateSaver,
        meter: TrainingMeter,
        observers: Sequence[NamedObserver] = (),
    ) -> None:
        self._state, self._progress, self._schedule = state, state.progress, state.schedule
        self._strategy = state.strategy
        self._seed, self._max_grad_norm = seed, max_grad_norm
        self._report_every, self._save_every = report_every, save_every
        self._triggers, self._stop_consensus = triggers, stop_consensus
        self._evaluations, self._saver, self._meter = evaluations, saver, meter
        self._services, self._observers = services, observers
        self._learning_rates: list[float] = []
        self._stragglers = Stragglers()
        # A third-party optimizer may draw random numbers, which must be equal on every rank.
        self._seeds_updates = not all(type(part).__module__.startswith("torch.") for part in members(state.optimizer))

    def train(self, windows: Iterable[Window]) -> StopReason:
        """Make one step per window until the run's limit or another stop reason; return the reason.

        Raises:
            DivergenceError: a step diverged and the policy is to stop; parameters are unchanged since before it.
            RollbackWanted: a step diverged and the policy is to return to a checkpoint.
        """
        strategy, progress, meter = self._strategy, self._progress, self._meter
        enter = self._services.times.enter  # the watchdog reports it if this rank stops responding
        self._state.module.train()
        meter.start()
        outcomes = self._step_outcomes()
        buffers = buffer_rule(self._state.module, strategy, self._state.buffers.moving, step=progress.step)
        enter("data", progress.step + 1)
        for window in windows:
            step = progress.step + 1
            self._stop_consensus.begin(self._services.stop_requested())
            buffers.begin_step()
            for number, microbatch in enumerate(window.microbatches, start=1):
                seed_everything(derive(self._seed, Purpose.SLOT, progress.step, microbatch.slot), strategy.device)
                batch, filler = to_device(microbatch.batch, strategy.device), microbatch.filler
                with strategy.microbatch(slot=microbatch.slot, last=number == len(window.microbatches)):
                    enter("forward", step)
                    loss = strategy.forward(batch, filler=filler)
                    enter("backward", step)
                    strategy.backward(loss.sum, weight=window.weight or 1.0)
                buffers.end_slot(microbatch.slot)
                if not filler:
                    meter.add(loss, batch, slot=microbatch.slot)
                del loss, batch  # the next forward pass needs the memory

            enter("step", step)
            outcomes.settle()  # of the previous step, if the device decided whether it was applied
            update = self._apply(window)
            buffers.end_step(real_slots=window.real_slots, skipped=update.skipped)
            progress.advance(window)
            outcomes.add(window, update)
            self._services.garbage.after_step(progress.step)

            stopping, reason, values = self._stop_consensus.end(), None, _NO_VALUES
            if stopping or self._is_anything_due(window):  # not after most steps
                outcomes.settle()
                enter("report", step)
                values = self._report(window)
                enter("evaluate", step)
                results = self._evaluate(window)
                if results is not None:
                    self._schedule.after_evaluation(results)
                    self._evaluations.update_early_stopping(results)
                # If the evaluation is still due, all ranks interrupted it in order to stop.
                reason = self._triggers.stop_reason(asked=stopping or progress.evaluation_due)
                enter("save", step)
                self._save(window, reason)
            if self._observers:
                self._observe(window, values, applied=outcomes.applied, stop_reason=reason)
            if reason is not None:
                return reason
            enter("data", step + 1)
        return self._triggers.limit

    def _step_outcomes(self) -> StepOutcomes:
        state = self._state
        return StepOutcomes(
            schedule=state.schedule,
            averaging=state.averaging,
            divergence=state.divergence,
            progress=state.progress,
            meter=self._meter,
        )

    def _apply(self, window: Window) -> Update:
        """Clip and update, unless the step must be skipped."""
        strategy, divergence, progress = self._strategy, self._state.divergence, self._progress
        will_report = self._triggers.is_due(self._report_every, window, ahead=1)
        if will_report or self._observers:
            self._learning_rates = self._schedule.learning_rates  # the schedule changes them after the update
        if will_report:
            self._meter.note_learning_rates(self._learning_rates)
        if window.weight == 0:  # every target is masked, on all ranks
            strategy.discard()
            return Update(skipped=True)
        spike = divergence.spike(lambda: self._meter.slot_losses(window.weight))
        if spike is not None:
            strategy.discard()
            divergence.decide(spike, window, progress.step + 1, spike=True)
            return Update(skipped=True)
        if self._seeds_updates:
            seed_everything(derive(self._seed, Purpose.UPDATE, progress.step), strategy.device)
        return strategy.step(self._max_grad_norm, measure_norm=will_report)

    def _is_anything_due(self, window: Window) -> bool:
        """Whether anything is due after the step just completed; equal on every rank."""
        return not self._saver.prepared or self._triggers.is_anything_due(window)

    def _report(self, window: Window) -> Mapping[str, Result]:
        """Report the meter's figures if due, and return them. Waits for the device."""
        if not self._triggers.is_due(self._report_every, window):
            return _NO_VALUES
        # If the run ends within an interval, the totals stay: a raised limit continues the interval.
        values = self._meter.read(forget=self._triggers.is_due_by_interval(self._report_every, window))
        self._services.reporter.log(values, step=self._progress.step, epoch=window.cursor.epoch + 1, split="train")
        straggling = self._stragglers.message(values, self._meter.seconds)
        if straggling is not None:
            self._services.reporter.message(straggling)
        return values

    def _evaluate(self, window: Window) -> Mapping[str, Result] | None:
        """Evaluate if due; return the results, or None for those that only the end of the run asked for."""
        self._meter.pause()
        results = self._evaluations.after_step(window)
        self._meter.resume()
        return results

    def _save(self, window: Window, reason: StopReason | None) -> None:
        """Save if due, or the results are among the best, or the run ends before its limit."""
        self._saver.prepare()
        best, leaving = self._saver.is_best(), reason is not None and reason.before_limit
        if leaving or best or self._triggers.is_due(self._save_every, window):
            self._services.stop_request.restart_grace_time()  # a save has a grace time of its own
            self._meter.pause()
            self._saver.save()
            self._saver.verify_first(window, leaving=leaving)
            self._meter.resume()

    def _observe(
        self, window: Window, values: Mapping[str, Result], *, applied: bool | None, stop_reason: StopReason | None
    ) -> None:
        """Call the observers with plain values that are already known here, so nothing waits for the device."""
        progress = self._progress
        report = StepReport(
            step=progress.step,
            epoch=progress.epoch,
            batch=window.cursor.batch + 1,
            attempt=progress.attempt,
            rank=self._strategy.rank,
            samples=window.samples,
            weight=window.weight,
            epoch_ends=window.epoch_ends,
            applied=applied,
            learning_rates=tuple(self._learning_rates),
            figures=dict(values),
            results=dict(self._evaluations.results_of_this_step),
            stop_reason=stop_reason,
        )
        notify(self._observers, report)
