"""A loss of torch as an objective: reduced as the runtime needs it, its constants where the output is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.losses.supervised import SupervisedObjective


class TorchLoss(SupervisedObjective):
    """One of torch's losses.

    Class weights and the like are constants, not buffers: nothing has to keep them equal on all ranks, or save them.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self._constants = {name: tensor.detach().double().cpu() for name, tensor in loss.named_buffers()}
        for name in self._constants:
            delattr(loss, name)
        self.loss = loss
        self._place(torch.device("cpu"), torch.get_default_dtype())

    @property
    def name(self) -> str:
        """What messages call the loss."""
        return type(self.loss).__name__

    def loss_sum(self, output: Any, target: Any) -> Tensor:
        """Return the sum of the losses."""
        return self._reduced(output, target, "sum")

    def losses(self, output: Any, target: Any) -> Tensor:
        """Return the losses one by one."""
        return self._reduced(output, target, "none")

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        self.same_shape(output, target)
        return self._call(reduction, output, target)

    def _call(self, reduction: str, *inputs: Any) -> Tensor:
        loss: Any = self.loss
        if self._constants:
            self._follow(inputs[0])
        if loss.reduction != reduction:
            loss.reduction = reduction
        found: Tensor = loss.forward(*inputs)
        return found

    def _follow(self, output: Tensor) -> None:
        autocast = torch.is_autocast_enabled(output.device.type)
        dtype = torch.float32 if autocast else output.dtype
        if (output.device, dtype) != self._placed:
            self._place(output.device, dtype)

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        for name, tensor in self._constants.items():
            setattr(self.loss, name, tensor.to(device, dtype))
        self._placed = (device, dtype)
