"""Runs a configuration and returns what happened, as plain data that travels between processes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.evaluation.evaluator import Evaluator
from runtime.run.state_saver import StateSaver
from runtime.session import train
from runtime.training.observers import StepReport

PROJECT = str(Path(__file__).parent / "project")


def configuration(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """A small exact run; ``changes`` replace whole sections."""
    base: dict[str, Any] = {
        "name": "run",
        "output": str(folder),
        "code": PROJECT,
        "model": {"target": "tiny:Mlp", "args": {}},
        "data": {"train": {"target": "tiny:points", "args": {}}},
        "batch": {"global_size": 16, "slots": 4},
        "objective": "CrossEntropyLoss",
        "optimizer": {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9}},
        "limit": {"steps": 5},
        "checkpoint": {"every": "1000000 steps"},
        "evaluation": {"every": "1000000 steps"},
        "reporting": {"every": "1 step", "progress": False},
    }
    return copy.deepcopy({**base, **changes})


def observe(
    config: dict[str, Any], *overrides: str, observers: Sequence[Callable[[StepReport], object]] = ()
) -> dict[str, Any]:
    """Train, and return losses, final weights, and the buffers of this rank at each evaluation and where a save may follow."""
    buffers: list[bytes] = []
    evaluate, prepare = Evaluator.evaluate, StateSaver.prepare

    def noting_evaluate(self: Any, stop_requested: Any) -> Any:
        buffers.append(_bytes_of(self._strategy.unwrapped))
        return evaluate(self, stop_requested)

    def noting_prepare(self: Any) -> None:
        buffers.append(_bytes_of(self._strategy.unwrapped))
        prepare(self)

    Evaluator.evaluate, StateSaver.prepare = noting_evaluate, noting_prepare  # type: ignore[assignment, method-assign]
    try:
        result = train(config, *overrides, observers=observers)
    finally:
        Evaluator.evaluate, StateSaver.prepare = evaluate, prepare  # type: ignore[method-assign]
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "outcome": result.outcome,
        "step": result.step,
        "results": dict(result.results),
        "losses": {r["step"]: r.get("loss") for r in records if r["event"] == "train"},
        "norms": {r["step"]: r.get("grad_norm") for r in records if r["event"] == "train"},
        "weights": {
            name: _array(value) for name, value in result.model.state_dict().items() if isinstance(value, torch.Tensor)
        },
        "buffers": buffers,
    }


def _bytes_of(module: torch.nn.Module) -> bytes:
    return b"".join(_array(buffer).tobytes() for buffer in module.buffers())


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Types that NumPy has not come as their bytes."""
    whole = tensor.detach().clone()
    whole = whole.to(torch.uint8) if whole.dtype == torch.bool else whole
    try:
        return whole.numpy()
    except TypeError:
        return whole.contiguous().reshape(-1).view(torch.uint8).numpy()


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Largest relative difference between two runs' final weights and buffers."""
    assert first["weights"].keys() == second["weights"].keys()
    worst = 0.0
    for name, value in first["weights"].items():
        scale = max(abs(value).max(), 1e-12)
        worst = max(worst, float(abs(value - second["weights"][name]).max() / scale))
    return worst


def assert_bitwise_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Compare two runs' final weights and buffers bit for bit."""
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert value.tobytes() == second["weights"][name].tobytes(), name
