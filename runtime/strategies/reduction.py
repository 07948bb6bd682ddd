"""How DistributedDataParallel reduces gradients: as a sum over the ranks, and whether it has finished.

DDP divides by the number of processes before it sums. Multiplying the loss by that number would undo it, but then what is
scaled in half precision would depend on how many processes there are: two processes would overflow where one does not, and a
factor of three would round every gradient. So backward passes know nothing of the number of processes, and nothing is divided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import ConfigurationError, Problem
from runtime.state.module_buffers import overlaps, places_of

_SENT = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
_WITHOUT_GRADIENT = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")


def sum_gradients(wrapped: DistributedDataParallel, *, sent_as: torch.dtype | None = None) -> None:
    """Let DDP sum gradients over the ranks.

    In their own type, DDP divides by one: the divisor is what it takes for uneven inputs (torch 2.11 to 2.13). A communication
    hook that sums would run Python for each bucket, which costs up to a third of a small model's backward pass.

    Args:
        sent_as: half precision in which gradients travel; the sum is rounded to it.
    """
    if sent_as is None:
        divisor: Any = torch.futures.Future()
        divisor.set_result([torch.ones((), dtype=torch.int64)])
        wrapped.reducer._set_forward_pass_work_handle(_create_work_from_future(divisor), False)
        return

    def summed_in_half(state: Any, bucket: Any) -> Any:
        buffer = bucket.buffer()

        def in_full(future: Any) -> torch.Tensor:
            return buffer.copy_(future.value()[0])  # type: ignore[no-any-return]

        return dist.all_reduce(buffer.to(sent_as), async_op=True).get_future().then(in_full)

    summed_in_half.__annotations__.clear()  # DDP wants the classes, not their names
    wrapped.register_comm_hook(None, summed_in_half)


def refuse_hook(hook: str | None, device: torch.device) -> None:
    """Refuse a type that the process group cannot reduce.

    Raises:
        ConfigurationError: naming one that it can.
    """
    if hook == "bf16" and device.type == "cpu":
        what = "gloo cannot reduce bf16; use fp16 or none"
        raise ConfigurationError([Problem("configuration", "strategy.ddp.communication_hook", what)])


def keep_buffers_from_being_sent(module: nn.Module) -> None:
    """Let DDP not send buffers that gloo or a write in place cannot take: by itself it sends rank 0's when it is made.

    They are built alike on every rank.
    """
    module._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        place.name
        for place in places_of(module)
        if (held := place.held) is not None and (overlaps(held) or held.dtype not in _SENT)
    ]


def unreduced(wrapped: DistributedDataParallel, names: Sequence[str]) -> list[str]:
    """Return which parameters kept this rank's gradients from being reduced after a window; none if the reduction is complete.

    Args:
        names: of the trainable parameters, in the module's order.
    """
    try:
        wrapped._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        found = _WITHOUT_GRADIENT.search(str(error))
        return [names[int(number)] for number in found[1].split()] if found else list(names)
    return []


def not_reduced(names: Sequence[str]) -> str:
    """Return the message for a window after which gradients were not reduced, because these parameters got none."""
    return (
        f"{listed(names)} got no gradient in the last forward pass of a step, so the ranks' gradients were not summed, and "
        "nothing was changed. Where that is meant, set strategy.ddp.find_unused_parameters: true; parameters that no step uses "
        "are frozen by model.freeze, or left out of the model"
    )


def refuse_sparse(names: Sequence[str], gradients: Sequence[torch.Tensor | None]) -> None:
    """Refuse gradients that are sparse, which are neither judged, clipped nor reduced here.

    Raises:
        ConfigurationError: naming the parameters.
    """
    sparse = [
        name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.is_sparse
    ]
    if sparse:
        what = f"{listed(sparse)}: the gradient is sparse (an embedding with sparse=True); build it with sparse=False"
        raise ConfigurationError([Problem("configuration", "model", what)])


def listed(names: Sequence[str], *, most: int = 6) -> str:
    """Return the first of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
