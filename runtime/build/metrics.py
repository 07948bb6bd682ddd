"""Builds the torchmetrics of ``evaluation.metrics``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.build.component import Component, call_mistakes
from runtime.config.component import ComponentError
from runtime.config.locations import Locations
from runtime.config.metric_tasks import incomplete
from runtime.errors import EvaluationError

if TYPE_CHECKING:
    from torchmetrics import Metric


def metric_mistakes(metric: Component) -> list[ComponentError]:
    """Check a metric's task and arguments."""
    what = incomplete(metric.key[-1], metric.section)
    return [ComponentError(what, ())] if what is not None else call_mistakes(metric)


def build_metrics(
    components: Mapping[str, Component], *, class_names: Sequence[str] | None, has_groups: bool, where: Locations
) -> dict[str, Metric]:
    """Build the metrics; each call makes new ones.

    Args:
        components: by the name in the results.
        class_names: as configured.
        has_groups: whether ``data.fields.group`` is set.

    Raises:
        ConfigurationError: a metric cannot be built, or its inputs are not available.
    """
    if not components:
        return {}  # importing torchmetrics takes seconds
    from torchmetrics import Metric

    from runtime.evaluation.class_results import num_classes_of
    from runtime.evaluation.metric_inputs import signature_of

    metrics: dict[str, Metric] = {}
    for name, bound in components.items():
        metric = metrics[name] = bound.build()
        if not isinstance(metric, Metric):
            raise bound.error("is not a torchmetrics.Metric", "target")
        try:
            inputs = signature_of(metric)
        except EvaluationError as error:
            raise bound.error(str(error), "target") from error
        if inputs.needs_group and not has_groups:
            raise bound.error(
                f"{bound.target} is computed per query: set data.fields.group to the part of a batch that names the query"
            )
    sizes = {size for metric in metrics.values() if (size := num_classes_of(metric)) is not None}
    if class_names is not None and sizes != {len(class_names)}:
        expected = " or ".join(map(str, sorted(sizes))) or "no"
        what = f"{len(class_names)} names, but the metrics have {expected} classes"
        raise where.error(("evaluation", "class_names"), what)
    return metrics
