"""What the launcher and the environment say beside the YAML (``launcher_table.py``): adopted, or refused.

A setting on which the YAML is silent is adopted, and the run says so. One that differs from the YAML is refused, and so is one
that Lockstep has no key for. Imports no torch.
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
    """A value of a key that was given outside the YAML.

    Args:
        where: it was given, as the subject of a sentence.
    """

    key: str
    value: Any
    where: str


_NAMES = {setting.variable for setting in SETTINGS} | {name for name, *_ in (*REFUSED, *WITHOUT_EFFECT)}


def load_with_settings(
    read: Callable[[list[str]], LoadedConfiguration], variables: Variables, *, world_size: int, trains: bool = True
) -> tuple[LoadedConfiguration, list[LauncherValue], list[str]]:
    """Return the configuration with the settings of the environment in it, those that were adopted, and a line about each.

    Args:
        read: reads the configuration with more overrides.
        world_size: processes of the launch.
        trains: whether settings of training alone matter.

    Raises:
        ConfigurationError: of the configuration, and of settings that cannot be adopted.
    """
    loaded = read([])
    adopted = adopt(loaded, variables, world_size=world_size, trains=trains)
    if adopted:
        loaded = read(overrides(adopted))
    return loaded, adopted, [*map(_in_words, adopted), *_without_effect(variables)]


def adopt(
    loaded: LoadedConfiguration, variables: Variables, *, world_size: int, trains: bool = True
) -> list[LauncherValue]:
    """Return the settings on which the YAML is silent, to be added to it.

    Args:
        variables: of the environment.
        world_size: processes of the launch.
        trains: whether settings of training alone matter.

    Raises:
        ConfigurationError: settings that differ from the YAML, or that no key stands for; all at once.
    """
    found, problems = _given(variables)
    adopted: dict[str, LauncherValue] = {}
    for given in found:
        if given.key in _TRAINING_ONLY and not trains:
            continue
        silent = not _written(loaded.values, given.key)
        if given.key == ACCUMULATION:
            silent = loaded.values.batch.slots is None and loaded.values.batch.micro_size is None
            problem, given = _accumulation(loaded.values.batch, given, world_size, loaded.where)
        else:
            problem = _difference(loaded.values, given, loaded.where)
        before = adopted.get(given.key)
        if problem is None and before is not None and before.value != given.value:
            problem = Problem(given.where, "", f"says {given.value!r}, and {before.where} says {before.value!r}")
        if problem is not None:
            problems.append(problem)
        elif silent:
            adopted[given.key] = given
    if problems:
        raise ConfigurationError(problems)
    return list(adopted.values())


def _without_effect(variables: Variables) -> list[str]:
    """Return a line for each setting that changes nothing here."""
    return [
        f"{variable}={value} has no effect: {instead}"
        for variable, value, counts, instead in WITHOUT_EFFECT
        if variables.get(variable, "").lower() == value.lower() and counts(variables)
    ]


@contextmanager
def hidden() -> Iterator[None]:
    """Take the settings out of this process's environment for a while: Accelerate would read them beside the YAML."""
    names = [name for name in os.environ if name in _NAMES]
    before = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(before)


def overrides(adopted: list[LauncherValue]) -> list[str]:
    """Return adopted settings as overrides, for processes that the launcher's own flags would hide them from."""
    return [f"{given.key}={json.dumps(given.value)}" for given in adopted]


def _in_words(given: LauncherValue) -> str:
    """Return the line that tells a user of it."""
    return f"{given.key}: {given.value} is adopted from {given.where}; the YAML does not say"


def _given(variables: Variables) -> tuple[list[LauncherValue], list[Problem]]:
    found, problems = [], []
    for variable, option, counts, cure in REFUSED:
        if variables.get(variable, "").lower() not in _OFF and counts(variables):
            problems.append(Problem("environment", variable, f"is set (accelerate launch {option}): {cure}"))
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
            found.append(LauncherValue(setting.key, value, f"{setting.variable} (accelerate launch {setting.option})"))
            if setting.key == "strategy.zero.file":
                found += _given_in_file(Path(value))
    return found, problems


def _given_in_file(path: Path) -> Iterator[LauncherValue]:
    """Yield what a JSON file of DeepSpeed's says that keys of the YAML stand for; a file that is wrong is told later."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    content = content if isinstance(content, dict) else {}

    def inner(section: str, name: str) -> Any:
        found = content.get(section)
        return found.get(name) if isinstance(found, dict) else None

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


def _difference(values: BaseModel, given: LauncherValue, where: Locations) -> Problem | None:
    """Return what is wrong where the YAML says something else."""
    written = given.key.split(".")
    if given.key == "optimizer.max_grad_norm" and _value(values, "optimizer.max_grad_value") is not None:
        written = ["optimizer", "max_grad_value"]
        same = False
    elif not _written(values, given.key):
        return None
    else:
        same = _same(_value(values, given.key), given, where)
    if same:
        return None
    said, value = _value(values, ".".join(written)), given.value
    said = said.model_dump() if isinstance(said, BaseModel) else said
    what = f"is {said!r}, and {given.where} says {value!r}: let both say the same, or leave one of them out"
    return where.problem(written, what)


def _same(said: Any, given: LauncherValue, where: Locations) -> bool:
    if given.key == "strategy.zero.file":
        return said is not None and where.beside(said).resolve() == Path(given.value).resolve()
    if given.key.startswith("strategy.zero.offload_"):
        device = given.value["device"] if isinstance(given.value, dict) else given.value
        return said is not None and said.device == device
    return bool(said == given.value)


def _accumulation(
    batch: BatchSection, given: LauncherValue, world_size: int, where: Locations
) -> tuple[Problem | None, LauncherValue]:
    """Return what is wrong with an accumulation of so many microbatches on each rank, or the microbatch that makes it."""
    steps = given.value
    micro_size = -(-batch.global_size // (steps * world_size))
    adopted = LauncherValue(ACCUMULATION, micro_size, f"{steps} microbatches on each rank, by {given.where}")
    key = next((name for name in ("slots", "micro_size") if getattr(batch, name) is not None), None)
    if key is None or batch.micro_size == micro_size:
        return None, adopted
    slots = batch.slots or (-(-batch.global_size // batch.largest_slot) if batch.micro_size != "auto" else 0)
    if -(-slots // world_size) == steps:
        return None, adopted
    what = (
        f"is {getattr(batch, key)!r}, and {given.where} says {steps} microbatches on each of {world_size} ranks: leave that "
        "out; the YAML's batch says how an update is shared out"
    )
    return where.problem(("batch", key), what), adopted


def _value(section: Any, key: str) -> Any:
    for name in key.split("."):
        section = getattr(section, name, None)
    return section


def _written(section: Any, key: str) -> bool:
    """Tell whether the user wrote a key, or one above it as a whole: ``compile: true`` says all of it."""
    for name in key.split("."):
        if not isinstance(section, BaseModel) or not section.model_fields_set:
            return True
        if name not in section.model_fields_set:
            return False
        section = getattr(section, name)
    return True
