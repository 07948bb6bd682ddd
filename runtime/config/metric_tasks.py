"""Fills in the task and number of classes of torchmetrics' metrics from objective and model. Imports no torch."""

from __future__ import annotations

from typing import Any

from runtime.config.sections import RunConfiguration
from runtime.config.signatures import class_name
from runtime.config.types import ComponentSection

_BY_TASK = (  # of torchmetrics.classification: those whose first argument is the task
    *(
        "AUROC",
        "Accuracy",
        "AveragePrecision",
        "CalibrationError",
        "CohenKappa",
        "ConfusionMatrix",
        "EER",
        "ExactMatch",
    ),
    *("F1Score", "FBetaScore", "HammingDistance", "HingeLoss", "JaccardIndex", "LogAUC", "MatthewsCorrCoef"),
    *("NegativePredictiveValue", "Precision", "PrecisionAtFixedRecall", "PrecisionRecallCurve", "ROC", "Recall"),
    *("RecallAtFixedPrecision", "SensitivityAtSpecificity", "Specificity", "SpecificityAtSensitivity", "StatScores"),
)
_OUTPUTS = ("num_classes", "num_labels", "n_classes", "out_features")
"""Arguments of models that set the number of outputs."""


def with_tasks(values: RunConfiguration) -> RunConfiguration:
    """Return the configuration with the known tasks of its metrics filled in."""
    metrics = {
        name: metric.model_copy(update={"args": {**_inferred(values, metric.args.get("task")), **metric.args}})
        if _has_task(metric)
        else metric
        for name, metric in values.evaluation.metrics.items()
    }
    return values.model_copy(update={"evaluation": values.evaluation.model_copy(update={"metrics": metrics})})


def incomplete(name: str, metric: ComponentSection) -> str | None:
    """Return an error message with the line to write if a metric lacks its task or number of classes, else None."""
    if not _has_task(metric) or ("task" in metric.args and _size_key(metric.args["task"]) in (None, *metric.args)):
        return None
    return _line_to_write(name, metric, metric.args.get("task", "multiclass"))


def _has_task(metric: ComponentSection) -> bool:
    name = class_name(metric.target)
    return name in _BY_TASK and (metric.target == name or metric.target.startswith("torchmetrics"))


def _size_key(task: Any) -> str | None:
    return {"multiclass": "num_classes", "multilabel": "num_labels"}.get(str(task))


def _inferred(values: RunConfiguration, task: Any) -> dict[str, Any]:
    """Infer a metric's task, and its number of classes or labels, from objective, model and class names."""
    loss, outputs = class_name(values.objective.target), _outputs(values)
    if task is None and loss in ("CrossEntropyLoss", "NLLLoss"):
        task = "multiclass"
    if task is None and loss in ("BCEWithLogitsLoss", "BCELoss") and outputs is not None:
        task = "multilabel" if outputs > 1 else "binary"
    names = values.evaluation.class_names
    size = outputs or (len(names) if names is not None and task == "multiclass" else None)
    inferred: dict[Any, Any] = {"task": task, _size_key(task): size if size != 1 else None}
    return {key: value for key, value in inferred.items() if key is not None and value is not None}


def _outputs(values: RunConfiguration) -> int | None:
    """Return the model's number of outputs, if its arguments set it unambiguously."""
    sizes = {size for name in _OUTPUTS if isinstance(size := values.model.args.get(name), int)}
    return sizes.pop() if len(sizes) == 1 else None


def _line_to_write(name: str, metric: ComponentSection, task: Any) -> str:
    args: dict[Any, Any] = {"task": task, _size_key(task): "N", **metric.args}
    line = f"{{target: {metric.target}, args: {{{', '.join(f'{key}: {value}' for key, value in args.items())}}}}}"
    binary = "" if "task" in metric.args else ", or {task: binary} for a model with one output"
    return f"write {name}: {line}, where N is the model's number of outputs{binary}"
