"""One run from configuration to outcome: every part built in order of dependence, and closed in reverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.schedulers import own_job
from runtime.build.builder import Builder
from runtime.build.preparation import tell_of_component
from runtime.build.trackers import open_trackers, restore_meter
from runtime.checkpoints.load import load_state, open_state
from runtime.checkpoints.run_folder import ResumePoint, RunFolder
from runtime.checkpoints.run_state import check_training_state, cursor_on_resumption
from runtime.checks.first_start import FirstStart, check_first_start
from runtime.checks.objective import mark_coupled
from runtime.code_digests import changes_of, explained_by, warning_of
from runtime.config.file import LoadedConfiguration
from runtime.distributed.stopping import StopRequest
from runtime.distributed.watchdog import CurrentPhase
from runtime.errors import LockstepError, OutOfMemoryError
from runtime.model_calls import is_out_of_memory
from runtime.optimization.optimizer_eval_mode import end_training
from runtime.reporting.facts import start_facts
from runtime.reporting.meters import PhaseTimes
from runtime.reporting.reporter import Reporter
from runtime.run.parts import RunParts, build_parts
from runtime.run.result import RunResult, model_maker
from runtime.run.services import RunServices
from runtime.run_files import RunFiles
from runtime.strategies import Strategy
from runtime.training.divergence import RollbackWanted
from runtime.training.fitting import out_of_memory
from runtime.training.garbage import GarbageCollection
from runtime.training.observers import Observer
from runtime.training.stop_reason import StopReason


class Run:
    """A run whose processes are up: builds its parts, trains, and leaves everything saved.

    Args:
        loaded: the checked configuration.
        strategy: how the processes share the work.
        stop_request: set by signals.
        position: told where this rank is.
        notes: lines to report at the start.
        observers: called after each step, behind those of ``reporting.observers``.
    """

    def __init__(
        self,
        loaded: LoadedConfiguration,
        strategy: Strategy,
        stop_request: StopRequest,
        position: CurrentPhase,
        *,
        notes: Sequence[str] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        self._loaded, self._builder = loaded, Builder(loaded)
        self._values, self._strategy = loaded.values, strategy
        self._position, self._observers = position, observers
        self._reporter = Reporter()
        for text in notes:
            self._reporter.message(text)
        self._folder = RunFolder(
            loaded.output,
            rank=strategy.rank,
            device=strategy.device,
            section=self._values.checkpoint.model_copy(update={"best": self._values.best}),
            warn=self._reporter.warn,
            writers=strategy.world_size if strategy.writes_together else 1,
            timeout_seconds=self._values.limit.stall_seconds,
            job=(job.job, job.restart) if (job := own_job()) is not None else (None, 0),
        )
        self._services = RunServices(
            self._folder, stop_request, self._reporter, PhaseTimes(position), GarbageCollection()
        )
        self._changed_code: list[str] = []

    def train(self) -> RunResult:
        """Train until the limit or an agreed stop. Collective: every rank must call this."""
        with self._services.closing as closing:
            closing.callback(self._folder.close)
            self._folder.open()
            self._services.stop_request.watch_file(RunFiles(self._folder.path).stop)
            found = self._folder.newest(self._values.resume)
            if found is not None:
                self._restored(found)
            else:
                self._new()
            self._open_reporter()
            try:
                return self._train()
            except LockstepError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise self._out_of_memory(error) from error
                tell_of_component(self._builder.components, error, self._state)
                raise

    def leaving_seconds(self) -> float:
        """Return how long before its time is up a run should begin to leave: 1.5 times its longest save, and 2 s."""
        return 1.5 * self._folder.save_seconds + 2.0

    def owns_folder(self) -> bool:
        """Tell whether no other job has taken the run folder over; for rank 0."""
        return self._folder.owned

    def _read(self, found: ResumePoint) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's state, of tensors no more than this rank will need."""
        model, training = open_state(found.path) if self._strategy.sharded else load_state(found.path)
        check_training_state(training, found.path.name)
        values, folder = self._values, self._loaded.output
        training["progress"]["cursor"] = cursor_on_resumption(
            training, values.batch.global_size, values.data, allowed=values.resume.allow_changes, folder=folder
        )
        return model, training

    def _new(self) -> None:
        """Build the parts of a run that begins, and check what users bring."""
        self._take(
            build_parts(self._loaded, self._builder, self._strategy, self._services, self._observers, before=None)
        )
        evaluators = self._evaluations.evaluators
        # Before the first record, which names what was found to be inexact.
        check_first_start(FirstStart(self._builder, self._strategy, self._prepared, evaluators, self._reporter.warn))

    def _restored(self, found: ResumePoint) -> None:
        """Build the parts of a run that goes on from a checkpoint, and load it."""
        stored = self._read(found)
        before = stored[1]
        self._take(
            build_parts(self._loaded, self._builder, self._strategy, self._services, self._observers, before=before)
        )
        if "code" in before:
            self._changed_code = changes_of(before["code"], self._loaded.code, self._loaded.resolved())
        self._go_on_from(found, stored)

    def _take(self, parts: RunParts) -> None:
        self._prepared, self._state, self._progress = (
            parts.prepared,
            parts.prepared.state,
            parts.prepared.state.progress,
        )
        self._triggers, self._windows, self._evaluations = parts.triggers, parts.windows, parts.evaluations
        self._meter, self._saver, self._trainer = parts.meter, parts.saver, parts.trainer

    def _go_on_from(self, found: ResumePoint, stored: tuple[dict[str, Any], dict[str, Any]]) -> None:
        with explained_by(self._changed_code):
            self._state.restore(*stored)
        mark_coupled(self._state.module.objective, stored[1].get("coupled", []))
        self._state.follow(found.rollbacks)
        self._windows.go_on_from(stored[1])
        self._evaluations.go_on_from(found.results, judged=found.judged)
        restore_meter(self._meter, stored[1], self._loaded.resolved(), self._strategy)

    def _train(self) -> RunResult:
        progress = self._progress
        if progress.evaluation_extra and not self._triggers.over:
            progress.evaluation_due = progress.evaluation_extra = False  # the run no longer ends here
        was_over = self._triggers.over and not progress.evaluation_due
        if self._changed_code:
            self._reporter.warn(warning_of(self._changed_code, finished=was_over))
        if was_over:
            self._reporter.message(self._triggers.how_to_go_on)
        elif self._values.divergence.rolls_back and progress.step == 0:
            self._saver.save()  # so that there is always something to return to
        with self._services.garbage:
            reason = self._trained_to_the_end()
        if self._triggers.why_early and not was_over:
            self._reporter.message(f"This run is finished: {self._triggers.why_early}.")
        if reason.outcome == "finished" and not self._evaluations.test():
            reason = StopReason.STOP_REQUEST
        return self._close(reason)

    def _trained_to_the_end(self) -> StopReason:
        """Train, after each rollback from where it led to; return why the run ends."""
        while True:
            if self._progress.evaluation_due:
                if not self._evaluations.catch_up():
                    return StopReason.STOP_REQUEST
                self._saver.save()
            reason = self._triggers.stop_reason()
            if reason is not None:
                return reason
            try:
                return self._trainer.train(self._windows.begin())
            except RollbackWanted as wanted:
                self._roll_back(wanted)

    def _out_of_memory(self, error: BaseException) -> OutOfMemoryError:
        phase, step, _ = self._position.now
        key, size = "batch.micro_size", -(-self._values.batch.global_size // self._prepared.assignment.slots)
        if phase == "evaluate":
            key, size = "evaluation.micro_size", self._values.evaluation.micro_size or size
        return out_of_memory(error, rank=self._strategy.rank, where=f"{phase} at step {step}", key=key, size=size)

    def _roll_back(self, wanted: RollbackWanted) -> None:
        self._windows.stop_consensus.end()  # the step was left before its message was read
        self._strategy.discard()  # the gradient of a step that had begun, if the host learned late
        section = self._values.divergence
        found = self._folder.roll_back(
            wanted, max_rollbacks=section.max_rollbacks, learning_rate_factor=section.learning_rate_factor
        )
        self._go_on_from(found, self._read(found))
        self._reporter.rewind(self._progress.step)
        self._reporter.warn(
            f"step {wanted.step} (epoch {wanted.cursor.epoch + 1}, batch {wanted.cursor.batch + 1}): {wanted.reason}; back to "
            f"{found.path.name} as attempt {self._progress.attempt}, leaving this batch out"
        )
        if self._triggers.over and not self._progress.evaluation_due and not found.results:
            self._progress.evaluation_due = self._progress.evaluation_extra = True

    def _open_reporter(self) -> None:
        if self._strategy.rank != 0:
            return
        prepared = self._prepared
        self._services.closing.push(lambda kind, error, trace: self._reporter.finish("failed") if kind else None)
        open_trackers(
            self._reporter, self._loaded, self._builder, self._progress, run_id=prepared.fingerprint.tracker_id
        )
        self._reporter.log_summary(
            start_facts(
                self._loaded,
                self._state.module.objective,
                parameters=prepared.parameters,
                assignment=prepared.assignment,
                device=self._strategy.device.type,
                data=prepared.data,
                step=self._progress.step,
                memory=prepared.memory,
            )
        )

    def _close(self, reason: StopReason) -> RunResult:
        stop_request = self._services.stop_request
        stop_request.moved()
        self._folder.finish_saving()
        end_training(self._state.optimizer)
        if reason is StopReason.STOP_REQUEST:
            self._reporter.message(
                f"Stopped by {stop_request.reason or 'another rank'} after step {self._progress.step}, saved; "
                "the same command goes on from here."
            )
        for text in self._folder.best_messages():
            self._reporter.message(text)
        self._reporter.finish(reason.outcome)
        self._strategy.barrier()  # all ranks leave after the last write
        saved = self._folder.last_saved() if self._strategy.sharded else None
        return RunResult(
            outcome=reason.outcome,
            step=self._progress.step,
            results=self._evaluations.results,
            folder=self._folder.path,
            make_model=model_maker(self._builder, self._state.module.model, saved),
            message=self._triggers.why_early if reason.outcome == "finished" else "",
            stop_reason=reason,
        )
