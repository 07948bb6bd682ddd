"""BatchNorm statistics of given weights: the mean over the slots of one pass over the training data.

The result of torch.optim.swa_utils.update_bn depends on how the data is batched. This is its result on one process over the
epoch's slots in order (momentum None: a cumulative mean), on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.data.batches import Cursor, SlotAssignment, Windows
from runtime.data.loading import MakeLoader
from runtime.data.order import Order
from runtime.data.samples import Samples
from runtime.distributed.collectives import StopConsensus
from runtime.distributed.slot_tree import Node, RunningSum
from runtime.optimization.averaging import batch_norms
from runtime.randomness import Purpose, derive, preserved_random_state, seed_everything
from runtime.state.module_buffers import preserved_buffers
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device


class BatchStatistics:
    """Computes statistics over the training data, in training mode as torch does: dropout is on, with the slot's seed.

    Args:
        samples: the training data.
        order: its global batches.
        assignment: how each is cut into slots, and which of them this rank runs.
        seed: of the run.
        enter: called for each global batch, so that the watchdog does not take a long pass for a hang.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order,
        *,
        assignment: SlotAssignment,
        strategy: Strategy,
        make_loader: MakeLoader,
        seed: int,
        enter: Callable[[], None],
    ) -> None:
        self._samples = samples
        self._order = order
        self._assignment = assignment
        self._strategy = strategy
        self._make_loader = make_loader
        self._seed = seed
        self._enter = enter

    @torch.no_grad()
    def compute(
        self, epoch: int, *, skipped: Collection[Cursor], stop_requested: Callable[[], bool]
    ) -> dict[str, Tensor] | None:
        """Return each BatchNorm's buffers by name, computed with the module's current weights; leave the module unchanged.

        None if a rank requested a stop, after the same global batch on every rank.
        Collective: every rank must call this.

        Args:
            epoch: whose order and transforms to use, from 0.
            skipped: global batches to leave out.
        """
        module, device = self._strategy.unwrapped, self._strategy.device
        norms = list(batch_norms(module).items())
        sizes = [2 * norm.num_features + 1 for _, norm in norms]
        by_slot: dict[int, Tensor] = {}
        stop_consensus = StopConsensus(world_size=self._assignment.world_size, device=device)
        windows = Windows(
            self._samples,
            self._order,
            start=Cursor(epoch, 0),
            stop=lambda cursor, steps: cursor.epoch > epoch,
            skipped=skipped,
            assignment=self._assignment,
            make_loader=self._make_loader,
        )
        with preserved_random_state(device), _cumulative(module, [norm for _, norm in norms]):
            for window in windows:
                self._enter()
                stop_consensus.begin(stop_requested())
                if stop_consensus.end():
                    return None
                for microbatch in window.microbatches:
                    if microbatch.filler and not self._strategy.collective_forward:
                        continue
                    for _, norm in norms:
                        norm.reset_running_stats()
                    seed_everything(
                        derive(self._seed, Purpose.STATISTICS, window.cursor.batch, microbatch.slot), device
                    )
                    with self._strategy.autocast():
                        module(to_device(microbatch.batch, device))
                    if not microbatch.filler:
                        weighted = torch.cat([_weighted(norm) for _, norm in norms])
                        before = by_slot.get(microbatch.slot)
                        by_slot[microbatch.slot] = weighted if before is None else before.add_(weighted)
        parts = torch.split(self._summed(by_slot, sum(sizes)).cpu(), sizes)
        return {
            f"{name}.{key}": value.to(device)
            for (name, norm), part in zip(norms, parts, strict=True)
            for key, value in _mean(norm, part).items()
        }

    def _summed(self, by_slot: dict[int, Tensor], size: int) -> Tensor:
        """Sum tensors (size,) over the slots of all ranks. Collective."""
        reduction = self._strategy.slot_reduction
        sums = RunningSum[Tensor](reduction.own_slots, Tensor.add_)
        for slot, value in sorted(by_slot.items()):
            sums.put(Node(0, slot), value)
        return reduction.sum(sums.take(), torch.empty(size, dtype=torch.float64, device=self._strategy.device))


@contextmanager
def _cumulative(module: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Put the module in training mode with cumulative BatchNorm means; restore modes, momenta and all buffers on exit."""
    momenta = [norm.momentum for norm in norms]
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        with preserved_buffers(module):
            for norm in norms:
                norm.momentum = None
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for part, training in modes:
            part.training = training


def _weighted(norm: _BatchNorm) -> Tensor:
    """Return a slot's mean and variance, each times the module's number of calls in it, and that number."""
    calls = cast(Tensor, norm.num_batches_tracked).double()
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return torch.cat([mean.double() * calls, variance.double() * calls, calls.reshape(1)])


def _mean(norm: _BatchNorm, total: Tensor) -> dict[str, Tensor]:
    calls = total[-1]
    mean, variance = torch.split(total[:-1] / calls, norm.num_features)
    if calls == 0:  # a module that is never called stays as torch resets it
        mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
    dtype = cast(Tensor, norm.running_mean).dtype
    return {"running_mean": mean.to(dtype), "running_var": variance.to(dtype), "num_batches_tracked": calls.long()}
