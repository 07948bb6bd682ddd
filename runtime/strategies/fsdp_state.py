"""State of a module sharded by FSDP2: each rank reads and writes its shard of every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.objective import TrainingModule
from runtime.optimization.combined import load_exactly, members
from runtime.state.local_weights import LocalWeights
from runtime.state.shards import in_memory
from runtime.strategies.fsdp_tensors import (
    FSDPWeights,
    from_checkpoint,
    optimizer_state_from_checkpoint,
    state_to_checkpoint,
)
from runtime.strategies.whole_state import WholeState


class FSDPState(WholeState):
    """Reads and writes this rank's shards; see :class:`runtime.strategies.state_io.StateIO`.

    Args:
        scaler: of the loss, if any.
        writers: number of ranks; each writes its shards.
    """

    held_whole = False

    def __init__(self, scaler: torch.amp.GradScaler | None, *, writers: int) -> None:
        super().__init__(scaler, on_new_layout=_unexpected_layout)
        self.writers = writers
        self._configured_fused: list[dict[str, Any]] = []

    def attach(self, module: TrainingModule, optimizer: Optimizer | None = None) -> None:
        """Set the sharded module, and the optimizer of its sharded parameters if it is trained."""
        super().attach(module, optimizer)
        if optimizer is not None:
            self._configured_fused = _disable_fused_kernels(optimizer)

    def module_state(self, part: nn.Module) -> dict[str, Any]:
        """Return the state dict of the module or a submodule as this rank's shards."""
        return {name: state_to_checkpoint(value) for name, value in part.state_dict().items()}

    def load_module_state(self, part: nn.Module, state: Mapping[str, Any]) -> None:
        """Load this rank's shards of a whole state dict."""
        present = part.state_dict()
        part.load_state_dict(
            {
                name: from_checkpoint(present[name], value)
                if isinstance(present.get(name), Tensor)
                else in_memory(value)
                for name, value in state.items()
            }
        )

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state as this rank's shards."""
        state: dict[str, Any] = state_to_checkpoint(self._attached_optimizer().state_dict())
        for group, fused in zip(state["param_groups"], self._configured_fused, strict=True):
            group |= fused  # as other strategies save it
        return state

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load this rank's shards of a whole optimizer state."""
        optimizer = self._attached_optimizer()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        load_exactly(optimizer, optimizer_state_from_checkpoint(state, parameters))
        self._configured_fused = _disable_fused_kernels(optimizer)

    def weights(self) -> LocalWeights:
        """Return this rank's shard of each weight."""
        return FSDPWeights(self._attached_module())


def _unexpected_layout() -> None:
    raise AssertionError("non-contiguous parameters are refused before sharding")


def _disable_fused_kernels(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Disable fused kernels that do not support sharded tensors (torch 2.13: all but Adam's); return the previous settings."""
    previous = []
    for member in members(optimizer):
        for group in member.param_groups:
            previous.append({"fused": group["fused"]} if "fused" in group else {})
            if group.get("fused") and type(member) not in (torch.optim.Adam, torch.optim.AdamW):
                group["fused"] = False
    return previous
