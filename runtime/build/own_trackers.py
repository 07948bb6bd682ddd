"""The user's own trackers, ``reporting.trackers``: checked before the start, made on rank 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.types import ComponentSection
from runtime.errors import LockstepError
from runtime.reporting.tracker import Tracker


def tracker_mistakes(section: ComponentSection, code: Path) -> list[ComponentError]:
    """Return what is wrong with an entry of ``reporting.trackers``, as far as it can be told without making the tracker."""
    found = component.check(section.target, section.args, code=code)
    if not found:
        located = component.locate(section.target, code=code)
        if inspect.isclass(located) and not issubclass(located, Tracker):
            found.append(ComponentError(f"{section.target} does not extend lockstep.Tracker"))
    return found


def make_own_trackers(
    sections: Sequence[ComponentSection], *, code: Path, warn: Callable[[str], None]
) -> Iterator[Tracker]:
    """Yield the user's own trackers; one that cannot be made is warned of, as one that stops working is."""
    for section in sections:
        try:
            made = component.build(section.target, section.args, code=code)
        except (ComponentError, LockstepError) as error:
            warn(f"reporting.trackers: {error}; going on without it")
            continue
        if isinstance(made, Tracker):
            yield made
        else:
            what = f"returned a {type(made).__name__}, which does not extend lockstep.Tracker"
            warn(f"reporting.trackers: {section.target} {what}; going on without it")
