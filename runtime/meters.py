"""What a run measures about itself between two reports; the device is waited for only when they are read."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from runtime.batches import Window
from runtime.control import sum_by_name
from runtime.metrics import MetricSet, Result
from runtime.objective import Loss, Objective
from runtime.strategies import Update

_HELD = 64


class TrainingMeter:
    """The training loss, its parts, the gradient's norm and the throughput since the last report.

    Losses of steps whose update was not applied are left out.

    Args:
        device: where losses are.
        objective: tells what the weight counts, and the metrics' input.
        metrics: computed on training batches too; empty if not asked for.
    """

    def __init__(self, device: torch.device, objective: Objective, metrics: MetricSet) -> None:
        self._device = device
        self._objective = objective
        self._metrics = metrics
        self._step: dict[str, Tensor] = {}
        self._paused_at: float | None = None
        self._grad_norm: Tensor | None = None
        self._reset()

    def add(self, loss: Loss, batch: Any) -> None:
        """Take in one real slot of the current step."""
        for name, value in (("loss", loss.sum), *loss.parts.items()):
            value = value.detach()
            self._step[name] = self._step[name] + value if name in self._step else value
        if self._metrics:
            self._metrics.update(*self._objective.metric_inputs(_detached(loss.output), batch))

    def step_loss(self) -> float:
        """Return the loss sum of this rank's slots of the current step. Waits for the device."""
        return float(self._step["loss"]) if self._step else 0.0

    def end_step(self, window: Window, update: Update) -> None:
        """Take in the step, if its update was applied."""
        if update.applied:
            for name, value in self._step.items():
                held = self._held.setdefault(name, [])
                held.append(value)
                if len(held) == _HELD:
                    self._sums[name] = self._sum(name)
                    held.clear()
            self._weight += window.weight
            self._grad_norm = update.grad_norm
        self._step = {}
        self._samples += window.samples

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        """Let the clock go on."""
        if self._paused_at is not None:
            self._since += time.monotonic() - self._paused_at
            self._paused_at = None

    def read(self) -> dict[str, Result]:
        """Return and forget what was measured, equal on every rank but for times. Collective: every rank must call this."""
        # Waits for the device, once per report.
        summed = sum_by_name({name: float(self._sum(name)) for name in self._held}, self._device)
        seconds = max(time.monotonic() - self._since, 1e-9)
        report: dict[str, Result] = {}
        if self._weight > 0:
            report |= {name: total / self._weight for name, total in summed.items()}
        if self._grad_norm is not None:
            report["grad_norm"] = float(self._grad_norm)
        report["samples_per_second"] = self._samples / seconds
        if self._objective.unit == "tokens":
            report["tokens_per_second"] = self._weight / seconds
        if self._device.type == "cuda":
            report["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
        report |= self._metrics.compute()
        self._metrics.reset()
        self._reset()
        return report

    def _sum(self, name: str) -> Tensor | float:
        held = self._held[name]
        return self._sums.get(name, 0.0) + (torch.stack(held).double().sum() if held else 0.0)

    def _reset(self) -> None:
        self._held: dict[str, list[Tensor]] = {}  # steps not yet in the sums: an addition each would cost 5 µs
        self._sums: dict[str, Tensor | float] = {}  # in float64
        self._weight = 0.0
        self._grad_norm = None
        self._samples = 0
        self._since = time.monotonic()


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output
