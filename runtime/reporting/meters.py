"""Loss, throughput and time measurements between two reports; synchronises with the device only when they are read.

A straggler does not show in step times: in the gradients' all-reduce every rank waits for the slowest. It shows in the time
that each rank spends alone, reading data and running forward (on a GPU: launching it).
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.data.batches import Window
from runtime.distributed.collectives import gather_bytes
from runtime.distributed.watchdog import CurrentPhase
from runtime.evaluation.metrics import MetricSet, Result
from runtime.exact_sum import ExactSum, exact_sums
from runtime.objective import Loss, Objective, Weight, add_weights, starting_gradient

_HELD = 64
_INDEPENDENT_PHASES = ("data", "forward")  # in which no rank waits for another


class PhaseTimes:
    """Sums the time of this rank's main thread in each phase, and updates its :class:`CurrentPhase`."""

    def __init__(self, position: CurrentPhase) -> None:
        self._position = position
        self._phase, self._since = "start", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str, step: int) -> None:
        """See :meth:`runtime.distributed.watchdog.CurrentPhase.enter`."""
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now
        self._position.enter(phase, step)


class TrainingMeter:
    """The training loss and its parts since the last report, the throughput, and norm and learning rates of the last update.

    Losses of steps whose update was not applied are left out. The sums since the last report are part of the run's state, so
    the report after a resumption also covers the steps before it. Times are those of this start. Losses are added up exactly
    and rounded once, so a report does not depend on which rank ran which slot.

    Args:
        device: of the losses.
        objective: defines what the weight counts, and the metrics' input.
        metrics: also computed on training batches; empty unless configured.
        times: this rank's time per phase.
        groups: names of the optimizer's parameter groups.

    Attributes:
        seconds: between the last two reports.
    """

    seconds = 0.0

    def __init__(
        self,
        device: torch.device,
        objective: Objective,
        metrics: MetricSet,
        times: PhaseTimes,
        groups: Sequence[str] = ("",),
    ) -> None:
        self._device = device
        self._objective = objective
        self._metrics = metrics
        self._times = times
        self._groups = groups
        self._weight: Weight
        self._held: dict[str, list[Tensor]]  # of slots, on the device: a report waits for it, a step does not
        self._packed: dict[str, list[Tensor]]  # the same, many in one tensor
        self._carried: dict[str, ExactSum]  # of earlier starts; equal on all ranks
        self._step: dict[str, list[Tensor]] = {}
        self._paused_at: float | None = None
        self._grad_norm: Tensor | None = None
        self._learning_rates: dict[str, Result] = {}
        self._reset()

    def start(self) -> None:
        """Start the clock: training begins here."""
        self._start_clock()
        self._paused_at = None

    def add(self, loss: Loss, batch: Any, *, slot: int) -> None:
        """Add one non-filler slot of the current step."""
        self._add("loss", loss.sum)
        for name, part in loss.parts.items():
            self._add(name, part)
        if self._metrics:
            self._metrics.update(self._objective, _detached(loss.output), batch, number=slot)

    def _add(self, name: str, value: Tensor) -> None:
        self._step.setdefault(name, []).append(value.detach())

    def slot_losses(self, weight: Weight) -> list[float]:
        """Return the share of each of this rank's slots in the current step's mean loss. Synchronises with the device.

        Args:
            weight: of the whole step.
        """
        return [float((loss * starting_gradient(loss, weight)).sum()) for loss in self._step.get("loss", [])]

    def note_learning_rates(self, rates: Sequence[float]) -> None:
        """Record all groups' rates for the next update, if it will be reported."""
        self._learning_rates = {"learning_rate": rates[0]}
        if len(rates) > 1:
            self._learning_rates |= {
                f"learning_rate/{name}": rate for name, rate in zip(self._groups, rates, strict=True)
            }

    def end_step(self) -> dict[str, list[Tensor]]:
        """Return the loss and its parts in each slot of the step, and start the next step."""
        sums, self._step = self._step, {}
        return sums

    def settle(
        self, window: Window, losses: Mapping[str, list[Tensor]], *, applied: bool, grad_norm: Tensor | None
    ) -> None:
        """Record a finished step; its losses and gradient norm only if its update was applied."""
        self._samples += window.samples
        self._grad_norm = grad_norm if applied else None
        if not applied:
            return
        for name, values in losses.items():
            if values[0].ndim:
                continue  # of an objective with several sums, each is also a part by itself
            held = self._held.setdefault(name, [])
            held += values
            if len(held) >= _HELD:
                self._packed.setdefault(name, []).append(torch.stack(held))
                held.clear()
        self._weight = add_weights(self._weight, window.weight)

    def pause(self) -> None:
        """Pause the clock: what follows is not training."""
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Resume the clock."""
        if self._paused_at is not None:
            self._since += time.monotonic() - self._paused_at
            self._paused_at = None

    def read(self, *, forget: bool = True) -> dict[str, Result]:
        """Return the measurements, equal on every rank except for times. Collective: every rank must call this.

        Args:
            forget: whether the next report begins here.
        """
        # Synchronises with the device once per report.
        busy = {phase: self._times.seconds.get(phase, 0.0) for phase in _INDEPENDENT_PHASES}
        payload = json.dumps([self._parts(), busy, peak_memory_bytes(self._device)]).encode()
        ranks = [json.loads(reply) for reply in gather_bytes(payload, self._device)]
        summed = {name: total.value for name, total in self._totals(parts for parts, _, _ in ranks).items()}
        self.seconds = seconds = max(time.monotonic() - self._since, 1e-9)
        report: dict[str, Result] = {}
        report |= self._objective.means(summed, self._weight)
        if self._grad_norm is not None:
            report["grad_norm"] = float(self._grad_norm)
        report |= self._learning_rates
        report["samples_per_second"] = self._samples / seconds
        if self._objective.unit == "tokens" and isinstance(self._weight, float):
            report["tokens_per_second"] = (self._weight - self._weight_before) / seconds
        report |= _shares([busy for _, busy, _ in ranks], seconds)
        report["peak_memory_bytes"] = max(peak for _, _, peak in ranks)
        report |= self._metrics.compute()
        if forget:
            self._reset()
        return report

    def state(self) -> dict[str, Any]:
        """Return the sums since the last report. Synchronises with the device. Collective: every rank must call this."""
        ranks = [json.loads(reply) for reply in gather_bytes(json.dumps(self._parts()).encode(), self._device)]
        sums = {name: total.parts for name, total in self._totals(ranks).items()}
        return {"sums": sums, "weight": self._weight, "metrics": self._metrics.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state from any world size; the next report is equal bit for bit."""
        self.forget()
        if "sums" in state:
            self._carried = exact_sums([state["sums"]])
        else:  # of a version that stored each rank's sum
            ranks = [
                {name: [part["sum"] or 0.0, *part["held"]] for name, part in own.items()} for own in state["ranks"]
            ]
            self._carried = exact_sums([{name: [value] for name, value in state["carried"].items()}, *ranks])
        weight = state["weight"]
        self._weight = tuple(weight) if isinstance(weight, list | tuple) else float(weight)
        self._metrics.load_state(state["metrics"])

    def forget(self) -> None:
        """Drop all measurements: the next report begins here."""
        self._step = {}
        self._reset()

    def _parts(self) -> dict[str, list[float]]:
        """Return the exact sums over this rank's slots since the last report or start. Synchronises with the device."""
        parts = {}
        for name, held in self._held.items():
            packed = [*self._packed.get(name, []), *([torch.stack(held)] if held else [])]
            parts[name] = ExactSum(torch.cat(packed).double().tolist()).parts
        return parts

    def _totals(self, ranks: Iterable[Mapping[str, list[float]]]) -> dict[str, ExactSum]:
        return exact_sums([{name: total.parts for name, total in self._carried.items()}, *ranks])

    def _reset(self) -> None:
        self._held, self._packed, self._carried = {}, {}, {}
        self._weight = 0.0
        self._grad_norm = None
        self._metrics.reset()
        self._start_clock()

    def _start_clock(self) -> None:
        self._samples = 0
        self._weight_before = self._weight if isinstance(self._weight, float) else 0.0  # of earlier starts
        self._times.seconds.clear()
        self._since = time.monotonic()


def peak_memory_bytes(device: torch.device) -> float:
    """Return torch's peak allocation on a GPU; on a CPU the peak resident memory of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _shares(ranks: list[dict[str, float]], seconds: float) -> dict[str, Result]:
    """Return the largest share of the time that a rank waited for data and, with several ranks, the slowest rank.

    ``slowest_rank_excess`` is the share of the time that this rank was busy beyond the median rank.

    Args:
        ranks: seconds per independent phase of each rank.
        seconds: the whole time.
    """
    shares: dict[str, Result] = {"data_share": max(times["data"] for times in ranks) / seconds}
    if len(ranks) > 1:
        busy = [sum(times.values()) for times in ranks]
        slowest = max(range(len(busy)), key=busy.__getitem__)
        excess = (busy[slowest] - statistics.median_low(busy)) / seconds
        shares |= {"slowest_rank": float(slowest), "slowest_rank_excess": excess}
    return shares


def _detached(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {name: _detached(part) for name, part in output.items()}
    if isinstance(output, list | tuple):
        return tuple(_detached(part) for part in output)
    return output.detach() if isinstance(output, Tensor) else output
