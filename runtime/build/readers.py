"""Data readers: their names, and the arguments that readers of several parts of the data share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.build.component import Component
from runtime.config.component import ComponentError


def name_of(reader: Any) -> str:
    """Return ``module:name`` of a reader's class, or of a function."""
    kind = reader if inspect.isclass(reader) else type(reader)
    return f"{kind.__module__}:{kind.__qualname__}"


def lacking_arguments(reader: Component, training: Component) -> list[str]:
    """Return the ``shared_arguments`` that the training data sets and another reader of the same class leaves out."""
    if reader.target != training.target:
        return []
    shared = getattr(reader.locate(), "shared_arguments", ())
    return [argument for argument in shared if argument in training.args and argument not in reader.args]


def with_shared_arguments(
    predicted: Component, training: Component, preparation: Mapping[str, Any] | None = None
) -> Component:
    """Return the reader of the data to predict, completed with the arguments that it shares with the training data.

    A reader names these in ``shared_arguments``; ``arguments_of(fitted)`` returns those derived from fitted state. Arguments
    in the configuration take precedence.

    Args:
        preparation: a checkpoint's :attr:`DataSources.preparation`.
    """
    if predicted.target != training.target:
        return predicted
    try:
        reader = predicted.locate()
    except ComponentError:
        return predicted  # its check reports this
    shared = {name: training.args[name] for name in getattr(reader, "shared_arguments", ()) if name in training.args}
    stored = preparation or {}
    fitted = stored.get("fitted") if stored.get("reader") == name_of(reader) else None
    if fitted is not None and hasattr(reader, "arguments_of"):
        shared |= reader.arguments_of(fitted)
    section = predicted.section.model_copy(update={"args": {**shared, **predicted.args}})
    return replace(predicted, section=section)
