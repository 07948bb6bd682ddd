"""Making DistributedDataParallel sum gradients over the ranks, and checking that its reduction has finished.

DDP divides by the world size before it sums. Multiplying the loss by the world size would undo it, but half-precision values
would then depend on the world size: two processes would overflow where one does not, and a factor of three would round every
gradient. So backward passes are independent of the world size, and nothing is divided.
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

# Dtypes that gloo can send.
_GLOO = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
_WITHOUT_GRADIENT = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")


def sum_gradients(wrapped: DistributedDataParallel, *, sent_as: torch.dtype | None = None) -> None:
    """Make DDP sum gradients over the ranks instead of averaging.

    Sets DDP's divisor for uneven inputs to one (torch 2.11 to 2.13). A communication hook that sums would run Python for each
    bucket, which costs up to a third of a small model's backward pass; one is used only with ``sent_as``.

    Args:
        sent_as: half-precision dtype in which gradients are sent and summed; None keeps their dtype.
    """
    if sent_as is None:
        divisor: Any = torch.futures.Future()
        divisor.set_result([torch.ones((), dtype=torch.int64)])
        wrapped.reducer._set_forward_pass_work_handle(_create_work_from_future(divisor), False)
        return

    def summed_in_half(state: Any, bucket: Any) -> Any:
        buffer = bucket.buffer()

        def copied_back(future: Any) -> torch.Tensor:
            return buffer.copy_(future.value()[0])  # type: ignore[no-any-return]

        return dist.all_reduce(buffer.to(sent_as), async_op=True).get_future().then(copied_back)

    summed_in_half.__annotations__.clear()  # DDP checks annotations, and rejects these strings
    wrapped.register_comm_hook(None, summed_in_half)


def refuse_hook(hook: str | None, device: torch.device) -> None:
    """Refuse a communication hook whose dtype the process group cannot reduce.

    Raises:
        ConfigurationError: naming a supported one.
    """
    if hook == "bf16" and device.type == "cpu":
        what = "gloo cannot reduce bf16; use fp16 or none"
        raise ConfigurationError([Problem("configuration", "strategy.ddp.communication_hook", what)])


def keep_buffers_from_being_sent(module: nn.Module) -> None:
    """Exclude buffers from DDP's initial broadcast of rank 0's that gloo cannot send, or that cannot be written in place.

    They are built equal on every rank.
    """
    module._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        place.name
        for place in places_of(module)
        if (held := place.held) is not None and (overlaps(held) or held.dtype not in _GLOO)
    ]


def unreduced(wrapped: DistributedDataParallel, names: Sequence[str]) -> list[str]:
    """Return the parameters whose missing gradients kept this rank's reduction from finishing; empty if it is complete.

    Args:
        names: of the trainable parameters, in the module's order; all are returned if DDP does not name the missing ones.
    """
    try:
        wrapped._check_reducer_finalized()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        match = _WITHOUT_GRADIENT.search(str(error))
        return [names[int(number)] for number in match[1].split()] if match else list(names)
    return []


def not_reduced(names: Sequence[str]) -> str:
    """Return the error message for gradients that were not reduced because these parameters got none."""
    return (
        f"{listed(names)} got no gradient in the last forward pass of a step, so the ranks' gradients were not summed; "
        "no parameter was changed. If this is intended, set strategy.ddp.find_unused_parameters: true. Freeze parameters that "
        "no step uses (model.freeze), or remove them from the model"
    )


def refuse_sparse(names: Sequence[str], gradients: Sequence[torch.Tensor | None]) -> None:
    """Refuse sparse gradients, which this package cannot check, clip or reduce.

    Raises:
        ConfigurationError: naming the parameters.
    """
    sparse = [
        name for name, gradient in zip(names, gradients, strict=True) if gradient is not None and gradient.is_sparse
    ]
    if sparse:
        what = f"{listed(sparse)}: sparse gradients (embeddings with sparse=True) are not supported; use sparse=False"
        raise ConfigurationError([Problem("configuration", "model", what)])


def listed(names: Sequence[str], *, most: int = 6) -> str:
    """Join up to ``most`` names, followed by the number of omitted ones."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
