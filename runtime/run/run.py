"""One run from configuration to outcome: every part built in order of dependence, and closed in reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

from torch import Tensor

from launch.schedulers import own_job
from runtime.build import components
from runtime.build.preparation import Prepared, prepare, tell_of_component
from runtime.build.trackers import build_meter, open_trackers, restore_meter
from runtime.checkpoints.load import load_state, open_state
from runtime.checkpoints.run_folder import Found, RunFolder
from runtime.checkpoints.run_state import cursor_on_resumption, refuse_misfit
from runtime.checks.first_start import FirstStart, check_first_start
from runtime.checks.objective import mark_coupled
from runtime.code_digests import changes_of, explained_by, warning_of
from runtime.config.file import LoadedConfiguration
from runtime.data.batches import Window
from runtime.data.stream_pieces import Place
from runtime.data.training_data import How, MappedData, Reading, places_of
from runtime.distributed.collectives import Agreement, begin_sum_over_ranks
from runtime.distributed.stopping import StopWish
from runtime.distributed.watchdog import Position
from runtime.errors import LockstepError, OutOfMemoryError
from runtime.evaluation.metrics import Result
from runtime.losses.rows import with_rows_checked
from runtime.model_calls import is_out_of_memory
from runtime.objective import TrainingModule
from runtime.optimization.combined import members
from runtime.optimization.optimizer_eval_mode import end_training
from runtime.reporting.facts import start_facts
from runtime.reporting.meters import PhaseTimes
from runtime.reporting.reporter import Reporter
from runtime.reporting.stragglers import Stragglers
from runtime.run.evaluations import Evaluations
from runtime.run.result import RunResult, model_maker
from runtime.run.state_saver import StateSaver
from runtime.run_files import RunFiles
from runtime.strategies import Strategy
from runtime.training.buffers import buffer_rule
from runtime.training.divergence import RollbackWanted
from runtime.training.fitting import out_of_memory
from runtime.training.garbage import GarbageCollection
from runtime.training.loop import Parts, train
from runtime.training.step_outcomes import Verdicts
from runtime.training.triggers import Milestones


class Run:
    """A run whose processes are up: builds its parts, trains, and leaves everything saved.

    Args:
        loaded: the checked configuration.
        strategy: how the processes share the work.
        stop_wish: set by signals.
        position: told where this rank is.
        notes: lines to report at the start.
    """

    def __init__(
        self, loaded: LoadedConfiguration, strategy: Strategy, stop_wish: StopWish, position: Position, *notes: str
    ) -> None:
        self._loaded = loaded
        self._values = loaded.values
        self._strategy = strategy
        self._stop_wish = stop_wish
        self._position = position
        self._times = PhaseTimes(position)
        self._reporter = Reporter()
        for text in notes:
            self._reporter.message(text)
        self._stragglers = Stragglers()
        self._reading: Reading | None = None
        self._changed_code: list[str] = []
        self._places: dict[int, Place] = {}
        self._garbage = GarbageCollection()
        self._folder = RunFolder(
            loaded.output,
            rank=strategy.rank,
            device=strategy.device,
            section=self._values.checkpoint.model_copy(update={"best": self._values.best}),
            warn=self._warn,
            writers=strategy.world_size if strategy.writes_together else 1,
            timeout_seconds=self._values.limit.stall_seconds,
            job=(job.job, job.restart) if (job := own_job()) is not None else (None, 0),
        )

    def train(self) -> RunResult:
        """Train until the limit or an agreed stop. Collective: every rank must call this."""
        with ExitStack() as stack:
            stack.callback(self._folder.close)
            stack.callback(setattr, self, "_reading", None)  # whose loader's workers end with it
            self._folder.open()
            self._stop_wish.watch_file(RunFiles(self._folder.path).stop)
            found = self._folder.newest(self._values.resume)
            stored = self._read(found) if found is not None else None
            before = stored[1] if stored else None
            prepared = prepare(self._loaded, self._strategy, before, self._warn, self._reporter.message)
            self._freezing = prepared.freezing
            self._data, self._identity, self._sharing = prepared.data, prepared.identity, prepared.sharing
            self._state, self._progress = prepared.state, prepared.state.progress
            self._parameters = prepared.parameters
            values = self._values
            self._milestones = Milestones(
                values.limit,
                (values.reporting.every, values.evaluation.every, values.checkpoint.every),
                data=self._data,
                progress=self._progress,
                early_stopping=self._state.early_stopping,
            )
            self._evaluations = Evaluations(
                self._loaded,
                prepared,
                self._strategy,
                self._milestones,
                reporter=self._reporter,
                times=self._times,
                garbage=self._garbage,
                stop_wished=self._stop_wished,
                closing=stack,
            )
            self._meter = build_meter(self._loaded, prepared.state, times=self._times, groups=prepared.groups)
            if before is not None and "code" in before:
                self._changed_code = changes_of(before["code"], self._loaded.code, self._loaded.resolved())
            if found is not None and stored is not None:
                self._go_on_from(found, stored)
            if found is None:  # before the first record, which names what was found to be inexact
                check_first_start(
                    FirstStart(self._loaded, self._strategy, prepared, self._evaluations.evaluators, self._warn)
                )
            self._open_reporter(stack, prepared)
            self._saver = StateSaver(
                self._loaded,
                self._strategy,
                self._folder,
                prepared,
                meter=self._meter,
                evaluations=self._evaluations,
                unproven=found is None and values.checks == "on",
                tell=self._reporter.message,
                warn=self._warn,
            )
            try:
                return self._train(prepared)
            except LockstepError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise self._out_of_memory(error) from error
                tell_of_component(self._loaded, error, self._state)
                raise

    def leaving_seconds(self) -> float:
        """Return how long before its time is up a run should begin to leave: 1.5 times its longest save, and 2 s."""
        return 1.5 * self._folder.save_seconds + 2.0

    def owns_folder(self) -> bool:
        """Tell whether no other job has taken the run folder over; for rank 0."""
        return self._folder.owned

    def _read(self, found: Found) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's state, of tensors no more than this rank will need."""
        model, training = open_state(found.path) if self._strategy.sharded else load_state(found.path)
        refuse_misfit(training, found.path.name)
        training["progress"]["cursor"] = cursor_on_resumption(training, self._loaded)
        return model, training

    def _go_on_from(self, found: Found, stored: tuple[dict[str, Any], dict[str, Any]]) -> None:
        with explained_by(self._changed_code):
            self._state.restore(*stored)
        mark_coupled(self._state.module.objective, stored[1].get("coupled", []))
        self._state.follow(found.rollbacks)
        self._places = places_of(stored[1].get("stream", {}), self._strategy.rank)
        self._evaluations.go_on_from(found.results, judged=found.judged)
        restore_meter(self._meter, stored[1], self._loaded, self._strategy)

    def _train(self, prepared: Prepared) -> RunResult:
        strategy, progress = self._strategy, self._progress
        module = prepared.state.module
        if progress.evaluation_extra and not self._milestones.over:
            progress.evaluation_due = progress.evaluation_extra = False  # the run no longer ends here
        self._agreement = Agreement(world_size=strategy.world_size, device=strategy.device, drawn=self._drawn)
        self._epoch = -1  # of the step that is being made
        was_over = self._milestones.over and not progress.evaluation_due
        if self._changed_code:
            self._warn(warning_of(self._changed_code, finished=was_over))
        if was_over:
            self._reporter.message(self._milestones.how_to_go_on)
        elif self._values.divergence.rolls_back and progress.step == 0:
            self._save_state()  # so that there is always something to return to
        self._warmed_up = False
        outcome: Literal["finished", "stopped"] | None = None
        with self._garbage:
            while outcome is None:
                if progress.evaluation_due:
                    if not self._evaluations.catch_up():
                        outcome = "stopped"
                        break
                    self._save_state()
                outcome = "finished" if self._milestones.over else self._trained(module)
        if self._milestones.why_early and not was_over:
            self._reporter.message(f"This run is finished: {self._milestones.why_early}.")
        if outcome == "finished" and not self._evaluations.test():
            outcome = "stopped"
        return self._close(outcome)

    def _trained(self, module: TrainingModule) -> Literal["finished", "stopped"] | None:
        """Train on from where the run is; return None where it was rolled back and is to go on from there."""
        try:
            self._reading = self._begin_reading()
            if not self._warmed_up:
                self._strategy.warm_up(self._reading.filler)
                self._warmed_up = True
            module.train()
            return train(self._unfreezing(self._reading), self._parts(module))
        except RollbackWanted as wanted:
            self._roll_back(wanted)
            return None

    def _begin_reading(self) -> Reading:
        objective, loader = self._state.module.objective, self._values.data.loader
        how = How(
            sharing=self._sharing,
            make_loader=components.build_loader(self._loaded, self._strategy.device),
            num_workers=loader.num_workers,
            weigh=None if objective.counts_samples else objective.checked_weight,
            num_weights=objective.num_weights,
            begin_sum=self._begin_sum,
            ahead=lambda: self._agreement.steps_ahead,
            tell=self._reporter.message,
        )
        return self._data.read(
            how,
            start=self._progress.cursor,
            stop=self._milestones.limit_from_here(),
            skipped=self._progress.skipped_batches,
            places=self._places,
        )

    def _unfreezing(self, reading: Reading) -> Iterator[Window]:
        """Yield windows, each once what its epoch trains is trainable. Collective."""
        self._epoch = -1
        windows = reading.windows
        if self._data.samples.own_batches:
            windows = with_rows_checked(windows, self._state.module.objective, self._warn)
        for window in windows:
            changed = window.cursor.epoch != self._epoch and self._freezing.apply(window.cursor.epoch)
            self._epoch = window.cursor.epoch
            self._saver.slot = window.microbatches[0].batch if self._saver.unproven else None
            if changed:
                self._strategy.rewrap()
                self._strategy.warm_up(reading.filler)
                trainable = sum(p.numel() for p in self._state.module.parameters() if p.requires_grad)
                self._reporter.message(f"epoch {window.cursor.epoch + 1}: {trainable:,} parameters are trained")
            yield window

    def _drawn(self) -> int:
        return self._data.order.drawn_until(self._epoch) if isinstance(self._data, MappedData) else 0

    def _begin_sum(self, weights: Tensor) -> Callable[[], Tensor]:
        finish = begin_sum_over_ranks(weights, self._strategy.device)

        def waited() -> Tensor:
            self._times.enter("weigh", self._progress.step + 1)  # here the ranks wait for the slowest reader
            total = finish()
            self._times.enter("data", self._progress.step + 1)
            return total

        return waited

    def _parts(self, module: TrainingModule) -> Parts:
        strategy, state = self._strategy, self._state
        self._meter.start()
        verdicts = Verdicts(
            strategy=strategy,
            schedule=state.schedule,
            averaging=state.averaging,
            divergence=state.divergence,
            progress=state.progress,
            meter=self._meter,
        )
        return Parts(
            seed=self._values.seed,
            max_grad_norm=self._values.optimizer.max_grad_norm,
            strategy=strategy,
            schedule=state.schedule,
            buffers=buffer_rule(module, strategy, state.buffers.moving, step=self._progress.step),
            divergence=state.divergence,
            verdicts=verdicts,
            progress=self._progress,
            agreement=self._agreement,
            meter=self._meter,
            garbage=self._garbage,
            times=self._times,
            seeds_updates=not all(type(member).__module__.startswith("torch.") for member in members(state.optimizer)),
            stop_wished=self._stop_wished,
            will_report=lambda window: self._milestones.is_due(self._values.reporting.every, window, ahead=1),
            is_due=lambda window: not self._folder.saving_prepared or self._milestones.is_anything_due(window),
            report=self._report,
            evaluate=self._evaluate,
            enough=self._evaluations.enough,
            save=self._save,
        )

    def _out_of_memory(self, error: BaseException) -> OutOfMemoryError:
        phase, step, _ = self._position.now
        key, size = "batch.micro_size", -(-self._values.batch.global_size // self._sharing.slots)
        if phase == "evaluate":
            key, size = "evaluation.micro_size", self._values.evaluation.micro_size or size
        return out_of_memory(error, rank=self._strategy.rank, where=f"{phase} at step {step}", key=key, size=size)

    def _roll_back(self, wanted: RollbackWanted) -> None:
        self._agreement.end()  # the step was left before its message was read
        self._strategy.discard()  # the gradient of a step that had begun, if the host learned late
        section = self._values.divergence
        found = self._folder.roll_back(
            wanted, max_rollbacks=section.max_rollbacks, learning_rate_factor=section.learning_rate_factor
        )
        self._go_on_from(found, self._read(found))
        self._reporter.rewind(self._progress.step)
        self._warn(
            f"step {wanted.step} (epoch {wanted.cursor.epoch + 1}, batch {wanted.cursor.batch + 1}): {wanted.reason}; back to "
            f"{found.path.name} as attempt {self._progress.attempt}, leaving this batch out"
        )
        if self._milestones.over and not self._progress.evaluation_due and not found.results:
            self._progress.evaluation_due = self._progress.evaluation_extra = True

    # What the loop calls after each step, on every rank

    def _stop_wished(self) -> bool:
        return bool(self._stop_wish) or self._folder.failing

    def _report(self, window: Window) -> None:
        every = self._values.reporting.every
        if self._milestones.is_due(every, window):
            # The interval that the run's end cuts short goes on if the limit is raised.
            values = self._meter.read(forget=self._milestones.is_due_by_interval(every, window))
            self._reporter.log(values, step=self._progress.step, epoch=window.cursor.epoch + 1, split="train")
            straggling = self._stragglers.message(values, self._meter.seconds)
            if straggling is not None:
                self._reporter.message(straggling)

    def _evaluate(self, window: Window) -> dict[str, Result] | None:
        self._meter.pause()
        results = self._evaluations.after_step(window)
        self._meter.resume()
        return results

    def _save(self, window: Window, leaving: bool) -> None:
        self._saver.prepare()
        best = self._folder.is_best(self._evaluations.judged_results_of_this_step)
        if leaving or best or self._milestones.is_due(self._values.checkpoint.every, window):
            self._stop_wish.moved()
            self._meter.pause()
            self._save_state()
            self._saver.prove_first(leaving=leaving)
            self._meter.resume()

    def _save_state(self) -> None:
        places = self._reading.places if self._reading is not None else self._places
        self._saver.save(places, self._agreement.check_drawn)

    def _open_reporter(self, stack: ExitStack, prepared: Prepared) -> None:
        if self._strategy.rank != 0:
            return
        stack.push(lambda kind, error, trace: self._reporter.finish("failed") if kind else None)
        open_trackers(self._reporter, self._loaded, self._progress, run_id=self._identity.tracker_id)
        self._reporter.log_summary(
            start_facts(
                self._loaded,
                self._state.module.objective,
                parameters=self._parameters,
                sharing=self._sharing,
                device=self._strategy.device.type,
                data=self._data,
                step=self._progress.step,
                memory=prepared.memory,
            )
        )

    def _warn(self, text: str) -> None:
        self._reporter.warn(text)

    def _close(self, outcome: Literal["finished", "stopped"]) -> RunResult:
        self._stop_wish.moved()
        self._folder.finish_saving()
        end_training(self._state.optimizer)
        if outcome == "stopped":
            self._reporter.message(
                f"Stopped by {self._stop_wish.reason or 'another rank'} after step {self._progress.step}, saved; "
                "the same command goes on from here."
            )
        for text in self._folder.best_messages():
            self._reporter.message(text)
        self._reporter.finish(outcome)
        self._strategy.barrier()  # all ranks leave after the last write
        message = self._milestones.why_early if outcome == "finished" else ""
        saved = self._folder.last_saved() if self._strategy.sharded else None
        make_model = model_maker(self._loaded, self._state.module.model, saved)
        return RunResult(
            outcome, self._progress.step, self._evaluations.results, self._folder.path, make_model, message
        )
