"""torchmetrics with Lockstep's own reduction: exact on any number of ranks, including ranks without data.

torchmetrics' synchronisation aborts when a rank has no data, and sums in float32. Here every rank's states are gathered as
safetensors bytes (no pickle) and merged in rank order, without those of ranks that have no data. Importing torchmetrics takes
seconds, so it is imported only if a metric is configured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from runtime.config.component import described
from runtime.distributed.collectives import gather_bytes
from runtime.errors import EvaluationError, LockstepError, MetricError
from runtime.evaluation.class_results import kind_of, thinned
from runtime.evaluation.compute_groups import sharing_state
from runtime.evaluation.metric_inputs import MetricInputs, parts_of, signature_of
from runtime.objective import Objective, describe

if TYPE_CHECKING:
    from torchmetrics import Metric

Result = float | list[Any]


class MetricSet:
    """Several named metrics, updated with the same batches; metrics with equal states share one.

    Args:
        metrics: name to metric; they are moved to the device, and their states are kept in float64.
        device: of the predictions.

    Raises:
        EvaluationError: a metric's ``update`` is not supported.
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device) -> None:
        self._device = device
        self._metrics = dict(metrics)
        self._signatures = {name: signature_of(metric) for name, metric in self._metrics.items()}
        self._kinds = {name: kind_of(metric) for name, metric in self._metrics.items()}
        for part in (part for metric in self._metrics.values() for part in parts_of(metric)):
            # States merged here must not be merged again in compute(); sync_on_compute is read in __init__ only.
            part.distributed_available_fn = _not_distributed
            part.to(device)
            part.set_dtype(torch.float64)
        self._groups = sharing_state(self._metrics)
        self._carried: list[_Gathered] = []  # states of the ranks of earlier starts; equal on every rank

    def __bool__(self) -> bool:
        return bool(self._metrics)

    @property
    def state_bytes(self) -> int:
        """Current size of all states in bytes."""
        return sum(tensor.nbytes for tensors in self._states().values() for tensor in tensors)

    @property
    def growing(self) -> dict[str, str | None]:
        """Metrics whose state grows with every sample, and the argument that would bound it, if there is one."""
        return {
            name: "thresholds" if hasattr(metric, "thresholds") else None
            for name, metric in self._metrics.items()
            if any(isinstance(default, list) for part in parts_of(metric) for default in part._defaults.values())
        }

    def reset(self) -> None:
        """Reset all metrics."""
        self._carried = []
        for metric in self._metrics.values():
            metric.reset()

    @torch.no_grad()
    def update(self, objective: Objective, output: Any, batch: Any) -> None:
        """Update with one microbatch: the model's output, and the batch.

        Raises:
            EvaluationError: a metric refused its input, or the objective's ``metric_inputs`` raised.
        """
        if not self._metrics:
            return
        try:
            inputs = MetricInputs(objective, output, batch)
        except LockstepError:
            raise
        except Exception as error:
            raise EvaluationError(
                f"{type(objective).__name__}.metric_inputs raised {described(error)}; the model's output is "
                f"{describe(output)}, the batch {describe(batch)}"
            ) from error
        if inputs.empty:
            return
        for name, *_ in self._groups:
            metric = self._metrics[name]
            try:
                positional, named = inputs.arguments(self._signatures[name])
                with _fast_bincount(metric):
                    metric.update(*positional, **named)
            except Exception as error:
                raise MetricError(
                    name,
                    f"metric {name!r} ({type(metric).__name__}) refused its input ({describe(inputs.values)}): {error}",
                ) from error

    @torch.no_grad()
    def compute(self) -> dict[str, Result]:
        """Return the metrics over all ranks' samples, equal on every rank. Collective: every rank must call this.

        A metric without data on any rank is left out.
        """
        if not self._metrics:
            return {}
        gathered = self._gathered()
        results: dict[str, Result] = {}
        for group in self._groups:
            merged = [
                self._merged(part, f"{group[0]}/{number}", gathered)
                for number, part in enumerate(parts_of(self._metrics[group[0]]))
            ]
            if merged[0].updates:
                for name in group:
                    results.update(self._computed(name, merged))
        return {key: value for name in self._metrics for key, value in results.items() if _belongs(key, name)}

    def state(self) -> list[dict[str, Any]]:
        """Return the states of each rank, for a checkpoint. Collective: every rank must call this."""
        if not self._metrics:
            return []
        return [{"updates": dict(rank.updates), "states": dict(rank.states)} for rank in self._gathered()]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Reset, and restore the same metrics' states from any world size. Call with the same state on every rank."""
        self.reset()
        self._carried = [_Gathered(rank["updates"], rank["states"]) for rank in state]

    def _gathered(self) -> list[_Gathered]:
        ranks = [_decoded(payload) for payload in gather_bytes(self._encoded(), self._device)]
        return [*self._carried, *ranks]

    def _computed(self, name: str, merged: Sequence[_Merged]) -> dict[str, Result]:
        metric = self._metrics[name]
        parts = parts_of(metric)
        before = [
            _Merged({state: getattr(part, state) for state in part._defaults}, part._update_count) for part in parts
        ]
        try:
            for part, state in zip(parts, merged, strict=True):
                state.put_into(part)
            # Retrieval counts the rows of each query: comparing them with each query would take gigabytes here, too.
            with _fast_bincount(metric) if _is_retrieval(parts[-1]) else nullcontext():
                value = metric.compute()
        except Exception as error:
            raise EvaluationError(f"metric {name!r} ({type(metric).__name__}) failed: {error}") from error
        finally:
            for part, state in zip(parts, before, strict=True):
                state.put_into(part)
        if self._kinds[name] in ("roc", "precision_recall"):
            return {name: thinned(value)}
        return _flattened(name, value)

    def _merged(self, part: Metric, key: str, gathered: Sequence[_Gathered]) -> _Merged:
        ranks_with_data = [rank.states for rank in gathered if rank.updates[key]]
        states: dict[str, Any] = {}
        for state, default in part._defaults.items() if ranks_with_data else ():
            listed = [_of_state(states, f"{key}/{state}") for states in ranks_with_data]
            on_device = [[tensor.to(self._device) for tensor in tensors] for tensors in listed]
            if isinstance(default, list):
                states[state] = [tensor for tensors in on_device for tensor in tensors]
            else:
                stacked = torch.stack([tensors[0] for tensors in on_device])
                reduction: Any = part._reductions[state]
                states[state] = stacked if reduction is None else reduction(stacked)
        if _is_retrieval(part) and states:  # it counts queries in an array as long as their largest index
            states["indexes"] = [torch.unique(torch.cat(states["indexes"]), return_inverse=True)[1]]
        return _Merged(states, sum(rank.updates[key] for rank in gathered))

    def _leading_parts(self) -> Iterator[tuple[str, Metric]]:
        """Yield key and metric of each group's updated metric, and of those that it wraps."""
        for name, *_ in self._groups:
            for number, part in enumerate(parts_of(self._metrics[name])):
                yield f"{name}/{number}", part

    def _states(self) -> dict[str, list[Tensor]]:
        states = {}
        for key, part in self._leading_parts():
            for state in part._defaults:
                value = getattr(part, state)
                states[f"{key}/{state}"] = list(value) if isinstance(value, list) else [value]
        return states

    def _encoded(self) -> bytes:
        tensors = {
            f"{key}/{index}": tensor.detach().cpu().contiguous().clone()
            for key, listed in self._states().items()
            for index, tensor in enumerate(listed)
        }
        updates = {key: part._update_count for key, part in self._leading_parts()}
        return safetensors_save(tensors, metadata={"updates": json.dumps(updates)})


