"""Weights & Biases through its SDK, on rank 0, with one run id for the whole life of a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from runtime.config.reporting import WeightsAndBiases
from runtime.errors import MissingDependencyError
from runtime.evaluation.class_results import ClassResults
from runtime.evaluation.metrics import Result

_INIT_SECONDS = 6.0  # W&B's own 90 s would keep all ranks waiting, for a server that does not answer
_FINISH_SECONDS = 60.0  # to upload what is left at the end; W&B's own is without end


class WandbTracker:
    """Sends figures to W&B, whose failure never ends a run: it is warned of once, and ``metrics.jsonl`` has everything.

    Args:
        section: the configuration's section.
        name: the run's name.
        run_id: the same at every start of one run.
        folder: the run folder.
        configuration: the resolved configuration.
        warn: takes a line about what W&B could not do.
        classes: finds the results per class.
        pictures: returns the pictures of the evaluation of a split after a step.
    """

    def __init__(
        self,
        section: WeightsAndBiases,
        *,
        name: str,
        run_id: str,
        folder: Path,
        configuration: Mapping[str, Any],
        warn: Callable[[str], None],
        classes: ClassResults,
        pictures: Callable[[str, int], Mapping[str, Path]],
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError("wandb", "reporting.wandb", "wandb") from None
        self._warn = warn
        self._classes = classes
        self._pictures = pictures
        self._run: Any = None
        self._sync_folder = ""
        more = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": _INIT_SECONDS}
        settings = wandb.Settings(silent=True, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True, **more)

        def begin(mode: Any) -> None:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                tags=section.tags,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(configuration),
                mode=mode,
                settings=settings,
            )
            # W&B's own step must only grow and drops the rest; a run that was killed or rolled back takes steps again.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            self._sync_folder = str(self._run.settings.sync_dir)

        self._mode = section.mode or os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        try:
            begin(self._mode)
        except Exception as error:
            if self._mode != "online":
                warn(f"W&B could not be started ({_reason(error)}); going on without it")
                return
            self._run, self._mode = None, "offline"
            try:
                if wandb.run is None:
                    wandb.teardown()  # its service would still hold the run's id (wandb 0.31)
                begin(self._mode)
            except Exception as second:
                warn(f"W&B could not be started ({_reason(second)}); going on without it")
                return
            warn(f"W&B's server cannot be used ({_reason(error)}); the run is recorded offline")

    def start(self, facts: Mapping[str, Any]) -> None:
        """Nothing: the configuration is there already."""

    def train(self, step: int, epoch: int, values: Mapping[str, Result]) -> None:
        """Log a report of training."""
        self._log(step, {"epoch": epoch, **{f"train/{name}": value for name, value in values.items()}})

    def evaluation(self, split: str, step: int, epoch: int, results: Mapping[str, Result]) -> None:
        """Log the results of an evaluation."""
        self._log(step, {"epoch": epoch, **{f"{split}/{name}": value for name, value in results.items()}})
        if self._run is not None:
            self._guarded(lambda: self._log_figures(split, step, results))

    def _log_figures(self, split: str, step: int, results: Mapping[str, Result]) -> None:
        import wandb

        figures: dict[str, Any] = {
            f"{split}/{name}": wandb.Image(str(path)) for name, path in self._pictures(split, step).items()
        }
        table = self._classes.table(results)
        if table is not None:
            figures[f"{split}/classes"] = wandb.Table(columns=list[str | int](table[0]), data=table[1])
        if figures:
            self._run.log({**figures, "step": step})

    def rewind(self, step: int) -> None:
        """Nothing: W&B keeps what was logged, and shows beside it what is logged for a step again."""

    def message(self, text: str) -> None:
        """Nothing: W&B keeps the console's output itself."""

    def close(self, outcome: str) -> None:
        """Finish the run; a run that was stopped can be resumed under the same id."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=0 if outcome != "failed" else 1)
        except TimeoutError:
            self._warn(
                f"W&B's server has not taken all within {_FINISH_SECONDS:g} s; upload the rest with: {self._sync}"
            )
        except Exception as error:
            self._warn(f"W&B could not be finished ({_reason(error)}); upload what it has with: {self._sync}")
        else:
            if self._mode == "offline":
                self._warn(f"W&B has this run offline only; upload it with: {self._sync}")
        self._run = None

    @property
    def _sync(self) -> str:
        return f"wandb sync {shlex.quote(self._sync_folder)}"

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self._guarded(lambda: self._run.log({**numbers, "step": step}))

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # a dying wandb-core raises ConnectionResetError and others
            self._run = None
            self._warn(
                f"W&B stopped working ({_reason(error)}); going on without it. Upload what it has with: {self._sync}"
            )


def _reason(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False
