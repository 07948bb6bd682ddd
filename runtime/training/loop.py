"""The training loop and nothing else: one visible call for each thing that happens, in an order that never changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from runtime.data.batches import Window
from runtime.distributed.collectives import Agreement
from runtime.evaluation.metrics import Result
from runtime.optimization.schedule import Schedule
from runtime.randomness import Purpose, derive, seed_everything
from runtime.reporting.meters import PhaseTimes, TrainingMeter
from runtime.strategies import Strategy, Update
from runtime.training.buffers import BufferRule
from runtime.training.divergence import Divergence
from runtime.training.garbage import GarbageCollection
from runtime.training.progress import Progress
from runtime.training.step_outcomes import Verdicts


@dataclass(frozen=True)
class Parts:
    """What the loop drives. The callables are told the progress and are called on every rank.

    Args:
        seeds_updates: whether an update may draw random numbers, which are then the same on every rank.
        stop_wished: whether this process was asked to stop.
        will_report: tells, before a step is counted, whether figures will be due after it; equal on all ranks.
        is_due: tells, after a step was counted, whether anything follows it; equal on all ranks.
        report: tells the meter's figures, if they are due.
        evaluate: evaluates, if it is due, and returns the results if they may decide how the run goes on; sets
            ``progress.evaluation_due`` if it was cut short.
        enough: judges results for early stopping and tells whether the run is to end; equal on all ranks.
        save: saves, if it is due or the run is being left.
    """

    seed: int
    max_grad_norm: float | None
    strategy: Strategy
    schedule: Schedule
    buffers: BufferRule
    divergence: Divergence
    verdicts: Verdicts
    progress: Progress
    agreement: Agreement
    meter: TrainingMeter
    garbage: GarbageCollection
    times: PhaseTimes
    seeds_updates: bool
    stop_wished: Callable[[], bool]
    will_report: Callable[[Window], bool]
    is_due: Callable[[Window], bool]
    report: Callable[[Window], None]
    evaluate: Callable[[Window], dict[str, Result] | None]
    enough: Callable[[dict[str, Result]], bool]
    save: Callable[[Window, bool], None]


def train(windows: Iterable[Window], parts: Parts) -> Literal["finished", "stopped"]:
    """Consume windows until the limit, or until the ranks agree to stop. Collective: every rank must call this.

    Raises:
        DivergenceError: a step went wrong and the policy is to stop; parameters are as they were before it.
        RollbackWanted: a step went wrong and the policy is to return to a checkpoint.
    """
    strategy, buffers, progress, meter = parts.strategy, parts.buffers, parts.progress, parts.meter
    verdicts = parts.verdicts
    enter = parts.times.enter  # says where this rank is, should it fall silent
    enter("data", progress.step + 1)
    for window in windows:
        step = progress.step + 1
        parts.agreement.begin(parts.stop_wished())
        buffers.begin_step()
        for number, microbatch in enumerate(window.microbatches, start=1):
            seed_everything(derive(parts.seed, Purpose.SLOT, progress.step, microbatch.slot), strategy.device)
            batch, filler = strategy.to_device(microbatch.batch), microbatch.filler
            with strategy.microbatch(last=number == len(window.microbatches)):
                enter("forward", step)
                loss = strategy.forward(batch, filler=filler)
                enter("backward", step)
                strategy.backward(loss.sum, weight=window.weight or 1.0)
            buffers.end_slot(filler=filler)
            if not filler:
                meter.add(loss, batch)
            del loss, batch  # the next forward pass needs the memory

        enter("step", step)
        verdicts.settle()  # of the step before, where the device decided
        update = _apply(window, parts)
        buffers.end_step(real_slots=window.real_slots, skipped=update.skipped)
        progress.advance(window)
        verdicts.add(window, update)
        parts.garbage.after_step(progress.step)

        leaving = parts.agreement.end()
        if not leaving and not parts.is_due(window):  # as behind most steps
            enter("data", step + 1)
            continue
        verdicts.settle()
        enter("report", step)
        parts.report(window)
        enter("evaluate", step)
        results = parts.evaluate(window)
        enough = False
        if results is not None:
            parts.schedule.after_evaluation(results)
            enough = parts.enough(results)
        leaving |= progress.evaluation_due  # all ranks left the evaluation early, to leave
        enter("save", step)
        parts.save(window, leaving or enough)
        if enough:
            return "finished"
        if leaving:
            return "stopped"
        enter("data", step + 1)
    return "finished"


def _apply(window: Window, parts: Parts) -> Update:
    strategy, divergence = parts.strategy, parts.divergence
    will_report = parts.will_report(window)
    if will_report:
        parts.meter.note_learning_rates(parts.schedule.learning_rates)  # the schedule goes on behind the update
    if window.weight == 0:  # every target is masked: there is nothing to learn, on any rank
        strategy.discard()
        return Update(skipped=True)
    spike = divergence.spike(lambda: parts.meter.step_loss(window.weight))
    if spike is not None:
        strategy.discard()
        divergence.decide(spike, window, parts.progress.step + 1, spike=True)
        return Update(skipped=True)
    if parts.seeds_updates:
        seed_everything(derive(parts.seed, Purpose.UPDATE, parts.progress.step), strategy.device)
    return strategy.step(parts.max_grad_norm, measure_norm=will_report)
