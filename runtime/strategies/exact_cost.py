"""What ``determinism: exact`` costs in memory and on the wire, computed before anything is allocated."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from runtime.config.strategy import StrategySection
from runtime.data.batches import slots_of_ranks
from runtime.distributed.slot_tree import cover, most_held


class ExactCost(NamedTuple):
    """Bytes for summing gradients, on the process that needs most.

    Args:
        held: beside the gradient that the strategy holds anyway.
        sent: in each step.
    """

    held: int
    sent: int


def exact_cost(section: StrategySection, module: nn.Module, *, slots: int, processes: int) -> ExactCost:
    """Return the cost for a module that was not prepared."""
    whole = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    ranks = slots_of_ranks(slots, processes)
    # To the owners of the gradient's parts; then, without shards, the parts to all.
    parts_sent = max(len(cover(rank)) for rank in ranks) + (section.kind == "ddp")
    sent = parts_sent * whole * (processes - 1) // processes
    if (
        section.kind == "ddp"
    ):  # autograd adds the second of each pair of slots to the first; the last sum is the gradient
        return ExactCost((max(most_held(range(-(-len(rank) // 2))) for rank in ranks) - 1) * whole, sent)
    return ExactCost((max(map(most_held, ranks)) - 1) * whole, sent)  # the last slot's is in FSDP2's buffers
