"""The reduction of one block's gradient over slots and ranks, in place of FSDP2's reduce-scatter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.distributed.slot_reduction import ABSENT, OrderedReduction
from runtime.distributed.slot_tree import Node, RunningSum
from runtime.errors import GradientError


class Pass:
    """The backward pass that runs now."""

    def __init__(self) -> None:
        self.number, self.slot, self.last, self.filler = 0, -1, True, False

    def begin(self, *, slot: int, last: bool) -> None:
        """Begin another pass: of this slot, -1 if its gradient does not count; and whether it is the step's last."""
        self.number, self.slot, self.last = self.number + 1, slot, last


class BlockReduction:
    """Follows FSDP2's protocol for custom reduce-scatters (torch 2.11 to 2.13).

    FSDP2 calls it once in each pass with the block's whole gradient, and adds what it gives to the shard of the gradient.
    That is -0.0, which changes nothing, except in a step's last pass.

    Args:
        name: of the block.
        current: the pass.
        reduction: over all ranks.
        replicas: of the sharded model; ranks count through the shards of the first replica, then of the second.
        shards: of each replica.
    """

    def __init__(self, name: str, current: Pass, reduction: OrderedReduction, *, replicas: int, shards: int) -> None:
        self._name, self._current, self._reduction = name, current, reduction
        self._replicas, self._shards = replicas, shards
        self._sums = RunningSum[Tensor](reduction.own_slots, Tensor.add_)
        self._reduced_in = 0
        self._numbers: int | None = None  # in the block's gradient

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory for FSDP2."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Take a pass's gradient (shards of each rank of a replica, one after another), and give this rank's shard. Collective.

        Raises:
            GradientError: the block's gradient comes in parts, or lacks parameters of other passes.
        """
        self._put(input_tensor)
        output_tensor.fill_(ABSENT)
        if not self._current.last:
            return
        values = [None if value is None else self._by_owner(value) for value in self._sums.take()]
        part = self._reduction.sum_of_own_part(values, self._by_owner(input_tensor))
        # Each replica owns a part of the shard; FSDP2's all-reduce over the replicas puts them together.
        replica = self._reduction.rank // self._shards
        own = output_tensor[replica * len(part) : (replica + 1) * len(part)]
        own.copy_(part[: len(own)])

    def reduce_alone(self, gradient: Tensor) -> None:
        """Do the same in place, on one process: FSDP2 calls no reduce-scatter there, but its hook."""
        self._put(gradient)
        if not self._current.last:
            gradient.fill_(ABSENT)
            return
        gradient.copy_(self._reduction.sum_of_own_part(self._sums.take(), gradient))

    def discard(self) -> None:
        """Forget the sums so far."""
        self._sums.take()

    def _put(self, gradient: Tensor) -> None:
        if self._reduced_in == self._current.number:
            raise GradientError(
                f"{self._name or 'the model'} is called more than once in a forward pass, so its gradient comes in parts, "
                "whose sum would depend on the number of processes: name a block that contains all calls in "
                "strategy.fsdp.wrap, or leave it out; or use determinism: strict"
            )
        if self._numbers not in (None, gradient.numel()):  # torch 2.11's FSDP2 leaves unused parameters out
            raise GradientError(
                f"{self._name or 'the model'} uses other parameters in this slot than in others: determinism: exact with fsdp "
                f"needs a newer torch for that (this is {torch.__version__}); use strategy.kind: ddp, or determinism: strict"
            )
        self._reduced_in, self._numbers = self._current.number, gradient.numel()
        if self._current.slot >= 0 and not self._current.filler:
            # FSDP2 reuses the memory after the step's other passes.
            self._sums.put(Node(0, self._current.slot), gradient if self._current.last else gradient.clone())

    def _by_owner(self, gradient: Tensor) -> Tensor:
        """Return a gradient as one part for each rank, in their order."""
        if self._replicas == 1:
            return gradient
        shards = gradient.view(self._shards, -1)
        part = -(-shards.shape[1] // self._replicas)
        padded = shards.new_full((self._shards, self._replicas * part), ABSENT)
        padded[:, : shards.shape[1]] = shards
        return padded.view(self._shards, self._replicas, part).transpose(0, 1).reshape(-1)
