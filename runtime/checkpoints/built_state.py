"""What a start of a run built, before any state was loaded: by it a later start knows which changes it is to make.

A checkpoint holds hyper-parameters and buffers, some of which are arguments and some of which training has changed. What two
starts built alike goes on from the checkpoint; what they built differently was changed in the configuration, and is taken from
there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.errors import CheckpointError
from runtime.objective import TrainingModule
from runtime.strategies.state_keys import missing_keys

_PARTS = ("model", "objective")
OF_SCHEDULES = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"}
"""What schedulers keep in an optimizer's groups."""

_REGROUP = "optimizer.groups, optimizer.no_decay, optimizer.layer_decay or model.freeze"


@dataclass(frozen=True)
class BuiltState:
    """How optimizer and module were built; plain data.

    Args:
        settings: the sections of model and objective, by which a difference is known to be wanted.
        groups: hyper-parameters of each group of the optimizer, the schedule's among them.
        names: of each group's parameters.
        digests: of the buffers of model and objective, and of the objective's parameters, by name.
    """

    settings: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]]
    names: Sequence[Sequence[str]]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, configuration: Mapping[str, Any], module: TrainingModule, optimizer: Optimizer) -> BuiltState:
        """Describe module and optimizer behind a schedule, as they were built and before a strategy prepares them.

        Args:
            configuration: all keys with their values.
        """
        settings = {part: {k: configuration[part].get(k) for k in ("target", "args", "losses")} for part in _PARTS}
        names = {id(parameter): name.removeprefix("model.") for name, parameter in module.named_parameters()}
        return cls(
            {**settings, "seed": configuration["seed"]},
            [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups],
            {name: _digest(tensor) for name, tensor in _arguments(module)},
        )

    def adapted(self, state: Mapping[str, Any], optimizer: Optimizer, before: Mapping[str, Any]) -> dict[str, Any]:
        """Return a stored optimizer state with the hyper-parameters that this start has changed.

        Args:
            optimizer: this start's, without a state.
            before: what the start that saved it built.

        Raises:
            CheckpointError: a change cannot be made.
        """
        if [list(names) for names in self.names] != [list(names) for names in before["names"]]:
            raise CheckpointError(
                f"the optimizer's state belongs to other groups of parameters, so {_REGROUP} cannot change within a run: undo "
                "the change, or begin another run with these weights (output=…, model.weights)"
            )
        groups, changed = [], set()
        for stored, then, now in zip(state["param_groups"], before["groups"], self.groups, strict=True):
            differing = {key: value for key, value in now.items() if key not in then or not _same(then[key], value)}
            differing.pop("lr", None)  # the schedule knows what comes of it
            changed |= differing.keys() - OF_SCHEDULES
            groups.append({**stored, **differing})
        adapted = {**state, "param_groups": groups}
        lacking = missing_keys(optimizer, adapted) if changed else set()
        if lacking:
            keys = ", ".join(f"optimizer.args.{key}" for key in sorted(changed))
            raise CheckpointError(
                f"{keys} cannot change within this run: the optimizer would need {', '.join(sorted(lacking))} of all steps so "
                "far, which the checkpoint does not hold; undo the change, or begin another run (output=…)"
            )
        return adapted

    def changed_buffers(self, module: TrainingModule, before: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the buffers that the configuration makes otherwise than that of the start that saved the state.

        Args:
            module: without a state.

        Raises:
            CheckpointError: it also begins a parameter of the objective's otherwise, which has been trained since.
        """
        parts = [part for part in _PARTS if not _same(self.settings[part], before["settings"][part])]
        if not parts or self.settings["seed"] != before["settings"]["seed"]:  # another seed makes all of them otherwise
            return {}
        tensors = dict(_arguments(module))
        found = {
            name: tensors[name].detach().clone()
            for name, digest in self.digests.items()
            if name.partition(".")[0] in parts and before["digests"].get(name, digest) != digest
        }
        trained = [name.partition(".")[2] for name in found if isinstance(tensors[name], nn.Parameter)]
        if trained:
            raise CheckpointError(
                f"objective: {', '.join(trained)} would begin with other values, and has been trained since; undo the change, "
                "or begin another run (output=…)"
            )
        return found


def _arguments(module: TrainingModule) -> Iterator[tuple[str, Tensor]]:
    """Yield what arguments of model and objective may have made, by name: saved buffers, and the objective's parameters."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            continue
        if name.startswith("objective.") or not isinstance(tensor, nn.Parameter):
            yield name, tensor


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data)
    digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second):
        return True
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)
