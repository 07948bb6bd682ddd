"""What a class that reads data says of itself, so that one part of the data is read as another was."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.build.component import Component
from runtime.config.component import ComponentError


def name_of(reader: Any) -> str:
    """Return module and name of a reader's class; of a function, its own."""
    kind = reader if inspect.isclass(reader) else type(reader)
    return f"{kind.__module__}:{kind.__qualname__}"


def lacking_arguments(reader: Component, training: Component) -> list[str]:
    """Return the training data's arguments that a reader of the same class leaves out though it prepares samples by them."""
    if reader.target != training.target:
        return []
    shared = getattr(reader.locate(), "shared_arguments", ())
    return [argument for argument in shared if argument in training.args and argument not in reader.args]


def with_shared_arguments(
    predicted: Component, training: Component, preparation: Mapping[str, Any] | None = None
) -> Component:
    """Return what is predicted, with the arguments that its reader shares with the training data.

    A reader names these in ``shared_arguments``. Those that follow from what was fitted are what ``arguments_of(fitted)``
    returns. Arguments that are given come first.

    Args:
        preparation: what a checkpoint says about preparing data.
    """
    if predicted.target != training.target:
        return predicted
    try:
        found = predicted.locate()
    except ComponentError:
        return predicted  # told where it is checked
    shared = {name: training.args[name] for name in getattr(found, "shared_arguments", ()) if name in training.args}
    known = preparation or {}
    fitted = known.get("fitted") if known.get("reader") == name_of(found) else None
    if fitted is not None and hasattr(found, "arguments_of"):
        shared |= found.arguments_of(fitted)
    section = predicted.section.model_copy(update={"args": {**shared, **predicted.args}})
    return replace(predicted, section=section)
