"""The user's own trackers, ``reporting.trackers``: checked before the start, made on rank 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator

from runtime.build.component import Component, call_mistakes
from runtime.config.component import ComponentError
from runtime.errors import LockstepError
from runtime.reporting.tracker import Tracker


def tracker_mistakes(bound: Component) -> list[ComponentError]:
    """Return what is wrong with an entry of ``reporting.trackers``, as far as it can be told without making the tracker."""
    found = call_mistakes(bound)
    if not found:
        located = bound.locate()
        if inspect.isclass(located) and not issubclass(located, Tracker):
            found.append(ComponentError(f"{bound.target} does not extend lockstep.Tracker"))
    return found


def make_own_trackers(trackers: Iterable[Component], *, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """Yield the user's own trackers; one that cannot be made is warned of, as one that stops working is."""
    for bound in trackers:
        try:
            made = bound.build()
        except LockstepError as error:
            warn(f"{error}; going on without it")
            continue
        if isinstance(made, Tracker):
            yield made
        else:
            what = f"returned a {type(made).__name__}, which does not extend lockstep.Tracker"
            warn(f"reporting.trackers: {bound.target} {what}; going on without it")
