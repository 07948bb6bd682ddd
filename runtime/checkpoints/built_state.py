"""How a start of a run built optimizer and module, before loading state; lets a later start detect changed arguments.

A checkpoint holds hyper-parameters and buffers: some are arguments, others were changed by training. Values that two starts
built equally are loaded from the checkpoint; values that they built differently were changed in the configuration, and are
taken from there.
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
SCHEDULER_KEYS = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"}
"""Keys that schedulers store in an optimizer's parameter groups."""

_REGROUP = "optimizer.groups, optimizer.no_decay, optimizer.layer_decay or model.freeze"


@dataclass(frozen=True)
class BuiltState:
    """How optimizer and module were built; plain data.

    Args:
        settings: the sections of model and objective; a buffer counts as changed only if its section changed.
        groups: hyper-parameters of each parameter group, the schedule's included.
        names: parameter names of each group.
        digests: of the buffers of model and objective, and of the objective's parameters, by name.
    """

    settings: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]]
    names: Sequence[Sequence[str]]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, configuration: Mapping[str, Any], module: TrainingModule, optimizer: Optimizer) -> BuiltState:
        """Describe module and optimizer (with its schedule) as built, before a strategy prepares them.

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
            optimizer: this start's, without state.
            before: the built state of the start that saved it.

        Raises:
            CheckpointError: a change is not possible within a run.
        """
        if [list(names) for names in self.names] != [list(names) for names in before["names"]]:
            raise CheckpointError(
                f"the optimizer's state has other parameter groups, so {_REGROUP} cannot change within a run: undo "
                "the change, or start another run from these weights (output=…, model.weights)"
            )
        groups, changed = [], set()
        for stored, then, now in zip(state["param_groups"], before["groups"], self.groups, strict=True):
            differing = {key: value for key, value in now.items() if key not in then or not _same(then[key], value)}
            differing.pop("lr", None)  # set by the schedule
            changed |= differing.keys() - SCHEDULER_KEYS
            groups.append({**stored, **differing})
        adapted = {**state, "param_groups": groups}
        lacking = missing_keys(optimizer, adapted) if changed else set()
        if lacking:
            keys = ", ".join(f"optimizer.args.{key}" for key in sorted(changed))
            raise CheckpointError(
                f"{keys} cannot change within this run: the optimizer would need {', '.join(sorted(lacking))} of all steps so "
                "far, which the checkpoint does not hold; undo the change, or start another run (output=…)"
            )
        return adapted

    def changed_buffers(self, module: TrainingModule, before: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the buffers whose initial values the configuration changed since the start that saved the state.

        Args:
            module: without loaded state.

        Raises:
            CheckpointError: the initial value of an objective's parameter also changed, but it has been trained since.
        """
        parts = [part for part in _PARTS if not _same(self.settings[part], before["settings"][part])]
        if not parts or self.settings["seed"] != before["settings"]["seed"]:  # another seed changes all of them
            return {}
        tensors = dict(_arguments(module))
        buffers = {
            name: tensors[name].detach().clone()
            for name, digest in self.digests.items()
            if name.partition(".")[0] in parts and before["digests"].get(name, digest) != digest
        }
        trained = [name.partition(".")[2] for name in buffers if isinstance(tensors[name], nn.Parameter)]
        if trained:
            raise CheckpointError(
                f"objective: the initial values of {', '.join(trained)} changed, but it has been trained since; undo the "
                "change, or start another run (output=…)"
            )
        return buffers


def _arguments(module: TrainingModule) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that arguments of model and objective may determine, by name: buffers and the objective's parameters."""
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
