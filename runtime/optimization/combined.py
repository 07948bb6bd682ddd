"""Several optimizers as one, each with its own parameters: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from runtime.state.memory_layout import is_dense, laid_out, same_layout


class CombinedOptimizer(Optimizer):
    """Steps its members one after another; schedules, clipping and checkpoints see one optimizer with all their groups.

    The groups are the members' group objects, so a rate that a schedule sets here takes effect in them.

    Args:
        members: optimizers without common parameters.
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
        """Return the members' states as one, with consecutive parameter numbers."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for member in self.members:
            own = member.state_dict()
            state |= {first + number: value for number, value in own["state"].items()}
            groups += [{**group, "params": [first + n for n in group["params"]]} for group in own["param_groups"]]
            first += _size(member)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: its groups differ.
        """
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError("the state has another number of parameter groups")
        first, groups = 0, list(state_dict["param_groups"])
        for member in self.members:
            own, groups = groups[: len(member.param_groups)], groups[len(member.param_groups) :]
            end = first + _size(member)
            state = {number - first: value for number, value in state_dict["state"].items() if first <= number < end}
            shifted = [{**group, "params": [number - first for number in group["params"]]} for group in own]
            load_exactly(member, {"state": state, "param_groups": shifted})
            first = end
        self._gather()

    def _gather(self) -> None:
        """Collect the members' groups; loading a state replaces them with new objects."""
        self.param_groups = list(chain.from_iterable(member.param_groups for member in self.members))


def members(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return the members of a combined optimizer, or a tuple of the optimizer itself."""
    return optimizer.members if isinstance(optimizer, CombinedOptimizer) else (optimizer,)


def load_exactly(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state with the dtypes and memory layout that it was saved with.

    Torch casts it to the parameters' dtype (2.13): NAdam's product, always float32, would become float64 with float64
    parameters, and single-precision moments of half-precision parameters would be rounded. Fused kernels walk the memory of
    parameter and state in parallel, so for them the state gets its parameter's layout, whatever was saved.

    Raises:
        ValueError: the state's groups differ.
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
            _match_layout(parameter, optimizer.state.get(parameter, {}))


def _match_layout(parameter: Tensor, state: dict[str, Any]) -> None:
    for key, value in state.items():
        same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
        if same_shape and not same_layout(value, parameter) and is_dense(parameter.shape, parameter.stride()):
            state[key] = laid_out(value, parameter.stride())


def _size(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
