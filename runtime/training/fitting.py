"""Find by trial the largest microbatch that fits on every rank's device; advice for out-of-memory errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from runtime.distributed.collectives import sum_over_ranks
from runtime.errors import OutOfMemoryError
from runtime.model_calls import is_out_of_memory
from runtime.objective import TrainingModule
from runtime.randomness import preserved_random_state
from runtime.state.module_buffers import preserved_buffers
from runtime.strategies import Strategy
from runtime.strategies.placement import to_device

_STATE_COPIES = 2  # Adam's two moments, allocated only at the first update


def out_of_memory(error: BaseException, *, rank: int, where: str, key: str, size: int) -> OutOfMemoryError:
    """Return the error for a rank that ran out of memory.

    Args:
        where: phase and step.
        key: the configuration key for the number of samples in one forward pass.
        size: its current value.
    """
    first_line = str(error).strip().split("\n", maxsplit=1)[0]
    if size == 1:
        advice = (
            "a single sample (or a single batch of a stream that yields batches) does not fit: use a smaller model, a lower "
            "precision, or a larger device"
        )
    elif key == "batch.micro_size":
        advice = (
            f"set {key} to {size // 2} or less (now {size}; the global batch stays the same), or to auto. To resume this run, "
            "K must grow, which resume.allow_changes=[batch.slots] allows: from there on results stay the same only for "
            "models without randomness or batch statistics in the forward pass"
        )
    else:
        advice = f"set {key} to {size // 2} or less (now {size}), which does not change results"
    return OutOfMemoryError(f"rank {rank} ran out of memory in {where} ({first_line}); {advice}")


def fitting_micro_size(
    module: TrainingModule, batch_of: Callable[[int], Any], *, largest: int, strategy: Strategy
) -> int:
    """Return the largest of ``largest``, its half, its quarter, … samples with which all ranks can run forward and backward.

    Memory for the optimizer's state is reserved. The first samples of the data are used, so leave some headroom if samples
    differ in size. Gradients, random state and buffers are left unchanged. Collective: every rank must call this.

    Raises:
        OutOfMemoryError: not even one sample fits.
    """
    candidate = largest
    while True:
        error = _tried(module, batch_of(candidate), strategy)
        failed = sum_over_ranks(torch.tensor(float(error is not None), dtype=torch.float64), strategy.device)
        if not failed:
            return candidate
        if candidate == 1:
            raise OutOfMemoryError(
                f"batch.micro_size: not even one sample fits into the memory of {int(failed)} of {strategy.world_size} ranks: "
                "use a smaller model, lower precision, or larger devices"
            )
        candidate = -(-candidate // 2)


def _tried(module: TrainingModule, batch: Any, strategy: Strategy) -> BaseException | None:
    was_training = module.training
    module.train()
    try:
        with preserved_random_state(strategy.device), preserved_buffers(module):
            # Held during the passes: the optimizer's state will need the same memory in addition.
            state = [torch.empty_like(p) for p in module.parameters() if p.requires_grad for _ in range(_STATE_COPIES)]
            with strategy.autocast():
                loss = module(to_device(batch, strategy.device)).sum.sum()  # an objective may have several sums
            loss.backward()
            del state, loss
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)  # the traceback's frames hold tensors
    finally:
        for parameter in module.parameters():
            parameter.grad = None
        module.train(was_training)
        if strategy.device.type == "cuda":
            torch.cuda.empty_cache()
    return None
