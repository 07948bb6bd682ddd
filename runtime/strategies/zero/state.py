"""The state of DeepSpeed's engine as a checkpoint of any strategy holds it: whole tensors by the model's own names, no pickle.

What is gathered and set goes through DeepSpeed's own functions for one parameter at a time (``safe_get_full_…``,
``safe_set_full_…``). Private names of version 0.19 that are used besides, each under test: ``_hp_mapping``,
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
    """Reads and writes weights and optimizer state of an engine. Every method is collective, in one order on all ranks.

    Args:
        engine: DeepSpeed's.
        groups: the parameters of each of the optimizer's groups, as they were before the engine took them over.
        group_keys: what the optimizer's groups held besides, then.
        stage: 1, 2 or 3.
        layouts: strides of parameters that were not contiguous, by identity: checkpoints have them, for other strategies.
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
        """Keep the weights that are not trained, which the engine may have rounded; by the parameter's identity."""
        self._frozen = {key: value for key, value in originals.items() if key not in self._trained}

    # Weights

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """Return a whole parameter for rank 0 to save, in float32 where it is trained."""
        if id(parameter) in self._frozen:
            weight = self._frozen[id(parameter)]
        else:
            weight = _for_rank_0(self._utils.safe_get_full_fp32_param(parameter).detach())
        strides = self._layouts.get(id(parameter))
        return weight if strides is None or weight.is_meta else laid_out(weight, strides)

    def set_weights(self, weights: Mapping[nn.Parameter, Tensor]) -> None:
        """Put whole tensors in the place of parameters."""
        for parameter, weight in weights.items():
            if id(parameter) in self._trained:
                self._set(parameter, weight, None)
            else:
                self._set_frozen(parameter, weight)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make what passes run on (copies in half precision, parameters that stay gathered) anew from the float32 weights."""
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
        """Return the weights of a parameter that is not trained, whole and on the CPU; None of any other."""
        return self._frozen.get(id(parameter))

    def piece(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        """Return this rank's part of a trained parameter's float32 weights, flat and in place, and where it begins."""
        if self._stage < 3:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return torch.empty(0), 0
            return mapping.get_hp_fragment(), mapping.lp_fragment_address.start
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start, size = own_range(parameter)
        return self._zero.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, size), start

    def gathered(self, parameter: nn.Parameter, piece: Tensor) -> Tensor:
        """Return the whole of pieces like :meth:`piece`'s, for rank 0 to save."""
        start = self.piece(parameter)[1]
        full = torch.zeros(shape_of(parameter).numel(), dtype=piece.dtype, device=self._engine.device)
        full[start : start + piece.numel()] = piece.to(full.device)
        dist.all_reduce(full)
        return _for_rank_0(full.view(shape_of(parameter)))

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Put a whole tensor in the place of a parameter's weights, or of its optimizer state of one key."""
        value = value.to(self._engine.device, torch.float32)
        if self._stage < 3:
            if key is None:
                self._utils.safe_set_full_fp32_param(parameter, value)
            else:
                self._utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # The counterparts for stage 3 cut the last rank's part out of what is not padded, and fail (0.19.8).
        part = padded_part(parameter, value)
        if key is None:
            self._utils.safe_set_local_fp32_param(parameter, part)
        else:
            self._utils.safe_set_local_optimizer_state(parameter, part, key)

    def _set_frozen(self, parameter: nn.Parameter, weight: Tensor) -> None:
        import deepspeed

        if id(parameter) in self._frozen:
            self._frozen[id(parameter)].copy_(weight)  # in place: what averages weights holds it
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3), torch.no_grad():
            parameter.copy_(weight)

    # The optimizer

    def optimizer_state(self) -> dict[str, Any]:
        """Return what the optimizer's own ``state_dict`` would be, had nothing been sharded, for rank 0 to save."""
        self._link_states()
        state: dict[int, dict[str, Any]] = {}
        for number, (parameter, flat) in enumerate(self._each()):
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
        """Go on from a ``state_dict`` of the same optimizer, of any strategy.

        Raises:
            ValueError: it does not fit the groups, or parameters of one group were updated unequally often.
        """
        theirs = stored["param_groups"]
        if [len(group["params"]) for group in theirs] != [len(group) for group in self._groups]:
            raise ValueError("the state has other parameter groups")
        for group, other in zip(self._optimizer.param_groups, theirs, strict=True):
            group.update({key: value for key, value in other.items() if key != "params"})
        numbers = [number for group in theirs for number in group["params"]]
        entries = [stored["state"].get(number, {}) for number in numbers]
        self._optimizer.state.clear()
        self._begin_states(entries)
        self._link_states()
        for (parameter, _), entry in zip(self._each(), entries, strict=True):
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape == shape_of(parameter) and value.ndim:
                    self._set(parameter, value, key)

    def _begin_states(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Give each flat tensor a state of zeros, with the counters that its parameters share."""
        shared: dict[int, dict[str, Any]] = {}
        for (parameter, flat), entry in zip(self._each(), entries, strict=True):
            if not entry:
                continue
            sharded = {
                key: v
                for key, v in entry.items()
                if isinstance(v, Tensor) and v.ndim and v.shape == shape_of(parameter)
            }
            counters = {key: value for key, value in entry.items() if key not in sharded}
            known = shared.setdefault(id(flat), counters)
            if not _equal(known, counters):
                raise ValueError(
                    "parameters of one group were updated unequally often, and DeepSpeed counts them together: go on with ddp"
                )
            state = self._optimizer.state[flat]
            if not state:
                device = flat.device if self._counts_on_device else torch.device("cpu")
                state.update({key: torch.zeros_like(flat.data) for key in sharded})
                state.update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in counters.items()})

    def _link_states(self) -> None:
        """Let parameters know their part of the flat state.

        DeepSpeed does it itself after the first group's first update, when the other groups have no state yet (0.19.8).
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

    def _each(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained parameter in the optimizer's order, and the flat tensor that holds its part of this rank."""
        zero = self._zero
        for number, group in enumerate(self._groups):
            for parameter in group:
                if self._stage < 3:
                    yield parameter, zero.single_partition_of_fp32_groups[number]
                else:
                    place = zero.grad_position[zero.get_param_id(parameter)][0]
                    yield parameter, zero.fp32_partitioned_groups_flat[place]


class ZeroWeights:
    """This rank's pieces of the float32 weights, for averages of them (:class:`LocalWeights`).

    What is not trained is there whole, so that the average has every name that it has under other strategies.
    """

    def __init__(self, module: nn.Module, state: ZeroState) -> None:
        self._state = state
        named = dict(module.named_parameters())
        self._frozen = {name: frozen for name, p in named.items() if (frozen := state.frozen(p)) is not None}
        self._parameters = {name: p for name, p in named.items() if name not in self._frozen}
        self._pieces = {name: state.piece(parameter) for name, parameter in self._parameters.items()}

    def pieces(self) -> Mapping[str, Tensor]:
        """Return what is held, by parameter name: flat parts of what is trained."""
        return {**{name: piece for name, (piece, _) in self._pieces.items()}, **self._frozen}

    def to_checkpoint(self, name: str, piece: Tensor) -> Tensor:
        """Return the whole tensor. Collective."""
        return piece if name in self._frozen else self._state.gathered(self._parameters[name], piece)

    def from_checkpoint(self, name: str, stored: StoredTensor) -> Tensor:
        """Return this rank's piece of a whole tensor."""
        if name in self._frozen:
            return whole(stored)
        piece, start = self._pieces[name]
        return whole(stored).flatten()[start : start + piece.numel()]

    def written(self) -> None:
        """Let passes run on what the pieces hold now."""
        self._state.refresh()


def shape_of(parameter: Tensor) -> torch.Size:
    """Return a parameter's whole shape; stage 3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def own_range(parameter: Any) -> tuple[int, int]:
    """Return where this rank's part of a parameter begins in stage 3, and how much of it is not padding."""
    padded = parameter.ds_tensor.numel()
    start = min(dist.get_rank() * padded, parameter.ds_numel)
    return start, min(padded, parameter.ds_numel - start)


def padded_part(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor in stage 3, filled up with zeros to the length that all ranks have."""
    start, size = own_range(parameter)
    part = value.new_zeros(parameter.ds_tensor.numel())
    part[:size] = value.flatten()[start : start + size]
    return part


def _for_rank_0(gathered: Tensor) -> Tensor:
    """Return a gathered tensor on the CPU of rank 0; a host of eight ranks would hold it eight times, for nothing."""
    return gathered.cpu() if dist.get_rank() == 0 else gathered.to("meta")


def _is_sharded(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _cloned(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        bool(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key]))) for key in first
    )
