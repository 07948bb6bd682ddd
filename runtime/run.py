"""One run from configuration to outcome: every part built in order of dependence, and closed in reverse."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from runtime import assembly, yaml_file
from runtime.averaging import ExponentialMovingAverage
from runtime.batches import (
    Cursor,
    Samples,
    Sharing,
    Window,
    Windows,
    default_slots,
    fingerprint,
    with_weights,
)
from runtime.buffers import BufferRule
from runtime.checkpoint import Checkpoint, CheckpointFolder, load_state
from runtime.config_file import LoadedConfiguration
from runtime.config_types import Interval
from runtime.console import ConsoleTracker
from runtime.control import Agreement, from_rank_0, sum_over_ranks
from runtime.errors import CheckpointError, ConfigurationError, DataError, RunFolderError
from runtime.evaluation import Evaluator
from runtime.facts import start_facts, versions
from runtime.garbage import GarbageCollection
from runtime.loop import Parts, train
from runtime.meters import TrainingMeter
from runtime.metrics import MetricSet, Result
from runtime.objective import TrainingModule
from runtime.progress import Progress
from runtime.reporting import JsonLines, Reporter, Tracker
from runtime.resumption import Identity, RunState, check_identity, slots_on_resumption
from runtime.serialization import replace_file
from runtime.stopping import StopWish
from runtime.strategies import Strategy


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Args:
        outcome: ``finished``, or ``stopped`` when it was asked to stop and can be continued.
        step: global batches consumed in all.
        results: of the last evaluation of the validation data; ``test/…`` of the test data. Equal on every rank.
        folder: the run folder.
        model: the trained model.
    """

    outcome: Literal["finished", "stopped"]
    step: int
    results: Mapping[str, Result]
    folder: Path
    model: nn.Module


