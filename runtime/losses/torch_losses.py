"""A loss of torch as an objective: reduced as the runtime needs it, its constants where the output is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import ObjectiveError
from runtime.losses.supervised import SupervisedObjective, TargetIs
from runtime.objective import plain


class TorchLoss(SupervisedObjective):
    """One of torch's losses.

    Class weights and the like are constants, not buffers: nothing has to keep them equal on all ranks, or save them.
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
        return self._call(reduction, output, self.like(output, target))

    def like(self, output: Tensor, target: Tensor) -> Tensor:
        """Return a target in the output's type: whole numbers, yes and no, and numbers of another precision mean the same.

        Raises:
            ObjectiveError: the target is complex, and the output is not.
        """
        if target.dtype == output.dtype:
            return target
        if target.is_complex() and not output.is_complex():
            raise ObjectiveError(
                f"{self.name} compares {plain(output.dtype)} with a target in {plain(target.dtype)}, whose imaginary part "
                "would be lost; make both real, or both complex"
            )
        return target.to(output.dtype)

    def _call(self, reduction: str, *inputs: Any) -> Tensor:
        loss: Any = self.loss
        if self._constants and (inputs[0].device, inputs[0].dtype) != self._placed:
            self._place(inputs[0].device, inputs[0].dtype)
        if loss.reduction != reduction:
            loss.reduction = reduction
        found: Tensor = loss.forward(*inputs)
        return found

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        for name, tensor in self._constants.items():
            setattr(self.loss, name, tensor.to(device, dtype))
        self._placed = (device, dtype)


def likelier(target: Tensor, *, signed: bool = False) -> Tensor:
    """Return 1 where a yes is more probable than a no, else 0; so also at one half, as predictions are judged.

    Args:
        signed: targets lie between -1 and 1 rather than 0 and 1.
    """
    return (target > (0 if signed else 0.5)).long()


def check_range(name: str, target: Tensor, *, signed: bool = False) -> None:
    """Refuse targets that a loss of yes and no does not take, so that neither it nor a metric means anything.

    Raises:
        ObjectiveError: naming one, and the loss that takes it.
    """
    wrong = target[~((target.abs() <= 1) & (target != 0)) if signed else ~((target >= 0) & (target <= 1))]
    if wrong.numel():
        takes, other = (
            ("-1 and 1", "0 and 1 go with BCEWithLogitsLoss")
            if signed
            else (
                "0 and 1, or probabilities between them",
                "-1 and 1 go with SoftMarginLoss, class numbers with CrossEntropyLoss",
            )
        )
        raise ObjectiveError(f"{name} takes targets of {takes}, and one is {wrong[0].item():g}: {other}")
