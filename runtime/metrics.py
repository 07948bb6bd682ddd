"""torchmetrics whose states we reduce ourselves, exactly and for any number of ranks, ranks without data included.

torchmetrics' own synchronisation aborts when a rank has seen nothing, and sums in float32. Here every rank's states travel
as safetensors bytes (no pickle) and are merged in rank order, those of ranks without data left out. Importing torchmetrics
takes seconds; it happens only where a metric is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from runtime.control import gather_bytes
from runtime.errors import EvaluationError

if TYPE_CHECKING:
    from torchmetrics import Metric

Result = float | list[Any]


class MetricSet:
    """Several named metrics, updated with the same predictions and targets.

    Args:
        metrics: name to metric; they are moved to the device, and their sums kept in float64.
        device: where predictions are.
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device) -> None:
        self._device = device
        self._metrics = dict(metrics)
        for metric in self._metrics.values():
            # What is merged here must not be merged again in compute(); sync_on_compute is read in __init__ only.
            metric.distributed_available_fn = _never
            metric.to(device)
            metric.set_dtype(torch.float64)

    def __bool__(self) -> bool:
        return bool(self._metrics)

    @property
    def state_bytes(self) -> int:
        """Bytes of all states at present."""
        return sum(tensor.nbytes for tensors in self._states().values() for tensor in tensors)

    @property
    def growing(self) -> list[str]:
        """Names of metrics that keep every sample's value, so that their state grows with the data set."""
        return [
            name
            for name, metric in self._metrics.items()
            if any(isinstance(d, list) for d in metric._defaults.values())
        ]

    def reset(self) -> None:
        """Forget everything."""
        for metric in self._metrics.values():
            metric.reset()

    @torch.no_grad()
    def update(self, *inputs: Any) -> None:
        """Take in one microbatch's predictions and targets.

        Raises:
            EvaluationError: a metric refused them.
        """
        for name, metric in self._metrics.items():
            try:
                metric.update(*inputs)
            except Exception as error:
                shapes = ", ".join(f"{tuple(i.shape)} {i.dtype}" for i in inputs if isinstance(i, Tensor))
                raise EvaluationError(
                    f"metric {name!r} ({type(metric).__name__}) refused its input ({shapes}): {error}"
                ) from error

    @torch.no_grad()
    def compute(self) -> dict[str, Result]:
        """Return the metrics over all ranks' samples, equal on every rank. Collective: every rank must call this.

        A metric that no rank has data for is left out.
        """
        if not self._metrics:
            return {}
        gathered = [_decoded(payload) for payload in gather_bytes(self._encoded(), self._device)]
        results: dict[str, Result] = {}
        for name, metric in self._metrics.items():
            ranks_with_data = [states for counts, states in gathered if counts[name]]
            if not ranks_with_data:
                continue
            own = {state: getattr(metric, state) for state in metric._defaults}
            own_count = metric._update_count
            try:
                for state, default in metric._defaults.items():
                    values = [_of_state(states, name, state) for states in ranks_with_data]
                    merged = self._merged(values, metric._reductions[state], isinstance(default, list))
                    setattr(metric, state, merged)
                metric._update_count = sum(counts[name] for counts, _ in gathered)
                metric._computed = None
                results.update(_flattened(name, metric.compute()))
            except Exception as error:
                raise EvaluationError(f"metric {name!r} ({type(metric).__name__}) failed: {error}") from error
            finally:
                for state, value in own.items():
                    setattr(metric, state, value)
                metric._update_count = own_count
                metric._computed = None
        return results

    def _merged(self, values: list[list[Tensor]], reduction: Any, is_list: bool) -> Any:
        on_device = [[tensor.to(self._device) for tensor in tensors] for tensors in values]
        if is_list:
            return [tensor for tensors in on_device for tensor in tensors]
        stacked = torch.stack([tensors[0] for tensors in on_device])
        return stacked if reduction is None else reduction(stacked)

    def _states(self) -> dict[str, list[Tensor]]:
        states = {}
        for name, metric in self._metrics.items():
            for state in metric._defaults:
                value = getattr(metric, state)
                states[f"{name}/{state}"] = list(value) if isinstance(value, list) else [value]
        return states

    def _encoded(self) -> bytes:
        tensors = {
            f"{key}/{index}": tensor.detach().cpu().contiguous().clone()
            for key, listed in self._states().items()
            for index, tensor in enumerate(listed)
        }
        tensors["/counts"] = torch.tensor([metric._update_count for metric in self._metrics.values()])
        return safetensors_save(tensors, metadata={"names": "\n".join(self._metrics)})


def _never() -> bool:
    return False


def _decoded(payload: bytes) -> tuple[dict[str, int], dict[str, Tensor]]:
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    tensors = safetensors_load(payload)
    counts = tensors.pop("/counts").tolist()
    return dict(zip(header["__metadata__"]["names"].split("\n"), counts, strict=True)), tensors


def _of_state(states: Mapping[str, Tensor], name: str, state: str) -> list[Tensor]:
    found: list[Tensor] = []
    while (key := f"{name}/{state}/{len(found)}") in states:
        found.append(states[key])
    return found


def _flattened(name: str, value: Any) -> dict[str, Result]:
    if isinstance(value, Mapping):
        return {
            key: result for part, inner in value.items() for key, result in _flattened(f"{name}/{part}", inner).items()
        }
    if isinstance(value, list | tuple):
        return {name: [inner.tolist() if isinstance(inner, Tensor) else inner for inner in value]}
    if isinstance(value, Tensor) and value.ndim:
        return {name: value.tolist()}
    return {name: float(value)}
