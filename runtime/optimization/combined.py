"""Several optimizers as one, each with parameters of its own: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from runtime.state.memory_layout import is_dense, laid_out, same_layout


class CombinedOptimizer(Optimizer):
    """Steps its members one after another; schedules, clipping and checkpoints see one optimizer with all their groups.

    The groups are the members' own, so a rate that a schedule sets here is theirs.

    Args:
        members: no parameter is in two of them.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = tuple(members)
        super().__init__([{"params": group["params"]} for member in members for group in member.param_groups], {})
        self._gather()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        assert closure is None
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the members' states as one, parameters counted through."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for member in self.members:
            its = member.state_dict()
            state |= {first + number: value for number, value in its["state"].items()}
            groups += [{**group, "params": [first + n for n in group["params"]]} for group in its["param_groups"]]
            first += _size(member)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it has other groups.
        """
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError("the state has another number of parameter groups")
        first, groups = 0, list(state_dict["param_groups"])
        for member in self.members:
            its, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            end = first + _size(member)
            state = {number - first: value for number, value in state_dict["state"].items() if first <= number < end}
            shifted = [{**group, "params": [number - first for number in group["params"]]} for group in its]
            load_exactly(member, {"state": state, "param_groups": shifted})
            first = end
        self._gather()

    def _gather(self) -> None:
        """Refer to the members' groups, which they replace by new ones when they load."""
        self.param_groups = list(chain.from_iterable(member.param_groups for member in self.members))


def members(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return what an optimizer consists of: itself, or its members."""
    return optimizer.members if isinstance(optimizer, CombinedOptimizer) else (optimizer,)


def load_exactly(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state in its own types, lying in memory as it did when it was saved.

    Torch casts it to the parameters' (2.13): NAdam's product, float32 always, would go on in float64 beside such parameters,
    and single-precision moments of half-precision parameters would be rounded. Fused kernels walk the memory of parameter
    and state side by side, so for them the state lies as its parameter does, whatever was saved.

    Raises:
        ValueError: the state has other groups.
    """
    optimizer.load_state_dict(state_dict)
    if isinstance(optimizer, CombinedOptimizer):
        return
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            _lay_out_like(parameter, optimizer.state.get(parameter, {}))


def _lay_out_like(parameter: Tensor, state: dict[str, Any]) -> None:
    for key, value in state.items():
        alike = isinstance(value, Tensor) and value.shape == parameter.shape
        if alike and not same_layout(value, parameter) and is_dense(parameter.shape, parameter.stride()):
            state[key] = laid_out(value, parameter.stride())


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
