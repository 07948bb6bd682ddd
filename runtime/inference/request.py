"""What an evaluation or a prediction apart from training is asked for, and what of it can be checked before it is begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.build import sources
from runtime.checkpoints.resolve import check_choice
from runtime.config.file import LoadedConfiguration
from runtime.errors import ConfigurationError, Problem
from runtime.inference.predictions_file import check_target, format_of
from runtime.inference.sample_submission import header_of

Which = Literal["raw", "averaged"]
_DEFAULT_SPLITS = {"evaluate": ("validation", "test"), "predict": ("predict", "test")}


@dataclass(frozen=True)
class Request:
    """What is asked for besides the configuration.

    Args:
        act: ``evaluate`` or ``predict``.
        checkpoint: ``newest``, ``best:METRIC`` or a path.
        split: ``train``, ``validation``, ``test`` or ``predict``. Default: validation data for an evaluation, what is to be
            predicted for a prediction; else test data.
        weights: default: what the run's own evaluations took.
        output: file to write. Default: none for an evaluation, ``predictions.csv`` in the run folder for a prediction.
        force: write over a file that is there.
    """

    act: Literal["evaluate", "predict"]
    checkpoint: str = "newest"
    split: str | None = None
    weights: Which | None = None
    output: Path | None = None
    force: bool = False

    def target(self, loaded: LoadedConfiguration) -> Path | None:
        """Return the file to write, if there is to be one."""
        default = loaded.output / "predictions.csv" if self.act == "predict" else None
        return self.output or default

    def split_in(self, loaded: LoadedConfiguration) -> str:
        """Return the split that is meant.

        Raises:
            ConfigurationError: there is no such data.
        """
        there = [name for name in sources.SPLITS if sources.has_split(loaded, name)]
        for name in _DEFAULT_SPLITS[self.act] if self.split is None else (self.split,):
            if name in there:
                return name
        default = "data.validation or data.test" if self.act == "evaluate" else "prediction.data or data.test"
        missing = default if self.split is None else ".".join(sources.split_key(self.split))
        what = f"there is no {missing} in the configuration; it has: {', '.join(there)}"
        raise ConfigurationError([Problem("command line", "--split", what)])

    def weights_in(self, loaded: LoadedConfiguration) -> Which:
        """Return which weights are meant.

        Raises:
            ConfigurationError: the run has no averaged weights.
        """
        section = loaded.values.averaging
        if self.weights == "averaged" and section is None:
            what = "the configuration has no averaging, so there are raw weights only"
            raise ConfigurationError([Problem("command line", "--weights", what)])
        return self.weights or ("averaged" if section is not None and section.evaluate else "raw")


def check_request(loaded: LoadedConfiguration, request: Request) -> None:
    """Refuse what is seen to be wrong before any process is started and any device touched.

    Raises:
        LockstepError: what is wrong.
    """
    request.split_in(loaded)
    request.weights_in(loaded)
    check_choice(loaded.output, request.checkpoint, loaded.values.checkpoint.best)
    target = request.target(loaded)
    if request.act == "predict" and target is not None:
        format_of(target)
        sample = loaded.values.prediction.sample_submission
        if sample is not None:
            columns_of_sample(loaded, target, header_of(Path(sample)))
    if target is not None:
        check_target(target, force=request.force)


def columns_of_sample(loaded: LoadedConfiguration, target: Path, header: Sequence[str]) -> Mapping[str, str]:
    """Return what each column of a sample submission is to hold.

    Raises:
        ConfigurationError: that is not said, or the file to write is no CSV file.
    """
    section = loaded.values.prediction
    key, what = ("prediction", "columns"), ""
    ids = [name for name, kind in section.columns.items() if kind == "id"]
    if target.suffix != ".csv":
        raise ConfigurationError(
            [Problem("command line", "--output", f"{target}: a sample submission is filled in as .csv")]
        )
    if not section.columns and len(header) == 2:
        called = loaded.values.data.fields.id
        other = header[0] if header[1] == called else header[1]
        return {name: "prediction" if name == other else "id" for name in header}
    if not section.columns:
        what = f"say what each column of {section.sample_submission} holds: {', '.join(header)}"
    elif len(ids) != 1 or ids[0] not in header:
        what = f"one column of {section.sample_submission} must hold 'id'; it has: {', '.join(header)}"
    if what:
        raise ConfigurationError([loaded.problem(key, what)])
    return section.columns
