"""Wrap a torch loss as an objective: set its reduction, and move its constants to the output's device and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import ObjectiveError
from runtime.losses.supervised import SupervisedObjective, TargetIs
from runtime.objective import dtype_name


class TorchLoss(SupervisedObjective):
    """A torch loss as an objective.

    Its buffers, such as class weights, become plain attributes: they need not be synchronised between ranks or saved.
    """

    target_is: TargetIs = "values"

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self._constants = {name: tensor.detach().double().cpu() for name, tensor in loss.named_buffers()}
        for name in self._constants:
            delattr(loss, name)
        self.loss = loss
        self._place(torch.device("cpu"), torch.get_default_dtype())

    @property
    def name(self) -> str:
        """Name of the loss in messages."""
        return type(self.loss).__name__

    def loss_sum(self, output: Any, target: Any) -> Tensor:
        """Return the sum of the losses."""
        return self._reduced(output, target, "sum")

    def losses(self, output: Any, target: Any) -> Tensor:
        """Return the unreduced losses."""
        return self._reduced(output, target, "none")

    def _reduced(self, output: Any, target: Any, reduction: str) -> Tensor:
        self.same_shape(output, target)
        return self._call(reduction, output, self.like(output, target))

    def like(self, output: Tensor, target: Tensor) -> Tensor:
        """Convert a target (integer, boolean, or of another precision) to the output's dtype.

        Raises:
            ObjectiveError: the target is complex and the output is not.
        """
        if target.dtype == output.dtype:
            return target
        if target.is_complex() and not output.is_complex():
            raise ObjectiveError(
                f"{self.name} compares {dtype_name(output.dtype)} with a target in {dtype_name(target.dtype)}, whose imaginary "
                "part would be lost; make both real, or both complex"
            )
        return target.to(output.dtype)

    def _call(self, reduction: str, *inputs: Any) -> Tensor:
        loss: Any = self.loss
        if self._constants and (inputs[0].device, inputs[0].dtype) != self._placement:
            self._place(inputs[0].device, inputs[0].dtype)
        if loss.reduction != reduction:
            loss.reduction = reduction
        value: Tensor = loss.forward(*inputs)
        return value

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        for name, tensor in self._constants.items():
            setattr(self.loss, name, tensor.to(device, dtype))
        self._placement = (device, dtype)


def binarized(target: Tensor, *, signed: bool = False) -> Tensor:
    """Return 1 where the positive class is more probable, else 0; also 0 at one half, the same rule as for predictions.

    Args:
        signed: targets lie between -1 and 1 instead of 0 and 1.
    """
    return (target > (0 if signed else 0.5)).long()


def check_range(name: str, target: Tensor, *, signed: bool = False) -> None:
    """Reject targets outside a binary loss's range, for which neither the loss nor a metric is meaningful.

    Raises:
        ObjectiveError: names one such target, and the loss to use for it.
    """
    wrong = target[~((target.abs() <= 1) & (target != 0)) if signed else ~((target >= 0) & (target <= 1))]
    if wrong.numel():
        takes, other = (
            ("-1 and 1", "use BCEWithLogitsLoss for 0 and 1")
            if signed
            else (
                "0 and 1, or probabilities between them",
                "use SoftMarginLoss for -1 and 1, CrossEntropyLoss for class numbers",
            )
        )
        raise ObjectiveError(f"{name} takes targets of {takes}, but one is {wrong[0].item():g}: {other}")