class Run:
    """A run whose processes are up: builds its parts, trains, and leaves everything saved.

    Args:
        loaded: the checked configuration.
        strategy: how the processes share the work.
        stop_wish: set by signals.
    """

    def __init__(self, loaded: LoadedConfiguration, strategy: Strategy, stop_wish: StopWish) -> None:
        self._loaded = loaded
        self._values = loaded.values
        self._strategy = strategy
        self._stop_wish = stop_wish
        self._folder = loaded.output
        self._reporter = Reporter()
        self._results: dict[str, Result] = {}
        self._evaluated_step = -1
        self._garbage = GarbageCollection()
        self._prepare_folder()
        self._checkpoints = CheckpointFolder(
            self._folder / "checkpoints",
            keep=self._values.checkpoint.keep,
            best=self._values.checkpoint.best,
            warn=self._warn,
        )

    def train(self) -> RunResult:
        """Train until the limit or an agreed stop. Collective: every rank must call this."""
        checkpoint = self._newest_checkpoint()
        stored = load_state(checkpoint) if checkpoint is not None else None
        module = self._build_module()
        samples = assembly.build_samples(self._loaded, "train")
        assert samples is not None
        self._order = assembly.build_order(self._loaded, samples)
        if self._order.num_batches(0) == 0:
            raise DataError("data.train: drop_last leaves no global batch; it has fewer samples than batch.global_size")
        self._identity = self._identify(samples, stored[1] if stored else None)
        self._sharing = Sharing(self._identity.slots, self._strategy.world_size, self._strategy.rank)
        smallest = len(self._order.batch(0, self._order.num_batches(0) - 1))
        assembly.check_batch_norm(self._loaded, self._sharing, smallest_batch=smallest)
        optimizer = assembly.build_optimizer(self._loaded, module)
        schedule = assembly.build_schedule(self._loaded, optimizer, self._schedule_length())
        section = self._values.averaging
        averaging = ExponentialMovingAverage(module, section.decay) if section is not None else None
        self._state = RunState(module, optimizer, schedule, averaging, self._strategy, Progress())
        if stored is not None:
            self._state.restore(*stored)
        self._progress = self._state.progress
        self._first_step = self._progress.step
        if checkpoint is not None:
            self._results = dict(checkpoint.results)
            self._evaluated_step = self._progress.step
        with ExitStack() as stack:
            self._open_reporter(stack, module, samples)
            return self._train(module, samples)

    def _train(self, module: TrainingModule, samples: Samples) -> RunResult:
        self._strategy.prepare(module, self._state.optimizer)
        self._validation, self._test = self._evaluator("validation"), self._evaluator("test")
        if self._reached(self._progress.cursor, 0):
            self._reporter.message(
                f"This run is finished: {self._progress.step} steps. To go on, raise limit.epochs or limit.steps."
            )
            self._evaluate_test()  # not in the checkpoint; the start that trained may not have come this far
            return self._close("finished")
        windows = Windows(
            samples,
            self._order,
            start=self._progress.cursor,
            stop=self._reached,
            sharing=self._sharing,
            make_loader=assembly.build_loader(self._loaded, self._strategy.device),
        )
        self._strategy.warm_up(windows.filler)
        objective = module.objective
        weighted = with_weights(
            iter(windows),
            weigh=None if objective.counts_samples else objective.checked_weight,
            slots=self._sharing.slots,
            sum_over_ranks=lambda weights: sum_over_ranks(weights, self._strategy.device),
        )
        train_metrics = assembly.build_metrics(self._loaded) if self._values.evaluation.metrics_on_train else {}
        self._meter = TrainingMeter(self._strategy.device, objective, MetricSet(train_metrics, self._strategy.device))
        module.train()
        with self._garbage:
            outcome = train(weighted, self._parts(module))
        if outcome == "finished":
            self._evaluate_test()
        return self._close(outcome)

    def _parts(self, module: TrainingModule) -> Parts:
        strategy = self._strategy
        return Parts(
            seed=self._values.seed,
            max_grad_norm=self._values.optimizer.max_grad_norm,
            strategy=strategy,
            schedule=self._state.schedule,
            buffers=BufferRule(module, dist.all_reduce if strategy.world_size > 1 else lambda change: None),
            averaging=self._state.averaging,
            progress=self._progress,
            agreement=Agreement(world_size=strategy.world_size, device=strategy.device),
            meter=self._meter,
            garbage=self._garbage,
            stop_wished=lambda: bool(self._stop_wish),
            will_report=lambda window: self._is_due(self._values.reporting.every, window, ahead=1),
            report=self._report,
            evaluate=self._evaluate,
            save=self._save,
        )

    # What the loop calls after each step, on every rank

    def _report(self, window: Window) -> None:
        if self._is_due(self._values.reporting.every, window):
            values = {**self._meter.read(), "learning_rate": self._state.schedule.learning_rates[0]}
            self._reporter.train(self._progress.step, window.cursor.epoch + 1, values)

    def _evaluate(self, window: Window) -> dict[str, Result] | None:
        if self._validation is None or not self._is_due(self._values.evaluation.every, window):
            return None
        self._meter.pause()
        with self._evaluated_weights(), self._garbage.paused():
            results = self._validation.evaluate()
        self._meter.resume()
        self._results, self._evaluated_step = results, self._progress.step
        self._reporter.evaluation("validation", self._progress.step, window.cursor.epoch + 1, results)
        return results

    def _save(self, window: Window, leaving: bool) -> None:
        if not (leaving or self._is_due(self._values.checkpoint.every, window)):
            return
        self._meter.pause()
        problem = None
        if self._strategy.rank == 0:
            model, training = self._state.collect()
            results = self._results if self._evaluated_step == self._progress.step else {}
            try:
                training |= {"identity": asdict(self._identity), "made_by": versions()}
                self._checkpoints.save(self._progress.step, model=model, training=training, results=results)
            except CheckpointError as error:
                problem = str(error)
        problem = from_rank_0(problem, self._strategy.device)
        if problem is not None:
            raise CheckpointError(problem)
        self._meter.resume()

    def _is_due(self, every: Interval, window: Window, *, ahead: int = 0) -> bool:
        """Tell whether something is due after this window's step, which is counted already unless it lies ahead."""
        if window.run_ends:
            return True
        return every.due(step=self._progress.step + ahead, epoch=window.cursor.epoch + 1, epoch_ends=window.epoch_ends)

    def _reached(self, cursor: Cursor, steps: int) -> bool:
        limit = self._values.limit
        if limit.steps is not None:
            return self._first_step + steps >= limit.steps
        return limit.epochs is not None and cursor.epoch >= limit.epochs

    # Building

    def _build_module(self) -> TrainingModule:
        model, objective = assembly.build_model(self._loaded), assembly.build_objective(self._loaded)
        if self._values.batch_norm == "sync":
            if self._strategy.device.type != "cuda":
                problem = self._loaded.problem(("batch_norm",), "sync needs GPUs; use local")
                raise ConfigurationError([problem])
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        compile_section = self._values.compile
        if compile_section is not None:
            if torch.are_deterministic_algorithms_enabled():
                from torch._inductor import config as inductor

                inductor.fallback_random = True  # compiled code then draws eager's random numbers
            model.compile(
                backend=compile_section.backend,
                mode=compile_section.mode,
                dynamic=compile_section.dynamic,
                fullgraph=compile_section.fullgraph,
            )
        return TrainingModule(model, objective).to(self._strategy.device)

    def _identify(self, samples: Samples, stored: Mapping[str, Any] | None) -> Identity:
        batch, world_size = self._values.batch, self._strategy.world_size
        if batch.global_size < world_size:
            raise ConfigurationError(
                [
                    self._loaded.problem(
                        ("batch", "global_size"),
                        f"{batch.global_size} samples cannot keep {world_size} processes busy; use fewer processes",
                    )
                ]
            )
        data = fingerprint(samples.source)
        length = self._schedule_length() if assembly.follows_limit(self._loaded) else None
        if stored is None:
            slots = batch.slots or default_slots(batch.global_size, batch.micro_size or batch.global_size, world_size)
            return Identity(self._loaded.resolved(), slots, data, length, secrets.token_hex(4))
        identity = Identity(**stored["identity"])
        check_identity(identity, self._loaded, data=data, schedule_length=length)
        slots = slots_on_resumption(identity.slots, self._loaded)
        if slots != identity.slots:
            self._warn(
                f"K changes from {identity.slots} to {slots}: from here on only models without randomness or batch statistics "
                "in the forward pass keep the answer"
            )
        return Identity(self._loaded.resolved(), slots, data, length, identity.tracker_id)

    def _schedule_length(self) -> int:
        return assembly.schedule_length(self._loaded, self._order.num_batches(0))

    def _evaluator(self, name: Literal["validation", "test"]) -> Evaluator | None:
        samples = assembly.build_samples(self._loaded, name)
        if samples is None:
            return None
        batch = self._values.batch
        slot_size = -(-batch.global_size // self._sharing.slots)
        return Evaluator(
            name,
            samples,
            micro_size=self._values.evaluation.micro_size or slot_size,
            strategy=self._strategy,
            metrics=MetricSet(assembly.build_metrics(self._loaded), self._strategy.device),
            make_loader=assembly.build_loader(self._loaded, self._strategy.device),
            seed=self._values.seed,
        )

    def _evaluated_weights(self) -> Any:
        averaging, section = self._state.averaging, self._values.averaging
        return averaging.swapped_in() if averaging and section and section.evaluate else nullcontext()

    def _evaluate_test(self) -> None:
        if self._test is None:
            return
        with self._evaluated_weights():
            results = self._test.evaluate()
        self._reporter.evaluation("test", self._progress.step, max(1, self._progress.cursor.epoch), results)
        self._results = {**self._results, **{f"test/{name}": value for name, value in results.items()}}

    # The run folder

    def _prepare_folder(self) -> None:
        problem = None
        if self._strategy.rank == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = f"the run folder {self._folder} cannot be made: {error.strerror}"
        problem = from_rank_0(problem, self._strategy.device)
        if problem is not None:
            raise RunFolderError(problem)

    def _newest_checkpoint(self) -> Checkpoint | None:
        found: dict[str, Any] = {}
        if self._strategy.rank == 0:
            try:
                self._checkpoints.clear_partial()
                newest = self._checkpoints.newest()
                if newest is not None:
                    found = {"path": str(newest.path), "step": newest.step, "results": dict(newest.results)}
            except (CheckpointError, OSError) as error:
                found = {"problem": str(error)}
        found = from_rank_0(found, self._strategy.device)
        if "problem" in found:
            raise CheckpointError(found["problem"])
        mode = self._values.resume.mode
        if found and mode == "never":
            raise RunFolderError(f"{self._folder} holds a checkpoint and resume.mode is never; choose another output")
        if not found and mode == "must":
            raise RunFolderError(f"{self._folder} holds no checkpoint and resume.mode is must")
        return Checkpoint(Path(found["path"]), found["step"], found["results"]) if found else None

    def _open_reporter(self, stack: ExitStack, module: TrainingModule, samples: Samples) -> None:
        if self._strategy.rank != 0:
            return
        resolved = self._loaded.resolved()
        try:
            replace_file(self._folder / "config.yaml", yaml_file.dump(resolved))
            records = JsonLines(self._folder / "metrics.jsonl", resumed_step=self._progress.step)
        except OSError as error:
            raise RunFolderError(f"the run folder {self._folder} cannot be written: {error.strerror}") from error
        trackers: list[Tracker] = [ConsoleTracker(progress=self._values.reporting.progress), records]
        if self._values.reporting.wandb is not None:
            from runtime.wandb_tracker import WandbTracker

            trackers.append(
                WandbTracker(
                    self._values.reporting.wandb,
                    name=self._loaded.name,
                    run_id=self._identity.tracker_id,
                    folder=self._folder,
                    configuration=resolved,
                    warn=self._warn,
                )
            )
        self._reporter.open(trackers)
        stack.push(lambda kind, error, trace: self._reporter.close("failed") if kind else None)
        order, limit = self._order, self._values.limit
        self._reporter.start(
            start_facts(
                self._loaded,
                module,
                sharing=self._sharing,
                device=self._strategy.device.type,
                num_samples=len(samples),
                steps_per_epoch=order.num_batches(0),
                step=self._progress.step,
                total_steps=limit.steps or (limit.epochs or 0) * order.num_batches(0),
            )
        )

    def _warn(self, text: str) -> None:
        self._reporter.message(f"warning: {text}")

    def _close(self, outcome: Literal["finished", "stopped"]) -> RunResult:
        if outcome == "stopped":
            self._reporter.message(
                f"Stopped by {self._stop_wish.reason or 'another rank'} after step {self._progress.step}, saved; "
                "the same command goes on from here."
            )
        if self._strategy.rank == 0:
            for best in self._values.checkpoint.best:
                found = self._checkpoints.best(best.metric, best.mode)
                if found is not None:
                    self._reporter.message(f"best {best.metric} {found.results[best.metric]:.4f}: {found.path}")
        self._reporter.close(outcome)
        self._strategy.barrier()  # all ranks leave after the last write
        return RunResult(outcome, self._progress.step, self._results, self._folder, self._state.module.model)
