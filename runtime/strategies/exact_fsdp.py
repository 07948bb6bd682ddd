"""FSDP2 that gives the same bits on any number of processes, and the same as ``ddp`` (``determinism: exact``).

FSDP2 reduces a block's gradient in each backward pass, so slots that run at the same time are added first: another order on
another number of ranks. Here its reduce-scatter is replaced. Each rank adds up its own slots' whole gradients in the order of
:mod:`runtime.distributed.slot_tree`, and in a step's last pass the ranks' sums meet at the owners of the shards. With one slot
per rank nothing more is held or sent than FSDP2 does; with several, unsharded gradients, as with ``no_sync``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from runtime.data.batches import slots_of_ranks
from runtime.distributed.slot_reduction import OrderedReduction, SlotReduction
from runtime.objective import Loss, TrainingModule
from runtime.optimization.elementwise import refuse_coupled_rows
from runtime.strategies.block_reduction import BlockReduction, Pass
from runtime.strategies.fsdp import FSDPStrategy
from runtime.strategies.fsdp_tensors import local, rows_of
from runtime.strategies.local_step import LocalStep
from runtime.strategies.ordered_norm import sums_of_squares
from runtime.strategies.update import Update


class ExactFSDPStrategy(FSDPStrategy):
    """Data parallelism in which each rank holds a shard of the model, and every sum has one order."""

    def prepare(self, module: TrainingModule, optimizer: Optimizer, *, slots: int) -> None:
        """Shard module and optimizer. Collective.

        Raises:
            ConfigurationError: the module cannot be sharded as configured, or the optimizer cannot be trusted with shards.
        """
        refuse_coupled_rows(optimizer, self.device)
        super().prepare(module, optimizer, slots=slots)
        assert self._optimizer_step is not None
        self._optimizer_step = LocalStep(optimizer, self._optimizer_step)
        self._shapes = [parameter.shape for parameter in self._parameters]
        self._rows = [rows_of(parameter) for parameter in self._parameters]
        replicas = self._section.replicas
        self._pass = Pass()
        self._reductions: list[BlockReduction] = []
        for name, block in module.named_modules():
            if isinstance(block, FSDPModule):
                reduction = BlockReduction(
                    name.removeprefix("model."),
                    self._pass,
                    self._ordered,
                    replicas=replicas,
                    shards=self.world_size // replicas,
                )
                block.set_custom_reduce_scatter(cast(Any, reduction))
                if self.world_size == 1:
                    block.set_all_reduce_hook(reduction.reduce_alone)
                self._reductions.append(reduction)

    def _reduction(self, slots: int) -> SlotReduction:
        self._ordered = OrderedReduction(slots_of_ranks(slots, self.world_size), rank=self.rank)
        return self._ordered

    def microbatch(self, *, slot: int, last: bool) -> AbstractContextManager[None]:
        """Return a context for one forward and backward pass; gradients are reduced in a step's last one."""
        self._pass.begin(slot=slot, last=last)
        if self._section.replicas > 1:
            cast(FSDPModule, self._module).set_requires_all_reduce(last)
        return nullcontext()

    def forward(self, batch: Any, *, filler: bool) -> Loss:
        """Call the module under autocast. Collective."""
        self._pass.filler = filler
        return super().forward(batch, filler=filler)

    def step(self, max_grad_norm: float | None, *, measure_norm: bool) -> Update:
        """Check, clip and apply the gradient, and clear it. Waits for the device. Collective."""
        # -0.0 becomes 0.0: a slot that does not use a parameter contributes 0.0 here, and nothing under ddp.
        torch._foreach_add_(self._gradients(), 0.0)
        return super().step(max_grad_norm, measure_norm=measure_norm)

    def discard(self) -> None:
        """Clear the gradient without applying it."""
        for reduction in self._reductions:
            reduction.discard()
        super().discard()

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        return sums_of_squares(
            self._shapes,
            self._rows,
            [None if parameter.grad is None else local(parameter.grad) for parameter in self._parameters],
        ).to(self.device)
