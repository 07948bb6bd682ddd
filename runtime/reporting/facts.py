"""Facts of one start of a run, for its first record and ``lockstep show``: sizes, versions, settings that are not exact."""

from __future__ import annotations

import functools
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from runtime.config.file import LoadedConfiguration
from runtime.config.sections import RunConfiguration
from runtime.config.signatures import class_name
from runtime.data.batches import SlotAssignment
from runtime.data.training_data import TrainingData
from runtime.losses.weighted_sum import WeightedSum
from runtime.objective import Objective
from runtime.optimization.optimizer import default_rate
from runtime.strategies.state_size import StateBytes


def start_facts(
    loaded: LoadedConfiguration,
    objective: Objective,
    *,
    parameters: tuple[int, int],
    assignment: SlotAssignment,
    device: str,
    data: TrainingData,
    step: int,
    memory: StateBytes,
) -> dict[str, Any]:
    """Return the facts of one start: text for the console, numbers for the record.

    Args:
        parameters: numbers of trainable and of frozen elements.
        memory: predicted bytes of each process's state.
        step: steps completed before this start.
    """
    steps_per_epoch = data.steps_per_epoch
    global_size, limit = loaded.values.batch.global_size, loaded.values.limit
    epochs_steps = None if steps_per_epoch is None else (limit.epochs or 0) * steps_per_epoch
    trainable, frozen = parameters
    unit = loaded.values.data.unit
    processes = f"{assignment.world_size} process{'es' * (assignment.world_size > 1)}"
    slots = f"{assignment.slots} slot{'s' * (assignment.slots > 1)}"
    return {
        "name": loaded.name,
        "where": f"{processes} on {device}, {loaded.values.precision}"
        + (", the same bits on any number of processes" if loaded.values.determinism == "exact" else ""),
        "data": f"a stream of training {'samples' if unit == 'samples' else 'batches'}"
        if data.num_samples is None
        else f"{data.num_samples:,} training samples, {steps_per_epoch:,} steps per epoch",
        "batch": f"{global_size} {unit} in {slots} of at most {-(-global_size // assignment.slots)}",
        "model": f"{trainable:,} parameters" + (f" and {frozen:,} frozen" if frozen else ""),
        "update": default_rate(loaded.values.optimizer, loaded.code) or "",
        "memory": str(memory),
        "state_bytes": asdict(memory),
        "folder": str(loaded.output),
        "resumed": f"after step {step}" if step else "",
        "step": step,
        "total_steps": limit.steps or epochs_steps,
        "world_size": assignment.world_size,
        "slots": assignment.slots,
        "device": device,
        "inexact": inexact_choices(loaded.values, objective),
        **versions(),
    }


def inexact_choices(values: RunConfiguration, objective: Objective) -> list[str]:
    """Return the settings that make the result depend on K, on the world size, or on the kind of device."""
    choices = []
    if values.strategy.ddp.communication_hook:
        choices.append(
            f"strategy.ddp.communication_hook: gradients are sent in {values.strategy.ddp.communication_hook}"
        )
    mixed = values.strategy.fsdp.mixed_precision
    if mixed is not None:
        dtypes = f"parameters are gathered in {mixed.parameters}, gradients reduced in {mixed.gradients}"
        choices.append(f"strategy.fsdp.mixed_precision: {dtypes}")
    if values.batch_norm == "sync":
        choices.append(
            "batch_norm: sync normalises over the slots that run at the same time, so it depends on the world size"
        )
    if objective.couples_samples:
        parts = objective.parts if isinstance(objective, WeightedSum) else {}
        which = ", ".join(name for name, part in parts.items() if part.couples_samples) or values.objective.target
        choices.append(f"objective: {which} couples the samples of a slot, so the result depends on K (batch.slots)")
    targets = [values.optimizer.target, *(group.target for group in values.optimizer.groups)]
    if values.determinism != "exact" and any(class_name(target) == "Muon" for target in targets):
        choices.append(
            "optimizer: Muon computes in bfloat16, which amplifies rounding: other world sizes agree to 1e-2"
        )
    if values.precision != "fp32":
        choices.append(f"precision: {values.precision} rounds differently on each kind of device")
    if values.matmul != "highest":
        choices.append(f"matmul: {values.matmul} rounds differently on each kind of device")
    if values.determinism == "fast":
        choices.append("determinism: fast, so a resumed run is equal up to rounding, not bit for bit")
    return choices


def versions() -> dict[str, Any]:
    """Return the versions of Lockstep, torch and Python, and the git commit of the working directory, if any."""
    own = installed_version("lockstep-train")
    return {"lockstep": own, "torch": torch.__version__, "python": platform.python_version(), "commit": _git_commit()}


def installed_version(package: str) -> str:
    """Return the version of an installed package, or ``not installed``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def _git_commit() -> str | None:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
