"""Torch's determinism and matmul precision settings for a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def determinism(
    mode: Literal["exact", "strict", "fast"], matmul: Literal["highest", "high", "medium"]
) -> Iterator[None]:
    """Set torch's determinism settings for the duration of a run and restore them afterwards.

    ``exact`` and ``strict``: deterministic algorithms or an error naming the operation, no cuDNN benchmarking, a fixed cuBLAS
    workspace, one NCCL algorithm, and eager's random numbers in compiled code. Enter before the first use of a GPU.
    ``exact`` also runs CPU operations on one thread: convolutions, LayerNorm, BatchNorm and sums use another order on several
    (torch 2.13), and a process has fewer threads the more there are on its host.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    )
    if mode == "exact" and not torch.cuda.is_available():
        torch.set_num_threads(1)
    torch.set_float32_matmul_precision(matmul)
    if mode != "fast":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
        # Filling costs a pass over every new tensor; nothing here reads uninitialized memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = before[2]
        torch.set_float32_matmul_precision(before[3])
        if torch.get_num_threads() != before[4]:
            torch.set_num_threads(before[4])


def default_determinism() -> Literal["strict", "fast"]:
    """Return the default mode: strict is nearly free on a CPU, and slow on a GPU."""
    return "fast" if torch.cuda.is_available() else "strict"
