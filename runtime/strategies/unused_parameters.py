"""Parameters that a step does not use, and what that means under a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class UnusedParameters(NamedTuple):
    """Parameters that got no gradient from a batch.

    Args:
        names: of the parameters.
        refused_key: the key whose setting cannot train such a model; None if it trains without them.
        cure: what it means and what to do, as the end of a sentence that names the parameters.
    """

    names: Sequence[str]
    refused_key: tuple[str, ...] | None
    cure: str


LEAVE_OUT = "freeze what no step uses (model.freeze), or leave it out of the model"
