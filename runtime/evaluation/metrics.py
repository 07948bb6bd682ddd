"""torchmetrics with Lockstep's own reduction: exact on any number of ranks, including ranks without data.

torchmetrics' synchronisation aborts when a rank has no data, and sums in float32. Here every rank's states are gathered as
safetensors bytes (no pickle) and merged in rank order, without those of ranks that have no data; or, so that the result does
not depend on the ranks, each microbatch's state is added in the order of :mod:`runtime.distributed.slot_tree`. Importing
torchmetrics takes seconds, so it is imported only if a metric is configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.config.component import described
from runtime.distributed.collectives import gather_bytes
from runtime.distributed.slot_tree import Node, RunningSum
from runtime.errors import EvaluationError, LockstepError, MetricError
from runtime.evaluation.class_results import kind_of, thinned
from runtime.evaluation.compute_groups import sharing_state
from runtime.evaluation.metric_inputs import MetricInputs, parts_of, signature_of
from runtime.evaluation.metric_states import (
    GatheredStates,
    MetricState,
    added,
    decoded,
    encoded,
    gathered_of,
    merged,
    state_of,
)
from runtime.objective import Objective, describe

if TYPE_CHECKING:
    from torchmetrics import Metric

Result = float | list[Any]
States = dict[str, MetricState]
"""The states of the metrics that are updated, by key."""


class MetricSet:
    """Several named metrics, updated with the same batches; metrics with equal states share one.

    Args:
        metrics: name to metric; they are moved to the device, and their states are kept in float64.
        device: of the predictions.
        ordered: whether sums are the same bits on any number of ranks.

    Raises:
        EvaluationError: a metric's ``update`` is not supported.
    """

    def __init__(self, metrics: Mapping[str, Metric], device: torch.device, *, ordered: bool = False) -> None:
        self._device, self._ordered = device, ordered
        self._metrics = dict(metrics)
        self._signatures = {name: signature_of(metric) for name, metric in self._metrics.items()}
        self._kinds = {name: kind_of(metric) for name, metric in self._metrics.items()}
        for part in (part for metric in self._metrics.values() for part in parts_of(metric)):
            # States merged here must not be merged again in compute(); sync_on_compute is read in __init__ only.
            part.distributed_available_fn = _not_distributed
            part.to(device)
            part.set_dtype(torch.float64)
        self._groups = sharing_state(self._metrics)
        self._carried: list[GatheredStates] = []  # of earlier starts; equal on every rank
        # Ordered: of microbatches with these numbers, each summed over steps; or of an evaluation's, summed as they come.
        self._by_number: dict[int, States] = {}
        self._running: RunningSum[States] | None = None

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

    def reset(self, own: range | None = None) -> None:
        """Reset all metrics.

        Args:
            own: numbers of this rank's microbatches, if each comes once and from the first to the last.
        """
        self._carried, self._by_number = [], {}
        self._running = RunningSum(own, self._added) if self._ordered and own is not None else None
        for metric in self._metrics.values():
            metric.reset()

    @torch.no_grad()
    def update(self, objective: Objective, output: Any, batch: Any, *, number: int = 0) -> None:
        """Update with one microbatch: the model's output, and the batch.

        Args:
            number: of the microbatch, over all ranks.

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
        if self._ordered:
            self._put(self._by_number.get(number) or self._carried_of(number) or self._fresh())
        self._update(inputs)
        if self._ordered:
            if self._running is not None:
                self._running.put(Node(0, number), self._taken())
            else:
                self._by_number[number] = self._taken()

    def _update(self, inputs: MetricInputs) -> None:
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
        """Return the states of each rank, or of each microbatch's number, for a checkpoint. Collective."""
        if not self._metrics:
            return []
        return [
            {"updates": dict(each.updates), "states": dict(each.states), "node": each.node} for each in self._gathered()
        ]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Reset, and restore the same metrics' states from any world size. Call with the same state on every rank."""
        self.reset()
        self._carried = [
            GatheredStates(each["updates"], each["states"], node and Node(*node))
            for each in state
            for node in [each.get("node")]
        ]

    def _gathered(self) -> list[GatheredStates]:
        replies = gather_bytes(encoded(self._own()), self._device)
        gathered = [each for payload in replies for each in decoded(payload)]
        if not self._ordered:
            return [*self._carried, *gathered]
        continued = {each.node for each in gathered}
        gathered += [each for each in self._carried if each.node is None or each.node not in continued]
        return sorted(gathered, key=lambda each: each.node.slots.start if each.node else -1)

    def _own(self) -> list[GatheredStates]:
        """Return this rank's states: one, or in order one for each node or number."""
        if not self._ordered:
            return [gathered_of(self._taken())]
        if self._running is None:
            return [gathered_of(states, Node(0, number)) for number, states in self._by_number.items()]
        nodes = zip(self._running.nodes, self._running.take(), strict=True)
        return [gathered_of(states, node) for node, states in nodes if states is not None]

    def _computed(self, name: str, merged: Sequence[MetricState]) -> dict[str, Result]:
        metric = self._metrics[name]
        parts = parts_of(metric)
        before = [MetricState.of(part) for part in parts]
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

    def _merged(self, part: Metric, key: str, gathered: Sequence[GatheredStates]) -> MetricState:
        state = merged(part, key, gathered, self._device)
        if _is_retrieval(part) and state.states:  # it counts queries in an array as long as their largest index
            indexes = torch.unique(torch.cat(list(state.states["indexes"])), return_inverse=True)[1]
            state = MetricState({**state.states, "indexes": [indexes]}, state.updates)
        return state

    def _taken(self) -> States:
        return {key: MetricState.of(part) for key, part in self._leading_parts()}

    def _put(self, states: States) -> None:
        for key, part in self._leading_parts():
            states[key].put_into(part)

    def _carried_of(self, number: int) -> States | None:
        """Return what an earlier start knew of a microbatch's number."""
        held = next((each for each in self._carried if each.node == Node(0, number)), None)
        return held and {key: state_of(part, key, held, self._device) for key, part in self._leading_parts()}

    def _fresh(self) -> States:
        for _, part in self._leading_parts():
            part.reset()
        return self._taken()

    def _added(self, left: States, right: States) -> States:
        return {key: added(part, left[key], right[key]) for key, part in self._leading_parts()}

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
