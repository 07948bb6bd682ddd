"""Evaluation and prediction of a checkpoint's model on a split, outside of training. Changes nothing in the run folder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from runtime.build.builder import Builder
from runtime.build.data_contents import DataContents, contents_of, does_not_repeat
from runtime.build.evaluation import evaluator_of
from runtime.build.preparation import build_module, compare_ranks
from runtime.build.sources import split_key
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.load import LoadedWeights, load_weights
from runtime.checkpoints.resolve import chosen
from runtime.checkpoints.run_state import load_module
from runtime.code_digests import changes_of
from runtime.config.file import LoadedConfiguration, exact_keys
from runtime.data.fields import Name
from runtime.data.samples import Samples, fingerprint
from runtime.data.streams import StreamSamples
from runtime.distributed.collectives import gather_bytes, on_rank_0
from runtime.distributed.stopping import StopRequest
from runtime.distributed.watchdog import CurrentPhase
from runtime.errors import CheckpointError, DataError, PredictionError
from runtime.evaluation.metrics import Result
from runtime.inference.columns import ColumnBuilder, Columns, DataColumns
from runtime.inference.prediction import Predictor
from runtime.inference.predictions_file import FileFormat, PredictionsFile, check_target, format_of
from runtime.inference.request import InferenceRequest, WeightKind, columns_of_sample
from runtime.inference.sample_submission import SubmissionFile, header_of
from runtime.model_calls import is_out_of_memory
from runtime.optimization.averaging import WeightAverage, usable_average
from runtime.state.durable_files import replace_file
from runtime.strategies import Strategy
from runtime.training.fitting import out_of_memory

_LOGGER = logging.getLogger("lockstep.inference")


@dataclass(frozen=True)
class InferenceResult:
    """The result of an evaluation or a prediction; equal on every rank.

    Args:
        outcome: ``finished``, or ``stopped`` after a stop request: then there are no results and no file is written.
        checkpoint: folder of the checkpoint.
        step: of the checkpoint.
        epoch: of the checkpoint.
        split: the data.
        weights: which of the checkpoint's weights were used.
        samples: number of samples in the data.
        results: of an evaluation.
        output: the file that was written, if any.
        message: always empty; exists because a run's result has one.
    """

    outcome: Literal["finished", "stopped"]
    checkpoint: Path
    step: int
    epoch: int
    split: str
    weights: WeightKind
    samples: int
    results: Mapping[str, Result] = field(default_factory=dict)
    output: Path | None = None
    message: str = ""

    def __str__(self) -> str:
        data = ".".join(split_key(self.split))
        return (
            f"{self.checkpoint.name} (step {self.step}, epoch {self.epoch}), {self.weights} weights, on {self.samples:,} "
            f"samples of {data}"
        )


class Inference:
    """One evaluation or prediction; the process group is already initialised.

    Args:
        loaded: the checked configuration.
        request: the command and its options.
        strategy: how the processes share the work.
        stop_request: set by signals.
        position: this rank's current phase, for its heartbeats.
    """

    def __init__(
        self,
        loaded: LoadedConfiguration,
        request: InferenceRequest,
        strategy: Strategy,
        stop_request: StopRequest,
        position: CurrentPhase,
    ) -> None:
        self._loaded = loaded
        self._request = request
        self._strategy = strategy
        self._stop_request = stop_request
        self._position = position
        self._target = request.target(loaded.output)

    def run(self) -> InferenceResult:
        """Evaluate or predict. Collective: every rank must call this."""
        loaded, request, strategy, values = self._loaded, self._request, self._strategy, self._loaded.values
        split, which = request.split_in(values.data, values.prediction), request.weights_in(values.averaging)
        if request.act == "predict" and self._target is not None:
            format_of(self._target)
        self._checkpoint = self._choose_checkpoint()
        module = build_module(Builder(loaded), strategy, training=False)
        weights = self._load_weights()
        # The checkpoint stores the facts about the training data, which need not exist on this machine.
        self._builder = builder = Builder(loaded, stored=weights.preparation)
        self._slots = int(weights.fingerprint["slots"])
        self._micro_size = builder.evaluation_micro_size(self._slots)
        samples = builder.samples(split, batch_size=self._micro_size)
        assert samples is not None
        if isinstance(samples, StreamSamples) and (request.act == "predict" or samples.sharded_by == "dataset"):
            raise DataError(
                f"{split}: a stream can be evaluated only where sharded_by is runtime, and cannot be predicted; give "
                "prediction.data a map-style data set"
            )
        options = {"--split": split, "--weights": which, "command": request.act}
        configuration = loaded.resolved()
        data = fingerprint(samples.source)
        compare_ranks(strategy, module, data, options, configuration=configuration, code=loaded.code)
        checks_on = values.checks == "on"
        contents = contents_of({split: samples}, strategy, builder.loader) if checks_on else DataContents()
        for part, differing in contents.differing.items():
            if strategy.rank == 0:
                _LOGGER.warning(does_not_repeat(part, differing))
        if request.weights is None and not (weights.averaging or {}).get("count"):
            which = "raw"  # as in the run's evaluations before averaging.start
        strategy.prepare_evaluation(module)
        averaging = _restored(strategy, weights, builder.averaging(strategy) if which == "averaged" else None)
        result = InferenceResult(
            "finished",
            self._checkpoint.path,
            self._checkpoint.step,
            self._checkpoint.epoch,
            split,
            which,
            0 if isinstance(samples, StreamSamples) else len(samples),
        )
        self._unchanged = self._warn_of_changes(weights)
        try:
            with averaging.swapped_in() if averaging is not None else nullcontext():
                if isinstance(samples, StreamSamples) or request.act == "evaluate":
                    return self._evaluate(result, samples)
                return self._predict(result, samples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            key = "evaluation.micro_size"
            raise out_of_memory(error, rank=strategy.rank, where=request.act, key=key, size=self._micro_size) from error

    def _evaluate(self, result: InferenceResult, samples: Samples | StreamSamples) -> InferenceResult:
        evaluator = evaluator_of(samples, self._builder, self._strategy, result.split, slots=self._slots)
        with self._rounds(result) as next_round:
            results = evaluator.evaluate(next_round)
        if results is None:
            return self._stopped(result)
        result = replace(result, results=results, samples=int(float(str(results["samples"]))), output=self._target)
        if self._target is not None:
            self._on_rank_0(lambda: self._write_results(result))
        if self._strategy.rank == 0:
            print_results(result, self._training_results(result))
        return result

    def _predict(self, result: InferenceResult, samples: Samples) -> InferenceResult:
        assert self._target is not None
        target, section = self._target, self._loaded.values.prediction
        columns, id_part, encode, make = self._format(target, samples)
        predictor = Predictor(
            samples,
            micro_size=self._micro_size,
            strategy=self._strategy,
            columns=ColumnBuilder(
                section,
                columns,
                self._loaded.where.problem,
                self._class_names() or (),
                self._builder.sources.preparation.get("target_scale"),
            ),
            id_part=id_part,
            encode=encode,
            make_loader=self._builder.loader(self._strategy.device),
            seed=self._loaded.values.seed,
        )
        file = PredictionsFile(target, make, force=self._request.force)
        try:
            self._on_rank_0(file.open)
            with self._rounds(result, lambda: file.problem is not None) as next_round:
                complete = predictor.predict(file.append, next_round)
            self._on_rank_0(file.commit if complete else file.raise_problem)
        finally:
            file.close()
        if not complete:
            return self._stopped(result)
        if predictor.nan_samples and self._strategy.rank == 0:
            warning = "the model's output is NaN for %d of %d samples; their predictions are meaningless"
            _LOGGER.warning(warning, predictor.nan_samples, len(samples))
        result = replace(result, output=target)
        if self._strategy.rank == 0:
            Console(highlight=False).print(f"{result}: {target}", soft_wrap=True, markup=False)
        return result

    def _class_names(self) -> list[str] | None:
        """Return the class names from the configuration, else from the training data."""
        return self._loaded.values.evaluation.class_names or self._builder.sources.preparation["classes"]

    def _format(
        self, target: Path, samples: Samples
    ) -> tuple[Mapping[str, str], Name | None, Callable[[Columns], bytes], Callable[[BinaryIO], FileFormat]]:
        """Return the requested columns, the part with the ids, the encoder of a microbatch and the constructor of the format.

        Without ``data.fields.id`` the ids are the data's column with the name of the sample submission's id column.
        """
        section, id_part = self._loaded.values.prediction, self._loaded.values.data.fields.id
        if section.sample_submission is None:
            kind = format_of(target)
            return section.columns, id_part, kind.encode, kind
        sample = Path(section.sample_submission)
        header = self._on_rank_0(lambda: header_of(sample))
        columns = columns_of_sample(section, target, header, id_field=id_part, where=self._loaded.where)
        (id_column,) = (name for name, kind in columns.items() if kind == "id")
        if id_part is None and DataColumns(samples.source).has_column(id_column):
            id_part = id_column

        def make(file: BinaryIO) -> SubmissionFile:
            size, labels = len(samples), section.labels
            return SubmissionFile(
                file, sample, id_column, num_samples=size, ids_are_index=id_part is None, labels=labels
            )

        return columns, id_part, SubmissionFile.encode, make

    @contextmanager
    def _rounds(
        self, result: InferenceResult, failing: Callable[[], bool] = lambda: False
    ) -> Iterator[Callable[[], bool]]:
        """Yield a function to call before every round: heartbeat, progress bar; it returns whether this rank wants to stop."""
        console = Console(stderr=True)
        shown = self._strategy.rank == 0 and console.is_terminal and self._loaded.values.reporting.progress
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        per_round = self._micro_size * self._strategy.world_size
        with Progress(*columns, *times, console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task(f"{self._request.act} {result.split}", total=result.samples)
            rounds = count()

            def next_round() -> bool:
                number = next(rounds)
                bar.update(task, completed=min(number * per_round, result.samples))
                self._position.enter(self._request.act, number)
                return bool(self._stop_request) or failing()

            yield next_round

    def _choose_checkpoint(self) -> Checkpoint:
        """Choose and verify the checkpoint on rank 0, and return it on every rank."""

        def choose() -> dict[str, Any]:
            best = self._loaded.values.checkpoint.best
            checkpoint = chosen(self._loaded.output, self._request.checkpoint, best, warn=_LOGGER.warning)
            return {**vars(checkpoint), "path": str(checkpoint.path.absolute())}

        fields = self._on_rank_0(choose)
        return Checkpoint(**{**fields, "path": Path(fields["path"])})

    def _load_weights(self) -> LoadedWeights:
        """Read the checkpoint on every rank; an error on one rank is raised on all."""
        problem, weights = "", None
        try:
            weights = load_weights(self._checkpoint.path)
        except CheckpointError as error:
            problem = str(error)
        for rank, message in enumerate(gather_bytes(problem.encode() or b" ", self._strategy.device)):
            if message != b" ":
                raise CheckpointError(f"rank {rank}: {message.decode()}")
        assert weights is not None
        return weights

    def _warn_of_changes(self, weights: LoadedWeights) -> bool:
        """Warn of differences from the checkpoint's configuration and code; return whether the configurations are equal."""
        old, new = exact_keys(weights.fingerprint["configuration"]), exact_keys(self._loaded.resolved())
        changed = [key for key in sorted(set(old) | set(new)) if repr(old.get(key)) != repr(new.get(key))]
        for key in changed if self._strategy.rank == 0 else ():
            _LOGGER.warning("%s is %r; the checkpoint was made with %r", key, new.get(key), old.get(key))
        code = changes_of(weights.code, self._loaded.code, self._loaded.resolved())
        if code and self._strategy.rank == 0:
            _LOGGER.warning("the code has changed since the checkpoint was trained: %s", ", ".join(code[:8]))
        return not changed

    def _training_results(self, result: InferenceResult) -> Mapping[str, Result]:
        """Return the results of training's evaluation of the same step, if it used the same split and weights."""
        same = result.split == "validation" and result.weights == InferenceRequest("evaluate").weights_in(
            self._loaded.values.averaging
        )
        return self._checkpoint.results if same and self._unchanged else {}

    def _write_results(self, result: InferenceResult) -> None:
        assert result.output is not None
        check_target(result.output, force=self._request.force)
        facts = {
            "checkpoint": str(result.checkpoint),
            "step": result.step,
            "epoch": result.epoch,
            "weights": result.weights,
            "split": result.split,
            "class_names": self._class_names(),
            "results": _without_nan(dict(result.results)),
        }
        try:
            replace_file(result.output, json.dumps(facts, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise PredictionError(f"{result.output} cannot be written: {error.strerror or error}") from error

    def _stopped(self, result: InferenceResult) -> InferenceResult:
        if self._strategy.rank == 0:
            reason = self._stop_request.reason or "another rank"
            _LOGGER.warning("stopped by %s; nothing was written, rerun the command", reason)
        return replace(result, outcome="stopped")

    def _on_rank_0(self, act: Callable[[], Any]) -> Any:
        return on_rank_0(act, rank=self._strategy.rank, device=self._strategy.device)


def print_results(result: InferenceResult, training_results: Mapping[str, Result]) -> None:
    """Print the results, next to those that training reported for the same step."""
    console = Console(highlight=False)
    console.print(str(result), soft_wrap=True, markup=False)
    table = Table()
    table.add_column("result")
    table.add_column("value", justify="right")
    if training_results:
        table.add_column("in training", justify="right")
    for name, value in result.results.items():
        if isinstance(value, float) and name != "samples":
            before = training_results.get(name)
            in_training = f"{before:.6g}" if isinstance(before, float) else ""
            table.add_row(name, f"{value:.6g}", *([in_training] if training_results else []))
    console.print(table)
    lists = [name for name, value in result.results.items() if not isinstance(value, float)]
    if lists and result.output is None:
        console.print(f"--output FILE also writes: {', '.join(lists)}", soft_wrap=True, markup=False)
    if result.output is not None:
        console.print(f"written to {result.output}", soft_wrap=True, markup=False)


def _restored(strategy: Strategy, weights: LoadedWeights, averaging: WeightAverage | None) -> WeightAverage | None:
    """Load the checkpoint's raw weights into the prepared module, and its averaged weights into the average.

    Raises:
        CheckpointError: the weights do not fit, or there is no average.
    """
    try:
        load_module(
            strategy.state_io.load_module_state, strategy.unwrapped, weights.model, weights.objective, weights.buffers
        )
        if averaging is not None:
            averaging.load_state_dict(_usable(weights.averaging))
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not fit the configuration's model or objective: {error}") from error
    return averaging


def _usable(stored: Mapping[str, Any] | None) -> Mapping[str, Any]:
    try:
        return usable_average(stored)
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {error}; evaluate the raw weights: --weights raw") from None


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
