"""Settings from the launcher and the environment (``launcher_table.py``): adopted into the configuration, or refused.

A setting that the YAML leaves out is adopted and logged. One that contradicts the YAML is refused, and so is one that Lockstep
has no key for. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from runtime.config.data import BatchSection
from runtime.config.file import LoadedConfiguration
from runtime.config.launcher_table import ACCUMULATION, REFUSED, SETTINGS, WITHOUT_EFFECT, NoKeyError, Variables
from runtime.config.locations import Locations
from runtime.errors import ConfigurationError, Problem

_OFF = ("", "0", "no", "false", "none")
_TRAINING_ONLY = ("optimizer.max_grad_norm", ACCUMULATION)


@dataclass(frozen=True)
class LauncherValue:
    """A value for a key, set outside the YAML.

    Args:
        where: it was set, as the subject of a sentence.
    """

    key: str
    value: Any
    where: str


_NAMES = {setting.variable for setting in SETTINGS} | {name for name, *_ in (*REFUSED, *WITHOUT_EFFECT)}


def load_with_settings(
    read: Callable[[list[str]], LoadedConfiguration], variables: Variables, *, world_size: int, trains: bool = True
) -> tuple[LoadedConfiguration, list[LauncherValue], list[str]]:
    """Return the configuration with the environment's settings, the adopted settings, and a log line about each.

    Args:
        read: reads the configuration with additional overrides.
        world_size: processes of the launch.
        trains: whether training-only settings apply.

    Raises:
        ConfigurationError: the configuration is wrong, or a setting cannot be adopted.
    """
    loaded = read([])
    adopted = adopt(loaded, variables, world_size=world_size, trains=trains)
    if adopted:
        loaded = read(overrides(adopted))
    return loaded, adopted, [*map(_description, adopted), *_without_effect(variables)]


def adopt(
    loaded: LoadedConfiguration, variables: Variables, *, world_size: int, trains: bool = True
) -> list[LauncherValue]:
    """Return the settings that the YAML leaves out, to be added to it.

    Args:
        variables: of the environment.
        world_size: processes of the launch.
        trains: whether training-only settings apply.

    Raises:
        ConfigurationError: settings contradict the YAML or have no key; all mistakes together.
    """
    settings, problems = _read_settings(variables)
    adopted: dict[str, LauncherValue] = {}
    for setting in settings:
        if setting.key in _TRAINING_ONLY and not trains:
            continue
        unset = not _is_set(loaded.values, setting.key)
        if setting.key == ACCUMULATION:
            unset = loaded.values.batch.slots is None and loaded.values.batch.micro_size is None
            problem, setting = _accumulation(loaded.values.batch, setting, world_size, loaded.where)
        else:
            problem = _contradiction(loaded.values, setting, loaded.where)
        before = adopted.get(setting.key)
        if problem is None and before is not None and before.value != setting.value:
            problem = Problem(setting.where, "", f"is {setting.value!r}, but {before.where} is {before.value!r}")
        if problem is not None:
            problems.append(problem)
        elif unset:
            adopted[setting.key] = setting
    if problems:
        raise ConfigurationError(problems)
    return list(adopted.values())


def _without_effect(variables: Variables) -> list[str]:
    """Return a line for each setting that has no effect."""
    return [
        f"{variable}={value} has no effect: {instead}"
        for variable, value, counts, instead in WITHOUT_EFFECT
        if variables.get(variable, "").lower() == value.lower() and counts(variables)
    ]


@contextmanager
def hidden() -> Iterator[None]:
    """Remove the settings from this process's environment temporarily: Accelerate would apply them in addition to the YAML."""
    names = [name for name in os.environ if name in _NAMES]
    before = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(before)


def overrides(adopted: list[LauncherValue]) -> list[str]:
    """Return adopted settings as overrides, for processes in whose environment the launcher replaces them by its own."""
    return [f"{setting.key}={json.dumps(setting.value)}" for setting in adopted]


def _description(setting: LauncherValue) -> str:
    """Return the log line about an adopted setting."""
    return f"{setting.key}: {setting.value} is adopted from {setting.where}; the YAML does not set it"


def _read_settings(variables: Variables) -> tuple[list[LauncherValue], list[Problem]]:
    settings, problems = [], []
    for variable, option, counts, hint in REFUSED:
        if variables.get(variable, "").lower() not in _OFF and counts(variables):
            problems.append(Problem("environment", variable, f"is set (accelerate launch {option}): {hint}"))
    for setting in SETTINGS:
        text = variables.get(setting.variable, "")
        if not text or not setting.counts(variables):
            continue
        try:
            value = setting.read(text)
        except NoKeyError as error:
            what = f"is {text!r} (accelerate launch {setting.option}), which {error}"
            problems.append(Problem("environment", setting.variable, what))
            continue
        if value is not None:
            where = f"{setting.variable} (accelerate launch {setting.option})"
            settings.append(LauncherValue(setting.key, value, where))
            if setting.key == "strategy.zero.file":
                settings += _settings_of_file(Path(value))
    return settings, problems


