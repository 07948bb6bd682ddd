"""What a run measures about itself between two reports; the device is waited for only when they are read.

Who holds the others up cannot be seen from the time of a step: in the gradients' all-reduce all wait for the slowest. It is
seen from the time that each rank spends by itself, reading data and running forward (on a GPU: launching it).
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.data.batches import Window
from runtime.distributed.collectives import gather_bytes, sum_in_order
from runtime.distributed.watchdog import CurrentPhase
from runtime.evaluation.metrics import MetricSet, Result
from runtime.objective import Loss, Objective, Weight, add_weights, starting_gradient

_HELD = 64
_ALONE = ("data", "forward")  # phases in which no rank waits for another


class PhaseTimes:
    """Adds up how long this rank's main thread is in each phase, and passes on where it is."""

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

    Losses of steps whose update was not applied are left out. What was summed since the last report is part of the run's
    state, so that the report after a resumption covers the steps before it as well. Times are those of this start.

    Args:
        device: where losses are.
        objective: tells what the weight counts, and the metrics' input.
        metrics: computed on training batches too; empty if not asked for.
        times: where this rank's time goes.
        groups: names of the optimizer's parameter groups.

    Attributes:
        seconds: what lay between the last two reports.
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
        self._held: dict[str, list[Tensor]]  # steps not yet in the sums: an addition each would cost 5 µs
        self._sums: dict[str, Tensor]  # in float64
        self._carried: dict[str, float]  # sums of earlier starts with other numbers of ranks; equal on all
        self._step: dict[str, Tensor] = {}
        self._paused_at: float | None = None
        self._grad_norm: Tensor | None = None
        self._learning_rates: dict[str, Result] = {}
        self._reset()

    def start(self) -> None:
        """Begin to measure time: training begins here."""
        self._start_clock()
        self._paused_at = None

    def add(self, loss: Loss, batch: Any) -> None:
        """Take in one real slot of the current step."""
        self._add("loss", loss.sum)
        for name, part in loss.parts.items():
            self._add(name, part)
        if self._metrics:
            self._metrics.update(self._objective, _detached(loss.output), batch)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._step[name] = self._step[name] + value if name in self._step else value

    def step_loss(self, weight: Weight) -> float:
        """Return the part of the current step's mean loss that this rank's slots make up. Waits for the device.

        Args:
            weight: of the whole step.
        """
        if not self._step:
            return 0.0
        loss_sum = self._step["loss"]
        return float((loss_sum * starting_gradient(loss_sum, weight)).sum())

    def note_learning_rates(self, rates: Sequence[float]) -> None:
        """Take in the rates of all groups for the update that is about to be made, if it will be reported."""
        self._learning_rates = {"learning_rate": rates[0]}
        if len(rates) > 1:
            self._learning_rates |= {
                f"learning_rate/{name}": rate for name, rate in zip(self._groups, rates, strict=True)
            }

    def end_step(self) -> dict[str, Tensor]:
        """Return the step's sums, and begin another step."""
        sums, self._step = self._step, {}
        return sums

    def settle(self, window: Window, sums: Mapping[str, Tensor], *, applied: bool, grad_norm: Tensor | None) -> None:
        """Take in a step, its losses and its gradient's norm only if its update was applied."""
        self._samples += window.samples
        self._grad_norm = grad_norm if applied else None
        if not applied:
            return
        for name, value in sums.items():
            held = self._held.setdefault(name, [])
            held.append(value)
            if len(held) == _HELD:
                self._sums[name] = self._sum(name)
                held.clear()
        self._weight = add_weights(self._weight, window.weight)

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Let the clock go on."""
        if self._paused_at is not None:
            self._since += time.monotonic() - self._paused_at
            self._paused_at = None

    def read(self, *, forget: bool = True) -> dict[str, Result]:
        """Return what was measured, equal on every rank but for times. Collective: every rank must call this.

        Args:
            forget: whether the next report begins here.
        """
        # Waits for the device, once per report.
        # Of an objective with several sums, each is a part of its own as well.
        sums = {name: float(total) for name in self._held if (total := self._sum(name)).ndim == 0}
        alone = {phase: self._times.seconds.get(phase, 0.0) for phase in _ALONE}
        payload = json.dumps([sums, alone, peak_memory_bytes(self._device)]).encode()
        told = [json.loads(reply) for reply in gather_bytes(payload, self._device)]
        summed = sum_in_order([self._carried, *(sums for sums, _, _ in told)])
        self.seconds = seconds = max(time.monotonic() - self._since, 1e-9)
        report: dict[str, Result] = {}
        report |= self._objective.means(summed, self._weight)
        if self._grad_norm is not None:
            report["grad_norm"] = float(self._grad_norm)
        report |= self._learning_rates
        report["samples_per_second"] = self._samples / seconds
        if self._objective.unit == "tokens" and isinstance(self._weight, float):
            report["tokens_per_second"] = (self._weight - self._weight_before) / seconds
        report |= _shares([alone for _, alone, _ in told], seconds)
        report["peak_memory_bytes"] = max(peak for _, _, peak in told)
        report |= self._metrics.compute()
        if forget:
            self._reset()
        return report

    def state(self) -> dict[str, Any]:
        """Return what was summed since the last report. Waits for the device. Collective: every rank must call this."""
        own = {
            name: {
                "sum": self._sums[name].item() if name in self._sums else None,
                "held": torch.stack(held).double().tolist() if held else [],
            }
            for name, held in self._held.items()
            if self._sum(name).ndim == 0
        }
        ranks = [json.loads(reply) for reply in gather_bytes(json.dumps(own).encode(), self._device)]
        return {"ranks": ranks, "carried": self._carried, "weight": self._weight, "metrics": self._metrics.state()}

    def go_on_from(self, state: Mapping[str, Any], *, rank: int, world_size: int) -> None:
        """Go on from a state, of any number of ranks; with as many ranks the next report is the same bit for bit."""
        self.forget()
        ranks: list[Mapping[str, Any]] = state["ranks"]
        self._carried = dict(state["carried"])
        if len(ranks) == world_size:
            self._sums, self._held = {}, {}
            for name, told in ranks[rank].items():
                if told["sum"] is not None:
                    self._sums[name] = self._on_device(told["sum"])
                self._held[name] = [self._on_device(value) for value in told["held"]]
        else:
            totals = [{name: (told["sum"] or 0.0) + sum(told["held"]) for name, told in own.items()} for own in ranks]
            self._carried = sum_in_order([self._carried, *totals])
        weight = state["weight"]
        self._weight = tuple(weight) if isinstance(weight, list | tuple) else float(weight)
        self._metrics.go_on_from(state["metrics"])

    def forget(self) -> None:
        """Begin the next report here."""
        self._step = {}
        self._reset()

    def _on_device(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._device)

    def _sum(self, name: str) -> Tensor:
        held = self._held[name]
        total = self._sums.get(name)
        if held:
            added = torch.stack(held).double().sum(0)
            total = added if total is None else total + added
        assert total is not None
        return total

    def _reset(self) -> None:
        self._held, self._sums, self._carried = {}, {}, {}
        self._weight = 0.0
        self._grad_norm = None
        self._metrics.reset()
        self._start_clock()

    def _start_clock(self) -> None:
        self._samples = 0
        self._weight_before = self._weight if isinstance(self._weight, float) else 0.0  # consumed by earlier starts
        self._times.seconds.clear()
        self._since = time.monotonic()


def peak_memory_bytes(device: torch.device) -> float:
    """Return the most that torch has held on a GPU; on a CPU the most that the process has held, Python included."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _shares(alone: list[dict[str, float]], seconds: float) -> dict[str, Result]:
    """Return the largest share of the time that a rank waited for data and, with several ranks, who holds the others up.

    ``slowest_rank_excess`` is how much more of the time that rank was busy by itself than the middle one of the ranks.
    """
    shares: dict[str, Result] = {"data_share": max(times["data"] for times in alone) / seconds}
    if len(alone) > 1:
        busy = [sum(times.values()) for times in alone]
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
