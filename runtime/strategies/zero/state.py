"""The state of DeepSpeed's engine in the checkpoint format of all strategies: whole tensors by the model's names, no pickle.

State is gathered and set one parameter at a time with DeepSpeed's functions (``safe_get_full_…``, ``safe_set_full_…``).
Private names of version 0.19 also used here, each covered by a test: ``_hp_mapping``,
``_hp_optimizer_states_linked`` and ``_lazy_init_hp_params_optimizer_state`` (stages 1 and 2); ``_partition_all_parameters``,
``_unflatten_partitioned_parameters`` and ``_partitioned_params_swap_out`` (stage 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.state.memory_layout import laid_out
from runtime.state.shards import StoredTensor, whole


class ZeroState:
    """Reads and writes weights and optimizer state of an engine. Every rank must call each method, in the same order.

    Args:
        engine: DeepSpeed's.
        groups: the parameters of each optimizer group, before the engine took over.
        group_keys: keys of the optimizer's groups at that time, without ``params``.
        stage: 1, 2 or 3.
        layouts: original strides of non-contiguous parameters, by ``id``; applied in checkpoints, for other strategies.
    """

    def __init__(
        self,
        engine: Any,
        groups: Sequence[Sequence[nn.Parameter]],
        group_keys: Sequence[str],
        stage: int,
        layouts: Mapping[int, Sequence[int]],
    ) -> None:
        from deepspeed import utils

        self._engine, self._zero, self._stage = engine, engine.optimizer, stage
        self._groups = groups
        self._group_keys = group_keys
        self._layouts = layouts
        self._trained = {id(parameter) for group in groups for parameter in group}
        self._frozen: dict[int, Tensor] = {}
        self._utils = utils

    def keep_frozen(self, originals: Mapping[int, Tensor]) -> None:
        """Keep the original weights (by parameter ``id``) that are not trained; the engine may have rounded them."""
        self._frozen = {key: value for key, value in originals.items() if key not in self._trained}

    # Weights

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Return a whole parameter for rank 0 to save (meta on other ranks); float32 if it is trained."""
        if id(parameter) in self._frozen:
            weight = self._frozen[id(parameter)]
        else:
            weight = _for_rank_0(self._utils.safe_get_full_fp32_param(parameter).detach())
        strides = self._layouts.get(id(parameter))
        return weight if strides is None or weight.is_meta else laid_out(weight, strides)

    def set_weights(self, weights: Mapping[nn.Parameter, Tensor]) -> None:
        """Set parameters from whole tensors."""
        for parameter, weight in weights.items():
            if id(parameter) in self._trained:
                self._set(parameter, weight, None)
            else:
                self._set_frozen(parameter, weight)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the weights used in passes (half-precision copies, persistent parameters) from the float32 master weights."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if zero.fp16_partitioned_groups_flat[number] is not None:
                zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
                zero._unflatten_partitioned_parameters(number)
            else:
                zero._partitioned_params_swap_out(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def frozen(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the original weights, whole and on the CPU, of a parameter that is not trained; None for any other."""
        return self._frozen.get(id(parameter))

    def piece(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """Return this rank's flat part of a trained parameter's float32 weights (shares memory), and its offset."""
        if self._stage < 3:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return torch.empty(0), 0
            return mapping.get_hp_fragment(), mapping.lp_fragment_address.start
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, size = own_range(parameter)
        return self._zero.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, size), start

    def gathered(self, parameter: nn.Parameter, piece: Tensor) -> Tensor:
        """Gather the ranks' pieces, shaped like :meth:`piece`'s, into a whole tensor for rank 0 to save (meta elsewhere)."""
        start = self.piece(parameter)[1]
        full = torch.zeros(shape_of(parameter).numel(), dtype=piece.dtype, device=self._engine.device)
        full[start : start + piece.numel()] = piece.to(full.device)
        dist.all_reduce(full)
        return _for_rank_0(full.view(shape_of(parameter)))

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Set a parameter's weights, or one key of its optimizer state, from a whole tensor."""
        value = value.to(self._engine.device, torch.float32)
        if self._stage < 3:
            if key is None:
                self._utils.safe_set_full_fp32_param(parameter, value)
            else:
                self._utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # For stage 3, the full setters slice the last rank's part from an unpadded tensor, and fail (0.19.8).
        part = padded_part(parameter, value)
        if key is None:
            self._utils.safe_set_local_fp32_param(parameter, part)
        else:
            self._utils.safe_set_local_optimizer_state(parameter, part, key)

    def _set_frozen(self, parameter: nn.Parameter, weight: Tensor) -> None:
        import deepspeed

        if id(parameter) in self._frozen:
            self._frozen[id(parameter)].copy_(weight)  # in place: weight averaging holds this tensor
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3), torch.no_grad():
            parameter.copy_(weight)

    # The optimizer

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's ``state_dict`` as it would be without sharding, for rank 0 to save (meta elsewhere)."""
        self._link_states()
        state: dict[int, dict[str, Any]] = {}
        for number, (parameter, flat) in enumerate(self._trained_with_flat()):
            entry = self._optimizer.state.get(flat, {})
            state[number] = {
                key: _for_rank_0(self._utils.safe_get_full_optimizer_state(parameter, key))
                if _is_sharded(value, flat)
                else _cloned(value)
                for key, value in entry.items()
            }
        groups, first = [], 0
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            numbers = list(range(first, first + len(parameters)))
            groups.append({**{key: group[key] for key in self._group_keys if key in group}, "params": numbers})
            first += len(parameters)
        return {"state": {number: entry for number, entry in state.items() if entry}, "param_groups": groups}

    def load_optimizer_state(self, stored: Mapping[str, Any]) -> None:
        """Load a ``state_dict`` of the same optimizer, saved by any strategy.

        Raises:
            ValueError: it does not fit the groups, or parameters of one group have different step counts.
        """
        stored_groups = stored["param_groups"]
        if [len(group["params"]) for group in stored_groups] != [len(group) for group in self._groups]:
            raise ValueError("the state has other parameter groups")
        for group, other in zip(self._optimizer.param_groups, stored_groups, strict=True):
            group.update({key: value for key, value in other.items() if key != "params"})
        numbers = [number for group in stored_groups for number in group["params"]]
        entries = [stored["state"].get(number, {}) for number in numbers]
        self._optimizer.state.clear()
        self._initialize_states(entries)
        self._link_states()
        for (parameter, _), entry in zip(self._trained_with_flat(), entries, strict=True):
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape == shape_of(parameter) and value.ndim:
                    self._set(parameter, value, key)

    def _initialize_states(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Initialize each flat tensor's state with zeros and the counters that its parameters share."""
        shared: dict[int, dict[str, Any]] = {}
        for (parameter, flat), entry in zip(self._trained_with_flat(), entries, strict=True):
            if not entry:
                continue
            sharded = {
                key: v
                for key, v in entry.items()
                if isinstance(v, Tensor) and v.ndim and v.shape == shape_of(parameter)
            }
            counters = {key: value for key, value in entry.items() if key not in sharded}
            if not _equal(shared.setdefault(id(flat), counters), counters):
                raise ValueError(
                    "parameters of one group have different step counts, but DeepSpeed keeps one per group: resume with "
                    "strategy.kind: ddp"
                )
            state = self._optimizer.state[flat]
            if not state:
                device = flat.device if self._counts_on_device else torch.device("cpu")
                state.update({key: torch.zeros_like(flat.data) for key in sharded})
                state.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in counters.items()})

    def _link_states(self) -> None:
        """Link parameters to their part of the flat state.

        DeepSpeed does so only after the first group's first update, when the other groups have no state yet (0.19.8).
        """
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def _optimizer(self) -> Optimizer:
        optimizer: Optimizer = self._zero.optimizer
        return optimizer

    @property
    def _counts_on_device(self) -> bool:
        return any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)

    def _trained_with_flat(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained parameter, in the optimizer's order, with the flat tensor that holds this rank's part of it."""
        zero = self._zero
        for number, group in enumerate(self._groups):
            for parameter in group:
                if self._stage < 3:
                    yield parameter, zero.single_partition_of_fp32_groups[number]
                else:
                    place = zero.grad_position[zero.get_param_id(parameter)][0]
                    yield parameter, zero.fp32_partitioned_groups_flat[place]


class ZeroWeights:
    """This rank's pieces of the float32 master weights; a :class:`runtime.state.local_weights.LocalWeights`.

    Parameters that are not trained are included whole, so that averages have the same names under all strategies.
    """

    def __init__(self, module: nn.Module, state: ZeroState) -> None:
        self._state = state
        named = dict(module.named_parameters())
        self._frozen = {name: frozen for name, p in named.items() if (frozen := state.frozen(p)) is not None}
        self._parameters = {name: p for name, p in named.items() if name not in self._frozen}
        self._pieces = {name: state.piece(parameter) for name, parameter in self._parameters.items()}

    def pieces(self) -> Mapping[str, Tensor]:
        """Return the pieces by parameter name: flat parts of trained parameters, the others whole."""
        return {**{name: piece for name, (piece, _) in self._pieces.items()}, **self._frozen}

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor:
        """Return the whole tensor for rank 0 to save. Collective."""
        return piece if name in self._frozen else self._state.gathered(self._parameters[name], piece)

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Return this rank's piece of a whole tensor."""
        if name in self._frozen:
            return whole(stored)
        piece, start = self._pieces[name]
        return whole(stored).flatten()[start : start + piece.numel()]

    def refresh(self) -> None:
        """Update the weights used in passes from the pieces. Collective."""
        self._state.refresh()


def shape_of(parameter: Tensor) -> torch.Size:
    """Return a parameter's whole shape; in stage 3 the parameter itself is an empty tensor."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def own_range(parameter: Any) -> tuple[int, int]:
    """Return the offset of this rank's part of a parameter in stage 3, and its size without padding."""
    padded = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * padded, parameter.ds_numel)
    return start, min(padded, parameter.ds_numel - start)


def padded_part(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor in stage 3, padded with zeros to the length that all ranks have."""
    start, size = own_range(parameter)
    part = value.new_zeros(parameter.ds_tensor.numel())
    part[:size] = value.flatten()[start : start + size]
    return part


def _for_rank_0(gathered: Tensor) -> Tensor:
    """Return a gathered tensor, on the CPU on rank 0 and as a meta tensor elsewhere: a host would hold a copy per rank."""
    return gathered.cpu() if dist.get_rank() == 0 else gathered.to("meta")


def _is_sharded(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _cloned(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        bool(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key]))) for key in first
    )