def _settings_of_file(path: Path) -> Iterator[LauncherValue]:
    """Yield the settings of a DeepSpeed JSON file that have a key in the YAML; an invalid file is reported later."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    content = content if isinstance(content, dict) else {}

    def inner(section: str, name: str) -> Any:
        values = content.get(section)
        return values.get(name) if isinstance(values, dict) else None

    zero = content.get("zero_optimization")
    for precision in ("bf16", "fp16"):
        if inner(precision, "enabled") is True:
            yield LauncherValue("precision", precision, f"{path} {precision}.enabled")
    if isinstance(stage := inner("zero_optimization", "stage"), int):
        yield LauncherValue("strategy.zero.stage", stage, f"{path} zero_optimization.stage")
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        offload = zero.get(name) if isinstance(zero, dict) else None
        if isinstance(offload, dict) and offload.get("device") in ("cpu", "nvme"):
            parts = {"device": offload["device"], "path": offload.get("nvme_path")}
            parts |= {"pin_memory": offload["pin_memory"]} if isinstance(offload.get("pin_memory"), bool) else {}
            value = {name: part for name, part in parts.items() if part is not None}
            yield LauncherValue(f"strategy.zero.{key}", value, f"{path} zero_optimization.{name}")
    clipping = content.get("gradient_clipping")
    if isinstance(clipping, int | float) and clipping > 0:
        yield LauncherValue("optimizer.max_grad_norm", float(clipping), f"{path} gradient_clipping")
    steps = content.get("gradient_accumulation_steps")
    if isinstance(steps, int) and steps > 1:
        yield LauncherValue(ACCUMULATION, steps, f"{path} gradient_accumulation_steps")


def _contradiction(values: BaseModel, setting: LauncherValue, where: Locations) -> Problem | None:
    """Return a problem if the YAML sets another value."""
    key = setting.key.split(".")
    if setting.key == "optimizer.max_grad_norm" and _value(values, "optimizer.max_grad_value") is not None:
        key = ["optimizer", "max_grad_value"]
        same = False
    elif not _is_set(values, setting.key):
        return None
    else:
        same = _same(_value(values, setting.key), setting, where)
    if same:
        return None
    in_yaml = _value(values, ".".join(key))
    in_yaml = in_yaml.model_dump() if isinstance(in_yaml, BaseModel) else in_yaml
    what = f"is {in_yaml!r}, but {setting.where} is {setting.value!r}: set both to the same value, or leave one of them out"
    return where.problem(key, what)


def _same(in_yaml: Any, setting: LauncherValue, where: Locations) -> bool:
    if setting.key == "strategy.zero.file":
        return in_yaml is not None and where.beside(in_yaml).resolve() == Path(setting.value).resolve()
    if setting.key.startswith("strategy.zero.offload_"):
        device = setting.value["device"] if isinstance(setting.value, dict) else setting.value
        return in_yaml is not None and in_yaml.device == device
    return bool(in_yaml == setting.value)


def _accumulation(
    batch: BatchSection, setting: LauncherValue, world_size: int, where: Locations
) -> tuple[Problem | None, LauncherValue]:
    """Convert gradient accumulation steps per rank to a microbatch size; return a problem if the YAML contradicts it."""
    steps = setting.value
    micro_size = -(-batch.global_size // (steps * world_size))
    adopted = LauncherValue(ACCUMULATION, micro_size, f"{steps} microbatches on each rank, by {setting.where}")
    key = next((name for name in ("slots", "micro_size") if getattr(batch, name) is not None), None)
    if key is None or batch.micro_size == micro_size:
        return None, adopted
    slots = batch.slots or (-(-batch.global_size // batch.largest_slot) if batch.micro_size != "auto" else 0)
    if -(-slots // world_size) == steps:
        return None, adopted
    what = (
        f"is {getattr(batch, key)!r}, but {setting.where} sets {steps} microbatches on each of {world_size} ranks: leave that "
        "out; the YAML's batch determines how an update is split"
    )
    return where.problem(("batch", key), what), adopted


def _value(section: Any, key: str) -> Any:
    for name in key.split("."):
        section = getattr(section, name, None)
    return section


def _is_set(section: Any, key: str) -> bool:
    """Return whether the YAML sets a key, or a section above it as a whole: ``compile: true`` sets all its keys."""
    for name in key.split("."):
        if not isinstance(section, BaseModel) or not section.model_fields_set:
            return True
        if name not in section.model_fields_set:
            return False
        section = getattr(section, name)
    return True
