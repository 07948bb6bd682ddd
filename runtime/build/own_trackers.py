"""The user's own trackers (``reporting.trackers``): checked before the start, built on rank 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator

from runtime.build.component import Component, call_mistakes
from runtime.config.component import ComponentError
from runtime.errors import LockstepError
from runtime.reporting.tracker import Tracker


def tracker_mistakes(bound: Component) -> list[ComponentError]:
    """Check an entry of ``reporting.trackers`` without building the tracker."""
    mistakes = call_mistakes(bound)
    if not mistakes:
        located = bound.locate()
        if inspect.isclass(located) and not issubclass(located, Tracker):
            mistakes.append(ComponentError(f"{bound.target} does not extend lockstep.Tracker"))
    return mistakes


def make_own_trackers(trackers: Iterable[Component], *, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """Yield the user's own trackers; warn about each that cannot be built, and leave it out."""
    for bound in trackers:
        try:
            tracker = bound.build()
        except LockstepError as error:
            warn(f"{error}; continuing without it")
            continue
        if isinstance(tracker, Tracker):
            yield tracker
        else:
            what = f"returned a {type(tracker).__name__}, which does not extend lockstep.Tracker"
            warn(f"reporting.trackers: {bound.target} {what}; continuing without it")
