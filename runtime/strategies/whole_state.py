"""State that every rank holds whole: a :class:`runtime.strategies.state_io.StateIO` over torch's state dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from runtime.objective import TrainingModule
from runtime.optimization.combined import load_exactly
from runtime.state.adopted_layouts import adopt_layouts
from runtime.state.local_weights import LocalWeights, WholeWeights
from runtime.state.shards import in_memory


class WholeState:
    """Reads and writes the state of an ordinary module and optimizer; see :class:`runtime.strategies.state_io.StateIO`.

    Args:
        scaler: of the loss, if any.
        on_new_layout: called after parameters have adopted other strides from a checkpoint.
    """

    writers = 1
    held_whole = True

    def __init__(self, scaler: torch.amp.GradScaler | None, *, on_new_layout: Callable[[], None]) -> None:
        self._scaler, self._on_new_layout = scaler, on_new_layout
        self._module: TrainingModule | None = None
        self._optimizer: Optimizer | None = None

    def attach(self, module: TrainingModule, optimizer: Optimizer | None = None) -> None:
        """Set the module, and its optimizer if it is trained."""
        self._module, self._optimizer = module, optimizer

    def detach(self) -> None:
        """Drop module, optimizer and callback at the end of a run, so that no reference cycle keeps them alive."""
        self._module = self._optimizer = None
        self._on_new_layout = _nothing

    def module_state(self, part: nn.Module) -> dict[str, Any]:
        """Return the state dict of the module or a submodule."""
        return part.state_dict()

    def load_module_state(self, part: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a state dict; the module's tensors adopt the stored strides."""
        loaded = in_memory(state)
        part.load_state_dict(loaded)
        if adopt_layouts(part, loaded):
            self._on_new_layout()

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self._attached_optimizer().state_dict()

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load the optimizer's state without casting it to the parameters' dtypes."""
        load_exactly(self._attached_optimizer(), in_memory(state))

    def weights(self) -> LocalWeights:
        """Return all weights."""
        return WholeWeights(self._attached_module())

    def scaler_state(self) -> Mapping[str, Any]:
        """Return the loss scale's state."""
        return {} if self._scaler is None else {"scaler": self._scaler.state_dict()}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Load the loss scale's state."""
        if self._scaler is not None and "scaler" in state:
            self._scaler.load_state_dict(dict(state["scaler"]))

    def _attached_module(self) -> TrainingModule:
        assert self._module is not None
        return self._module

    def _attached_optimizer(self) -> Optimizer:
        assert self._optimizer is not None
        return self._optimizer


def _nothing() -> None:
    """Stand for the callback of a strategy that is closed."""
