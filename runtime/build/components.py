"""The table of all keys that name a class or a function, used by the configuration check and by all builders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.build.component import Component, call_mistakes, function_mistakes
from runtime.build.metrics import metric_mistakes
from runtime.build.objective import loss_mistakes
from runtime.build.optimizer import checked_with_optimizer, optimizer_mistakes
from runtime.build.orders import sampler_mistakes
from runtime.build.own_trackers import tracker_mistakes
from runtime.build.readers import with_shared_arguments
from runtime.build.schedule import schedule_mistakes
from runtime.config import component
from runtime.config.component import ComponentError
from runtime.config.file import LoadedConfiguration
from runtime.config.locations import Locations
from runtime.config.sections import RunConfiguration
from runtime.errors import ConfigurationError, MissingDependencyError
from runtime.optimization import optimizer, schedulers

MODELS = ("runtime.model_zoo",)
SOURCES = ("runtime.data_sources",)
SAMPLERS = ("torch.utils.data",)
TRANSFORMS = ("runtime.data.transforms",)
COLLATES = ("runtime.data.collating",)
OBJECTIVES = ("runtime.losses.by_name", "runtime.losses.focal", "runtime.losses.pairwise", "torch.nn")
METRICS = (  # torchmetrics itself comes last: some of its names are deprecated duplicates of these
    "torchmetrics.classification",
    "torchmetrics.regression",
    "torchmetrics.retrieval",
    "torchmetrics.text",
    "torchmetrics.aggregation",
    "torchmetrics.clustering",
    "torchmetrics.nominal",
    "torchmetrics.segmentation",
    "torchmetrics.image",
    "torchmetrics",
)


@dataclass(frozen=True)
class Row:
    """One key, or all entries of a mapping or a list.

    Args:
        key: dotted; ``*`` stands for each name or index.
        namespaces: modules in which a short name is looked up, in order.
        mistakes: the check of this kind of component.
    """

    key: str
    namespaces: Sequence[str] = ()
    mistakes: Callable[[Component], Iterable[ComponentError]] = call_mistakes


TABLE = (
    Row("model", MODELS),
    Row("data.train", SOURCES),
    Row("data.train.transform", TRANSFORMS, function_mistakes),
    Row("data.validation", SOURCES),
    Row("data.validation.transform", TRANSFORMS, function_mistakes),
    Row("data.test", SOURCES),
    Row("data.test.transform", TRANSFORMS, function_mistakes),
    Row("prediction.data", SOURCES),
    Row("prediction.data.transform", TRANSFORMS, function_mistakes),
    Row("data.split.transform", TRANSFORMS, function_mistakes),
    Row("data.collate", COLLATES, function_mistakes),
    Row("data.loader.worker_init", (), function_mistakes),
    Row("data.split.stratify", (), function_mistakes),
    Row("data.split.group", (), function_mistakes),
    Row("data.group_by_length.lengths", (), function_mistakes),
    Row("data.budget.lengths", (), function_mistakes),
    Row("data.balance.classes", (), function_mistakes),
    Row("data.weights.values", (), function_mistakes),
    Row("data.sampler", SAMPLERS, sampler_mistakes),
    Row("data.batch_sampler", SAMPLERS, sampler_mistakes),
    Row("objective", OBJECTIVES, loss_mistakes),
    Row("objective.losses.*", OBJECTIVES, loss_mistakes),
    Row("optimizer", optimizer.NAMESPACES, optimizer_mistakes),
    Row("optimizer.groups.*", optimizer.NAMESPACES, checked_with_optimizer),
    Row("schedule", schedulers.NAMESPACES, schedule_mistakes),
    Row("evaluation.metrics.*", METRICS, metric_mistakes),
    Row("reporting.trackers.*", (), tracker_mistakes),
    Row("reporting.observers.*", (), function_mistakes),
)
"""In the order in which mistakes are reported."""


class Components:
    """The components of one configuration, each bound to its key.

    Args:
        code: the folder of the user's own modules.
        where: where each key was written.
    """

    def __init__(self, values: RunConfiguration, *, code: Path, where: Locations) -> None:
        self._code = code
        self._bound = {
            key: Component(key, section, row.namespaces, code, where, row.mistakes)
            for row in TABLE
            for key, section in _sections(values, tuple(row.key.split(".")))
        }
        predicted = self.find("prediction", "data")
        if predicted is not None:  # its reader may share arguments with that of the training data
            training = self.of("data", "train")
            self._bound[predicted.key] = replace(
                predicted, mistakes=lambda bound: call_mistakes(with_shared_arguments(bound, training))
            )

    def find(self, *key: str) -> Component | None:
        """Return the component of a key, or None if it is not configured."""
        return self._bound.get(key)

    def of(self, *key: str) -> Component:
        """Return the component of a required key."""
        return self._bound[key]

    def below(self, *key: str) -> dict[str, Component]:
        """Return the components of a mapping, by name."""
        return {name: bound for (*above, name), bound in self._bound.items() if tuple(above) == key}

    def check(self) -> None:
        """Look up every target and check all arguments against signatures; nothing is called, no device is used.

        Raises:
            ConfigurationError: all mistakes together.
        """
        component.add_code_folder(self._code)
        if problems := [problem for bound in self._bound.values() for problem in bound.check()]:
            raise ConfigurationError(problems)


def check_components(loaded: LoadedConfiguration) -> None:
    """Check all components of a configuration, and that the packages it needs are installed.

    Raises:
        ConfigurationError: all mistakes together.
        MissingDependencyError: reporting.wandb is configured, but wandb is not installed.
    """
    if loaded.values.reporting.wandb is not None and find_spec("wandb") is None:
        raise MissingDependencyError("wandb", "reporting.wandb", "wandb")
    Components(loaded.values, code=loaded.code, where=loaded.where).check()


def _sections(section: Any, parts: tuple[str, ...], key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the key and section of each component that matches a pattern of keys."""
    if not parts:
        if getattr(section, "target", None) is not None:
            yield key, section
        return
    name, *rest = parts
    if name == "*":
        inner = section.items() if isinstance(section, Mapping) else enumerate(section)
        for index, entry in inner:
            yield from _sections(entry, tuple(rest), (*key, str(index)))
    elif hasattr(section, name):
        yield from _sections(getattr(section, name), tuple(rest), (*key, name))
