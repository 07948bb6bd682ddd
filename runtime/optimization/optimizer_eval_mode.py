"""Optimizers with different weights for training and evaluation, such as schedule-free ones: ``train()`` and ``eval()``.

Defazio et al., "The Road Less Scheduled" (2024). Their switch computes one kind of weights from the other with rounding, so
evaluating more often would change a run. Here the training weights are kept and restored bit for bit. A checkpoint holds the
evaluation weights as the model's, and the training weights in addition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.optimization.combined import members
from runtime.state.local_weights import LocalWeights
from runtime.state.shards import Shard, StoredTensor


def switches(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has different weights for evaluation and training."""
    return bool(_switching(optimizer))


def begin_training(optimizer: Optimizer) -> None:
    """Switch the module to the training weights; call before the first step, and after loading a state."""
    for member in _switching(optimizer):
        member.train()


def end_training(optimizer: Optimizer) -> None:
    """Switch the module to the evaluation weights at the end of training."""
    for member in _switching(optimizer):
        member.eval()


@contextmanager
def evaluated_weights(optimizer: Optimizer) -> Iterator[None]:
    """Switch the module to the evaluation weights, and restore the training weights on exit. No effect on other optimizers."""
    switching = _switching(optimizer)
    kept = [(p, p.detach().clone()) for member in switching for group in member.param_groups for p in group["params"]]
    try:
        for member in switching:
            member.eval()
        yield
    finally:
        for member in switching:
            member.train()
        with torch.no_grad():
            for parameter, weight in kept:
                parameter.copy_(weight)


def training_weights(optimizer: Optimizer, module: nn.Module, held: LocalWeights) -> dict[str, Tensor | Shard] | None:
    """Return the training weights by name, for a checkpoint; None if the optimizer does not switch weights."""
    if not switches(optimizer):
        return None
    switched = {id(p) for member in _switching(optimizer) for group in member.param_groups for p in group["params"]}
    names = [name for name, p in module.named_parameters() if id(p) in switched]
    return {name: held.to_checkpoint(name, held.pieces()[name]) for name in names}


@torch.no_grad()
def load_training_weights(weights: Mapping[str, StoredTensor] | None, held: LocalWeights) -> None:
    """Load the training weights into the module, after its state and the optimizer's were loaded."""
    for name, weight in (weights or {}).items():
        held.pieces()[name].copy_(held.from_checkpoint(name, weight))
    if weights:
        held.refresh()


def cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a state dict's tensors; tensors that share memory (tied weights) also share it in the copy."""
    copies: dict[Any, Tensor] = {}

    def copy(name: str, value: Tensor) -> Tensor:
        fingerprint = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        return copies.setdefault(fingerprint, value.detach().clone())

    copied = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            value = copy(name, value)
        elif isinstance(value, Shard) and value.part is not None:
            value = value._replace(part=copy(name, value.part))
        copied[name] = value
    return copied


def _switching(optimizer: Optimizer) -> list[Any]:
    return [m for m in members(optimizer) if callable(getattr(m, "train", None)) and callable(getattr(m, "eval", None))]
