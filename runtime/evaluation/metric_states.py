"""The states of torchmetrics' metrics as values that can be taken out, put back, sent and added in a fixed order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from runtime.distributed.slot_tree import Node, total

if TYPE_CHECKING:
    from torchmetrics import Metric

Value = Tensor | list[Tensor]


class Leaves(list[Tensor]):
    """States of several microbatches that only the metric's own reduction can merge, all of them together."""


@dataclass(frozen=True)
class MetricState:
    """The state of one metric, and its number of updates."""

    states: Mapping[str, Value]
    updates: int

    @classmethod
    def of(cls, part: Metric) -> MetricState:
        """Return a metric's present state, which keeps it when the metric is reset."""
        held = {name: getattr(part, name) for name in part._defaults}
        return cls(
            {name: list(value) if isinstance(value, list) else value for name, value in held.items()},
            part._update_count,
        )

    def put_into(self, part: Metric) -> None:
        """Make it a metric's state."""
        for name, value in self.states.items():
            setattr(part, name, value)
        part._update_count = self.updates
        part._computed = None


class GatheredStates(NamedTuple):
    """Update counts and states of several metrics, of one rank or of one node of the microbatches' tree.

    Args:
        updates: by metric.
        states: by metric, state and place in its list.
        node: None for a rank's.
    """

    updates: Mapping[str, int]
    states: Mapping[str, Tensor]
    node: Node | None = None

    def of_state(self, key: str) -> list[Tensor]:
        """Return a state's tensors: one, or those of a list."""
        tensors: list[Tensor] = []
        while f"{key}/{len(tensors)}" in self.states:
            tensors.append(self.states[f"{key}/{len(tensors)}"])
        return tensors


def gathered_of(states: Mapping[str, MetricState], node: Node | None = None) -> GatheredStates:
    """Return metrics' states, by key, as they are sent."""
    tensors = {
        f"{key}/{name}/{place}": tensor.detach().cpu().contiguous().clone()
        for key, state in states.items()
        for name, value in state.states.items()
        for place, tensor in enumerate(value if isinstance(value, list) else [value])
    }
    return GatheredStates({key: state.updates for key, state in states.items()}, tensors, node)


def state_of(part: Metric, key: str, gathered: GatheredStates, device: torch.device) -> MetricState:
    """Return one metric's state as it was before :func:`gathered_of`."""
    states: dict[str, Value] = {}
    for name, default in part._defaults.items():
        tensors = [tensor.to(device) for tensor in gathered.of_state(f"{key}/{name}")]
        states[name] = tensors if isinstance(default, list) else tensors[0] if len(tensors) == 1 else Leaves(tensors)
    return MetricState(states, gathered.updates[key])


def encoded(several: Sequence[GatheredStates]) -> bytes:
    """Return states as safetensors bytes."""
    tensors = {f"{n}/{name}": tensor for n, each in enumerate(several) for name, tensor in each.states.items()}
    header = [{"updates": dict(each.updates), "node": each.node} for each in several]
    return safetensors_save(tensors, metadata={"states": json.dumps(header)})


def decoded(payload: bytes) -> list[GatheredStates]:
    """Undo :func:`encoded`."""
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    facts = json.loads(header["__metadata__"]["states"])
    states: list[dict[str, Tensor]] = [{} for _ in facts]
    for name, tensor in safetensors_load(payload).items():
        number, _, key = name.partition("/")
        states[int(number)][key] = tensor
    return [
        GatheredStates(fact["updates"], held, None if fact["node"] is None else Node(*fact["node"]))
        for fact, held in zip(facts, states, strict=True)
    ]


def added(part: Metric, left: MetricState, right: MetricState) -> MetricState:
    """Return the state of a metric after the updates of both."""
    states = {name: _joined(part, name, value, right.states[name]) for name, value in left.states.items()}
    return MetricState(states, left.updates + right.updates)


def _joined(part: Metric, name: str, left: Value, right: Value) -> Value:
    if isinstance(part._defaults[name], list):
        return [*left, *right]
    operation = _operation(part, name)
    if operation is None:
        return Leaves([*_leaves(left), *_leaves(right)])
    assert isinstance(left, Tensor) and isinstance(right, Tensor)
    return operation(left, right)


def _leaves(value: Value) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def merged(part: Metric, key: str, several: Iterable[GatheredStates], device: torch.device) -> MetricState:
    """Return a metric's state over ranks in their order, or over nodes in the order of their tree."""
    held = [each for each in several if each.updates[key]]
    states: dict[str, Value] = {}
    for name, default in part._defaults.items() if held else ():
        listed = [[tensor.to(device) for tensor in each.of_state(f"{key}/{name}")] for each in held]
        if isinstance(default, list):
            states[name] = [tensor for tensors in listed for tensor in tensors]
            continue
        operation = _operation(part, name)
        nodes = [each.node for each in held]
        if operation is not None and all(node is not None for node in nodes):
            pairs = [(node, tensors[0]) for node, tensors in zip(nodes, listed, strict=True) if node is not None]
            value = total(pairs, operation)
            assert value is not None
            states[name] = value
            continue
        stacked = torch.stack([tensor for tensors in listed for tensor in tensors])
        reduction: Any = part._reductions[name]
        states[name] = stacked if reduction is None else reduction(stacked)
    return MetricState(states, sum(each.updates[key] for each in held))


def _operation(part: Metric, name: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the addition of two states, if the metric's reduction is one that two at a time can do."""
    from torchmetrics.utilities import dim_zero_max, dim_zero_min, dim_zero_sum

    operations: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
        dim_zero_sum: torch.add,
        dim_zero_max: torch.maximum,
        dim_zero_min: torch.minimum,
    }
    return operations.get(part._reductions[name])
