"""State of a module that DeepSpeed manages: gathered whole for rank 0, which saves it as under DDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from runtime.objective import TrainingModule
from runtime.state.local_weights import LocalWeights, WholeWeights
from runtime.state.shards import in_memory, whole
from runtime.strategies.zero.state import ZeroState, ZeroWeights, shape_of

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroStateIO:
    """Reads and writes the state through the engine; see :class:`runtime.strategies.state_io.StateIO`."""

    writers = 1
    held_whole = False

    def __init__(self) -> None:
        self._module: TrainingModule | None = None
        self._state: ZeroState | None = None
        self._scaler: Any = None

    def attach(self, module: TrainingModule, state: ZeroState | None = None, *, scaler: Any = None) -> None:
        """Set the module.

        Args:
            state: of the engine; None for a module that is not trained, and whole on every rank.
            scaler: DeepSpeed's loss scaler, if any.
        """
        self._module, self._state, self._scaler = module, state, scaler

    def detach_engine(self) -> None:
        """Drop the engine's state: the run is over."""
        self._state = self._scaler = None

    def module_state(self, part: nn.Module) -> dict[str, Any]:
        """Return the state dict of the model or the objective; parameters are whole on rank 0, meta elsewhere. Collective."""
        assert self._state is not None
        gathered: dict[int, Tensor] = {}  # tied weights are gathered once, and stay tied
        state = {}
        for name, value in part.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                if id(value) not in gathered:
                    gathered[id(value)] = self._state.weight(value)
                value = gathered[id(value)]
            state[name] = value if not isinstance(value, Tensor) or value.is_meta else value.detach().cpu()
        return state

    def load_module_state(self, part: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a state dict's tensors into the model or the objective. Collective.

        Raises:
            RuntimeError: names or shapes differ.
        """
        if self._state is None:
            part.load_state_dict(in_memory(state))
            return
        present = part.state_dict(keep_vars=True)
        if present.keys() != state.keys():
            raise RuntimeError(f"names of weights differ: {sorted(present.keys() ^ state.keys())[:8]}")
        weights = {}
        for name, value in present.items():
            stored = state[name]
            shape = tuple(shape_of(value)) if isinstance(value, Tensor) else ()
            if isinstance(value, Tensor) and shape != tuple(stored.shape):
                raise RuntimeError(f"{name} has shape {tuple(stored.shape)} in the checkpoint, {shape} in the model")
            if isinstance(value, nn.Parameter):
                weights[value] = whole(stored)
            elif isinstance(value, Tensor):
                value.copy_(whole(stored))
            else:
                part.get_submodule(name.rpartition(".")[0]).set_extra_state(in_memory(stored))
        self._state.set_weights(weights)

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state dict, as it would be without sharding. Collective."""
        assert self._state is not None
        return self._state.optimizer_state()

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load an optimizer's state dict. Collective."""
        assert self._state is not None
        self._state.load_optimizer_state(in_memory(state))

    def weights(self) -> LocalWeights:
        """Return this rank's part of the weights; whole weights for a module that is not trained."""
        assert self._module is not None
        if self._state is None:
            return WholeWeights(self._module)
        return ZeroWeights(self._module, self._state)

    def scaler_state(self) -> Mapping[str, Any]:
        """Return the loss scale's state."""
        if self._scaler is None:
            return {}
        return {"zero_scaler": {key: getattr(self._scaler, key) for key in _SCALER_STATE}}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Load the loss scale's state."""
        if self._scaler is not None:
            for key, value in state.get("zero_scaler", {}).items():
                setattr(self._scaler, key, value)
