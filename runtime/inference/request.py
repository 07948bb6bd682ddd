"""Requests for an evaluation or a prediction of a checkpoint, and the checks that need no process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.build.sources import available_splits, split_key
from runtime.checkpoints.resolve import check_choice
from runtime.config.data import DataSection
from runtime.config.file import LoadedConfiguration
from runtime.config.learning import AveragingSection
from runtime.config.locations import Locations
from runtime.config.sections import PredictionSection
from runtime.data.fields import Name
from runtime.errors import ConfigurationError, Problem
from runtime.inference.predictions_file import check_target, format_of
from runtime.inference.sample_submission import header_of

WeightKind = Literal["raw", "averaged"]
_DEFAULT_SPLITS = {"evaluate": ("validation", "test"), "predict": ("predict", "test")}


@dataclass(frozen=True)
class InferenceRequest:
    """A command's options in addition to the configuration.

    Args:
        act: ``evaluate`` or ``predict``.
        checkpoint: ``newest``, ``best:METRIC`` or a path.
        split: ``train``, ``validation``, ``test`` or ``predict``. Default: validation data for an evaluation,
            ``prediction.data`` for a prediction; else test data.
        weights: default: those that the run's own evaluations use.
        output: file to write. Default: none for an evaluation, ``predictions.csv`` in the run folder for a prediction.
        force: overwrite an existing file.
    """

    act: Literal["evaluate", "predict"]
    checkpoint: str = "newest"
    split: str | None = None
    weights: WeightKind | None = None
    output: Path | None = None
    force: bool = False

    def target(self, run_folder: Path) -> Path | None:
        """Return the file to write, if any."""
        default = run_folder / "predictions.csv" if self.act == "predict" else None
        return self.output or default

    def split_in(self, data: DataSection, prediction: PredictionSection) -> str:
        """Return the requested or default split.

        Raises:
            ConfigurationError: the configuration has no such data.
        """
        available = available_splits(data, prediction)
        for name in _DEFAULT_SPLITS[self.act] if self.split is None else (self.split,):
            if name in available:
                return name
        default = "data.validation or data.test" if self.act == "evaluate" else "prediction.data or data.test"
        missing = default if self.split is None else ".".join(split_key(self.split))
        message = f"there is no {missing} in the configuration; it has: {', '.join(available)}"
        raise ConfigurationError([Problem("command line", "--split", message)])

    def weights_in(self, averaging: AveragingSection | None) -> WeightKind:
        """Return the requested or default weights.

        Raises:
            ConfigurationError: the run has no averaged weights.
        """
        if self.weights == "averaged" and averaging is None:
            message = "the configuration has no averaging, so there are raw weights only"
            raise ConfigurationError([Problem("command line", "--weights", message)])
        return self.weights or ("averaged" if averaging is not None and averaging.evaluate else "raw")


def check_request(loaded: LoadedConfiguration, request: InferenceRequest) -> None:
    """Check a request before any process is started or device used.

    Raises:
        LockstepError: the request cannot be satisfied.
    """
    values = loaded.values
    request.split_in(values.data, values.prediction)
    request.weights_in(values.averaging)
    check_choice(loaded.output, request.checkpoint, values.checkpoint.best)
    target = request.target(loaded.output)
    if request.act == "predict" and target is not None:
        format_of(target)
        sample = values.prediction.sample_submission
        if sample is not None:
            header = header_of(Path(sample))
            columns_of_sample(values.prediction, target, header, id_field=values.data.fields.id, where=loaded.where)
    if target is not None:
        check_target(target, force=request.force)


def columns_of_sample(
    section: PredictionSection, target: Path, header: Sequence[str], *, id_field: Name | None, where: Locations
) -> Mapping[str, str]:
    """Return the kind of each column of a sample submission.

    Args:
        target: the file to write.
        header: of the sample submission.
        id_field: the part of a batch that holds the samples' ids.

    Raises:
        ConfigurationError: ``prediction.columns`` does not determine it, or the file to write is not a CSV file.
    """
    key, message = ("prediction", "columns"), ""
    ids = [name for name, kind in section.columns.items() if kind == "id"]
    if target.suffix != ".csv":
        raise ConfigurationError(
            [Problem("command line", "--output", f"{target}: a sample submission is written as .csv")]
        )
    if not section.columns and len(header) == 2:
        other = header[0] if header[1] == id_field else header[1]
        return {name: "prediction" if name == other else "id" for name in header}
    if not section.columns:
        message = f"set what each column of {section.sample_submission} holds: {', '.join(header)}"
    elif len(ids) != 1 or ids[0] not in header:
        message = f"one column of {section.sample_submission} must hold 'id'; it has: {', '.join(header)}"
    if message:
        raise where.error(key, message)
    return section.columns
