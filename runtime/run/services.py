"""Services shared by the components of a run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from runtime.checkpoints.run_folder import RunFolder
from runtime.distributed.stopping import StopRequest
from runtime.reporting.meters import PhaseTimes
from runtime.reporting.reporter import Reporter
from runtime.training.garbage import GarbageCollection


@dataclass(frozen=True)
class RunServices:
    """The run folder, the stop request, and where messages and times go.

    Args:
        closing: closed at the end of the run, which ends the workers of loaders.
    """

    folder: RunFolder
    stop_request: StopRequest
    reporter: Reporter
    times: PhaseTimes
    garbage: GarbageCollection
    closing: ExitStack = field(default_factory=ExitStack)

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop, or could not write a checkpoint."""
        return bool(self.stop_request) or self.folder.failing
