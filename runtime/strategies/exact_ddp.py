"""Data parallelism that gives the same bits on any number of processes (``determinism: exact``).

DistributedDataParallel adds a rank's slots one after another and then the ranks in the order of the process group's algorithm,
so rounding depends on which rank ran which slot. Here no wrapper reduces: each slot's gradient is a leaf of the tree that
:mod:`runtime.distributed.slot_tree` describes, and a reduction of our own follows the last backward pass. The price is that it
does not overlap with that pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.data.batches import slots_of_ranks
from runtime.distributed.slot_reduction import OrderedReduction, SlotReduction
from runtime.distributed.slot_tree import Node, RunningSum, cover, total
from runtime.objective import TrainingModule
from runtime.strategies.ddp import DDPStrategy
from runtime.strategies.finite import clip_to_norm
from runtime.strategies.ordered_norm import sums_of_squares
from runtime.strategies.reduction import keep_buffers_from_being_sent
from runtime.strategies.unused_parameters import LEAVE_OUT, UnusedParameters
from runtime.strategies.update import Update

Gradients = list[Tensor | None]
"""The gradient of each trained parameter; None where there is none."""


class ExactDDPStrategy(DDPStrategy):
    """Data parallelism in which every process holds the whole model, and every sum has one order."""

    def prepare(self, module: TrainingModule, optimizer: Optimizer, *, slots: int) -> None:
        """Prepare module and optimizer. Collective."""
        super().prepare(module, optimizer, slots=slots)
        own = self.slot_reduction.own_slots
        self._cover, self._sums = cover(own), RunningSum[Gradients](own, _added)
        self._held: Node | None = None  # the slots whose gradient is in the parameters

    def _reduction(self, slots: int) -> SlotReduction:
        return OrderedReduction(slots_of_ranks(slots, self.world_size), rank=self.rank)

    def _wrap(self) -> None:
        assert self._module is not None
        self._wrapped = self._module
        if self.world_size > 1:
            _send_from_rank_0(self._module)
        self._collect_trainable(self._module)
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._rows = [slice(0, shape[0] if shape else 1) for shape in self._shapes]
        self._buckets = _buckets(self._parameters, int(self._options.bucket_mb * 2**20))

    def warm_up(self, filler: Any) -> None:
        """Do nothing: the order of summation is the same in every step."""

    def unused_parameters(self, batch: Any) -> UnusedParameters | None:
        """Return the parameters that a batch gives no gradient."""
        unused = super().unused_parameters(batch)
        return unused and UnusedParameters(unused.names, None, f", so these do not train them; {LEAVE_OUT}")

    def microbatch(self, *, slot: int, last: bool) -> AbstractContextManager[None]:
        """Return a context for one forward and backward pass; take the gradient of the pass before."""
        if slot >= 0:
            held, self_alone = self._held, Node(0, slot)
            if held == Node(0, slot - 1) and slot % 2 and held is not None:
                self._held = held.parent  # autograd adds to the gradient of the slot before, as the tree does
            else:
                self._take()
                self._held = self_alone
        return nullcontext()

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Sum the gradient over all slots, check, clip and apply it, and clear it. Waits for the device. Collective."""
        self._take()
        self._sum_over_slots()
        # -0.0 becomes 0.0, as it does under fsdp, where a slot that does not use a parameter contributes 0.0.
        torch._foreach_add_(self._gradients(), 0.0)
        return super().step(max_grad_norm, measure_norm=measure_norm)

    def discard(self) -> None:
        """Clear the gradient without applying it."""
        self._held = None
        self._sums.take()
        super().discard()

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return (
            sums_of_squares(self._shapes, self._rows, [parameter.grad for parameter in self._parameters]).sum().sqrt()
        )

    def _clip(self, gradients: list[Tensor], max_grad_norm: float | None, grad_norm: Tensor | None) -> None:
        if max_grad_norm is not None and grad_norm is not None:
            clip_to_norm(gradients, max_grad_norm, grad_norm)
        else:
            super()._clip(gradients, max_grad_norm, grad_norm)

    def _take(self) -> None:
        if self._held is not None:
            self._sums.put(self._held, [parameter.grad for parameter in self._parameters])
            self._clear()
            self._held = None

    def _sum_over_slots(self) -> None:
        sums = self._sums.take()
        if self.world_size == 1:
            gradients = total(zip(self._cover, sums, strict=True), _added)
            assert gradients is not None
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return
        for bucket in self._buckets:
            self._reduce(bucket, sums)

    def _reduce(self, bucket: list[int], sums: Sequence[Gradients | None]) -> None:
        """Sum the gradients of some parameters, of one dtype and device, over the ranks."""
        parameters = [_real(self._parameters[index]) for index in bucket]
        sizes = [parameter.numel() for parameter in parameters]
        flat = [None if held is None else _flat(parameters, [held[index] for index in bucket]) for held in sums]
        summed = self.slot_reduction.sum(flat, parameters[0].new_empty(sum(sizes) + len(bucket)))
        *parts, uses = torch.split(summed, [*sizes, len(bucket)])
        for index, template, part, use in zip(bucket, parameters, parts, uses.tolist(), strict=True):
            # A separate allocation, as on one process.
            parameter = self._parameters[index]
            parameter.grad = torch.empty_like(parameter) if use else None
            if parameter.grad is not None:
                _real(parameter.grad).copy_(_shaped(part, template))


def _send_from_rank_0(module: TrainingModule) -> None:
    """Give every rank rank 0's parameters and buffers, as DistributedDataParallel does when it is created. Collective."""
    keep_buffers_from_being_sent(module)
    kept = cast(list[str], module._ddp_params_and_buffers_to_ignore)
    buffers = [buffer for name, buffer in module.named_buffers() if name not in kept]
    for tensor in (*module.parameters(), *buffers):
        value = tensor.detach().contiguous()
        dist.broadcast(value, 0)
        tensor.detach().copy_(value)


def _added(left: Gradients, right: Gradients) -> Gradients:
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if pairs:
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


def _buckets(parameters: Sequence[nn.Parameter], most_bytes: int) -> list[list[int]]:
    """Return positions of parameters of one dtype and device, a bucket's together at most this large if it has several."""
    buckets: list[list[int]] = []
    sizes: list[int] = []
    open_buckets: dict[Any, int] = {}
    for index, parameter in enumerate(parameters):
        kind = (parameter.dtype, parameter.device)
        number = open_buckets.get(kind)
        if number is None or sizes[number] + parameter.nbytes > most_bytes:
            number = open_buckets[kind] = len(buckets)
            buckets.append([])
            sizes.append(0)
        buckets[number].append(index)
        sizes[number] += parameter.nbytes
    return buckets


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _flat(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return gradients one after another in the order of the parameters' memory, then for each whether there is one."""
    parts = [
        p.new_full((p.numel(),), -0.0) if g is None else _in_memory_order(_real(g), p)
        for p, g in zip(parameters, gradients, strict=True)
    ]
    return torch.cat([*parts, parts[0].new_tensor([float(gradient is not None) for gradient in gradients])])


def _in_memory_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    if parameter.is_contiguous():
        return gradient.reshape(-1)
    return torch.empty_like(parameter).copy_(gradient).as_strided((parameter.numel(),), (1,))


def _shaped(flat: Tensor, parameter: Tensor) -> Tensor:
    """Undo :func:`_in_memory_order`."""
    if parameter.is_contiguous():
        return flat.view(parameter.shape)
    return flat.as_strided(parameter.shape, torch.empty_like(parameter).stride(), flat.storage_offset())
