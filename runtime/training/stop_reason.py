"""Why a run ends; decided only in :meth:`runtime.training.triggers.Triggers.stop_reason`."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class StopReason(StrEnum):
    """Why a run ended without an error; equal on every rank.

    A run that fails has no stop reason, it raises: :class:`runtime.errors.DivergenceError` if a step diverged and the policy
    is to stop, another error of :mod:`runtime.errors` for everything else.
    """

    EARLY_STOPPING = "early stopping"
    """The result that ``limit.early_stopping`` watches no longer improves."""
    STOP_REQUEST = "stop request"
    """A rank got a signal, found the file STOP, reached ``limit.time``, lost its launcher, or could not write a checkpoint."""
    STEP_LIMIT = "step limit"
    """``limit.steps`` is reached."""
    EPOCH_LIMIT = "epoch limit"
    """``limit.epochs`` is reached."""

    @property
    def outcome(self) -> Literal["finished", "stopped"]:
        """``stopped`` if the same command continues the run, else ``finished``."""
        return "stopped" if self is StopReason.STOP_REQUEST else "finished"

    @property
    def before_limit(self) -> bool:
        """Whether the run ends before its limit, so that not everything is due."""
        return self in (StopReason.EARLY_STOPPING, StopReason.STOP_REQUEST)
