"""Weights & Biases through its SDK, on rank 0, with one run id for all starts of a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

from runtime.config.reporting import WeightsAndBiasesSection
from runtime.errors import MissingDependencyError
from runtime.evaluation.class_results import ClassResults
from runtime.evaluation.metrics import Result
from runtime.reporting.reporter import reason
from runtime.reporting.tracker import TrackedRun, Tracker, scalars

_INIT_SECONDS = 6.0  # with W&B's default of 90 s all ranks would wait for a server that does not answer
_FINISH_SECONDS = 60.0  # to upload the rest at the end; W&B has no timeout by default


class WandbTracker(Tracker):
    """Sends figures to W&B. A failure of W&B never ends a run: it is warned of once, and ``metrics.jsonl`` has everything.

    Args:
        section: ``reporting.wandb`` in the YAML.
        warn: called with a one-line warning.
        classes: extracts the results per class.
    """

    def __init__(
        self,
        section: WeightsAndBiasesSection,
        *,
        warn: Callable[[str], None],
        classes: ClassResults,
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingDependencyError("wandb", "reporting.wandb", "wandb") from None
        self._wandb: Any = wandb
        self._section = section
        self._warn = warn
        self._classes = classes
        self._run: Any = None
        self._sync_folder = ""
        self._mode = section.mode or os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")

    def start(self, run: TrackedRun) -> None:
        """Start or resume the W&B run; offline if the server cannot be used."""
        try:
            self._begin(run)
        except Exception as error:
            if self._mode != "online":
                self._warn(f"W&B could not be started ({reason(error)}); continuing without it")
                return
            self._run, self._mode = None, "offline"
            try:
                if self._wandb.run is None:
                    self._wandb.teardown()  # its service would still hold the run's id (wandb 0.31)
                self._begin(run)
            except Exception as second:
                self._warn(f"W&B could not be started ({reason(second)}); continuing without it")
                return
            self._warn(f"W&B's server cannot be used ({reason(error)}); the run is recorded offline")

    def _begin(self, run: TrackedRun) -> None:
        timeout = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": _INIT_SECONDS}
        self._run = self._wandb.init(
            project=self._section.project,
            entity=self._section.entity,
            tags=self._section.tags,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.configuration),
            mode=self._mode,
            settings=self._wandb.Settings(
                silent=True, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True, **timeout
            ),
        )
        # W&B's built-in step must increase and drops other rows; a run that was killed or rolled back repeats steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._sync_folder = str(self._run.settings.sync_dir)

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """Log the numbers and, for an evaluation, the table per class."""
        numbers = {f"{split}/{name}": value for name, value in scalars(values).items()}
        self._log(step, lambda: {"epoch": epoch, **numbers})
        table = self._classes.table(values) if split != "train" else None
        if table is not None:
            columns, rows = table
            self._log(step, lambda: {f"{split}/classes": self._wandb.Table(columns=list(columns), data=rows)})

    def log_figure(self, name: str, path: Path, *, step: int, split: str) -> None:
        """Log a picture."""
        self._log(step, lambda: {f"{split}/{name}": self._wandb.Image(str(path))})

    def finish(self, outcome: str) -> None:
        """Finish the W&B run; a stopped run can be resumed under the same id."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=0 if outcome != "failed" else 1)
        except TimeoutError:
            self._warn(
                f"uploading to W&B did not finish within {_FINISH_SECONDS:g} s; upload the rest with: {self._sync}"
            )
        except Exception as error:
            self._warn(f"W&B could not be finished ({reason(error)}); upload its local records with: {self._sync}")
        else:
            if self._mode == "offline":
                self._warn(f"W&B recorded this run offline; upload it with: {self._sync}")
        self._run = None

    @property
    def _sync(self) -> str:
        return f"wandb sync {shlex.quote(self._sync_folder)}"

    def _log(self, step: int, make_row: Callable[[], Mapping[str, Any]]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({**make_row(), "step": step})
        except Exception as error:  # a dying wandb-core raises ConnectionResetError and others
            self._run = None
            self._warn(
                f"W&B stopped working ({reason(error)}); continuing without it. Upload its local records with: {self._sync}"
            )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False
