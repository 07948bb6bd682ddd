"""Parameters that a step does not use, and the consequence under a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class UnusedParameters(NamedTuple):
    """Parameters that got no gradient from a batch.

    Args:
        names: of the parameters.
        refused_key: configuration key whose value cannot train such a model; None if training works without them.
        remedy: consequence and remedy, to follow the parameters' names in a message.
    """

    names: Sequence[str]
    refused_key: tuple[str, ...] | None
    remedy: str


LEAVE_OUT = "freeze parameters that no step uses (model.freeze), or remove them from the model"