@dataclass(frozen=True)
class _Merged:
    """The state of one metric, and its number of updates."""

    states: Mapping[str, Any]
    updates: int

    def put_into(self, part: Metric) -> None:
        for state, value in self.states.items():
            setattr(part, state, value)
        part._update_count = self.updates
        part._computed = None


class _Gathered(NamedTuple):
    """Update counts and states of one rank's metrics."""

    updates: Mapping[str, int]
    states: Mapping[str, Tensor]


def _decoded(payload: bytes) -> _Gathered:
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return _Gathered(json.loads(header["__metadata__"]["updates"]), safetensors_load(payload))


def _of_state(states: Mapping[str, Tensor], key: str) -> list[Tensor]:
    tensors: list[Tensor] = []
    while f"{key}/{len(tensors)}" in states:
        tensors.append(states[f"{key}/{len(tensors)}"])
    return tensors


@contextmanager
def _fast_bincount(metric: Metric) -> Iterator[None]:
    """Let torchmetrics use ``torch.bincount``, which is deterministic as it uses it: without weights.

    Under deterministic algorithms it compares each sample with each bin instead (``utilities.data._bincount`` of 1.9):
    gigabytes and seconds per microbatch for a binned curve. A user's own update keeps the run's setting.
    """
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if not strict or not all(type(part).update.__module__.startswith("torchmetrics.") for part in parts_of(metric)):
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


def _is_retrieval(metric: Metric) -> bool:
    from torchmetrics.retrieval.base import RetrievalMetric

    return isinstance(metric, RetrievalMetric)


def _belongs(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}/")


def _not_distributed() -> bool:
    return False


def _flattened(name: str, value: Any) -> dict[str, Result]:
    if isinstance(value, Mapping):
        return {
            key: result for part, inner in value.items() for key, result in _flattened(f"{name}/{part}", inner).items()
        }
    try:
        plain = _plain(value)
        return {name: plain if isinstance(plain, list) else float(plain)}
    except (TypeError, ValueError):
        raise EvaluationError(f"metric {name!r} gives {describe(value)}, not real numbers") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError
        return value.tolist()
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
