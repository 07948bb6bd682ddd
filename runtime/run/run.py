"""One run from configuration to outcome: builds its components in order of dependence, closes them in reverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.schedulers import own_job
from runtime.build.builder import Builder
from runtime.build.preparation import raise_component_error
from runtime.build.trackers import open_trackers, restore_meter
from runtime.checkpoints.load import load_state, open_state
from runtime.checkpoints.run_folder import ResumePoint, RunFolder
from runtime.checkpoints.run_state import check_training_state, cursor_on_resumption, determinism_on_resumption
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
    """A run in processes that have joined: builds its components, trains, and saves.

    Args:
        loaded: the checked configuration.
        strategy: how the processes share the work.
        stop_request: set by signals.
        position: updated with this rank's current phase.
        notes: lines to report at the start.
        observers: called after each step, after those of ``reporting.observers``.
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
            writers=strategy.state_io.writers,
            timeout_seconds=self._values.limit.stall_seconds,
            job=(job.job, job.restart) if (job := own_job()) is not None else (None, 0),
        )
        self._services = RunServices(
            self._folder, stop_request, self._reporter, PhaseTimes(position), GarbageCollection()
        )
        self._changed_code: list[str] = []
        self._changed_determinism: str | None = None

    def train(self) -> RunResult:
        """Train until the limit or an agreed stop. Collective: every rank must call this."""
        with self._services.closing as closing:
            closing.callback(self._folder.close)
            self._folder.open()
            self._services.stop_request.watch_file(RunFiles(self._folder.path).stop)
            point = self._folder.newest(self._values.resume)
            if point is not None:
                self._build_resumed(point)
            else:
                self._build_new()
            self._open_reporter()
            try:
                return self._train()
            except LockstepError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise self._out_of_memory(error) from error
                raise_component_error(self._builder.components, error, self._state)
                raise

    def leaving_seconds(self) -> float:
        """Return how long before the time limit a run should begin to stop: 1.5 times its longest save, plus 2 s."""
        return 1.5 * self._folder.save_seconds + 2.0

    def owns_folder(self) -> bool:
        """Whether no other job has taken over the run folder; on rank 0 only."""
        return self._folder.owned

    def _read(self, point: ResumePoint) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's state; with a sharded strategy tensors are read lazily, only this rank's slices."""
        model, training = load_state(point.path) if self._strategy.state_io.held_whole else open_state(point.path)
        check_training_state(training, point.path.name)
        values, folder = self._values, self._loaded.output
        training["progress"]["cursor"] = cursor_on_resumption(
            training, values.batch.global_size, values.data, allowed=values.resume.allow_changes, folder=folder
        )
        return model, training

    def _build_new(self) -> None:
        """Build the components of a new run, and check the user's code and data."""
        self._set_parts(
            build_parts(self._loaded, self._builder, self._strategy, self._services, self._observers, before=None)
        )
        evaluators = self._evaluations.evaluators
        # Before the first record, which lists what was found to be inexact.
        check_first_start(FirstStart(self._builder, self._strategy, self._prepared, evaluators, self._reporter.warn))

    def _build_resumed(self, point: ResumePoint) -> None:
        """Build the components of a resumed run, and load the checkpoint."""
        stored = self._read(point)
        before = stored[1]
        self._set_parts(
            build_parts(self._loaded, self._builder, self._strategy, self._services, self._observers, before=before)
        )
        if "code" in before:
            self._changed_code = changes_of(before["code"], self._loaded.code, self._loaded.resolved())
        self._changed_determinism = determinism_on_resumption(before, self._values.determinism)
        self._resume_from(point, stored)

    def _set_parts(self, parts: RunParts) -> None:
        self._prepared, self._state, self._progress = (
            parts.prepared,
            parts.prepared.state,
            parts.prepared.state.progress,
        )
        self._triggers, self._windows, self._evaluations = parts.triggers, parts.windows, parts.evaluations
        self._meter, self._saver, self._trainer = parts.meter, parts.saver, parts.trainer

    def _resume_from(self, point: ResumePoint, stored: tuple[dict[str, Any], dict[str, Any]]) -> None:
        with explained_by(self._changed_code):
            self._state.restore(*stored)
        mark_coupled(self._state.module.objective, stored[1].get("coupled", []))
        self._state.apply_rollbacks(point.rollbacks)
        self._windows.resume_from(stored[1])
        self._evaluations.resume_from(point.results, judged=point.judged)
        restore_meter(self._meter, stored[1], self._loaded.resolved(), self._strategy)

    def _train(self) -> RunResult:
        progress = self._progress
        if progress.evaluation_extra and not self._triggers.over:
            progress.evaluation_due = progress.evaluation_extra = False  # the run no longer ends here
        was_over = self._triggers.over and not progress.evaluation_due
        if self._changed_code:
            self._reporter.warn(warning_of(self._changed_code, finished=was_over))
        if self._changed_determinism and not was_over:
            self._reporter.warn(self._changed_determinism)
        if was_over:
            self._reporter.message(self._triggers.finished_message)
        elif self._values.divergence.rolls_back and progress.step == 0:
            self._saver.save()  # so that there is always a checkpoint to roll back to
        with self._services.garbage:
            reason = self._train_until_stop()
        if self._triggers.why_early and not was_over:
            self._reporter.message(f"This run is finished: {self._triggers.why_early}.")
        if reason.outcome == "finished" and not self._evaluations.test():
            reason = StopReason.STOP_REQUEST
        return self._close(reason)

    def _train_until_stop(self) -> StopReason:
        """Train, continuing after rollbacks, and return why the run ends."""
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
        self._windows.stop_consensus.end()  # the step was aborted before its stop message was read
        self._strategy.discard()  # the gradient of a step already begun, if the host learned of the divergence late
        section = self._values.divergence
        point = self._folder.roll_back(
            wanted, max_rollbacks=section.max_rollbacks, learning_rate_factor=section.learning_rate_factor
        )
        self._resume_from(point, self._read(point))
        self._reporter.rewind(self._progress.step)
        self._reporter.warn(
            f"step {wanted.step} (epoch {wanted.cursor.epoch + 1}, batch {wanted.cursor.batch + 1}): {wanted.reason}; rolling "
            f"back to {point.path.name} as attempt {self._progress.attempt}, skipping this batch"
        )
        if self._triggers.over and not self._progress.evaluation_due and not point.results:
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
        stop_request.restart_grace_time()
        self._folder.finish_saving()
        self._saver.report_written()
        end_training(self._state.optimizer)
        if reason is StopReason.STOP_REQUEST:
            self._reporter.message(
                f"Stopped by {stop_request.reason or 'another rank'} after step {self._progress.step}, saved; "
                "the same command resumes the run."
            )
        for text in self._folder.best_messages():
            self._reporter.message(text)
        self._reporter.finish(reason.outcome)
        self._strategy.barrier()  # all ranks leave after the last write
        saved = None if self._strategy.state_io.held_whole else self._folder.last_saved()
        return RunResult(
            outcome=reason.outcome,
            step=self._progress.step,
            results=self._evaluations.results,
            folder=self._folder.path,
            make_model=model_maker(self._builder, self._state.module.model, saved),
            message=self._triggers.why_early if reason.outcome == "finished" else "",
            stop_reason=reason,
        )
