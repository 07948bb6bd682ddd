"""What every part of a run may use while it trains."""

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
    """The run folder, the request to stop, and where messages and times go.

    Args:
        closing: workers of loaders live until it is closed.
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
