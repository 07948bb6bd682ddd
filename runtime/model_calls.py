"""What a model or an objective raises when it is called, as one message with the user's own line."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from runtime.config.component import INSTALLED
from runtime.errors import ForwardError, LockstepError

_OURS = str(Path(__file__).parent)
_ZOO = str(Path(__file__).parent / "model_zoo")
_TORCH = str(Path(torch.__file__).parent)
# In an error of torch or the system: another rank was lost, which has a message of its own.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe")
_ALLOCATION_FAILED = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


def explained(error: Exception, module: nn.Module, batch: str) -> ForwardError | None:
    """Return the message for what a forward pass raised, or None where it is no mistake of the user's.

    Args:
        module: what was called; names the part of it that raised.
        batch: what it was called with, as messages describe it.
    """
    if isinstance(error, LockstepError) or is_out_of_memory(error):
        return None
    said = str(error).strip()
    if isinstance(error, RuntimeError | OSError) and any(word in said.lower() for word in _LOST):
        return None
    first = said.split("\n", maxsplit=1)[0]
    return ForwardError(
        f"the forward pass raised {type(error).__name__}: {first}\n  at {_line(error.__traceback__)}"
        f"{_part(error.__traceback__, module)}\n  the batch is {batch}{_cure(first, module)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory has run out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Torch's allocator on a CPU; cuBLAS and cuDNN, whose handles and workspaces are not the allocator's; NCCL.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION_FAILED)


def _line(trace: TracebackType | None) -> str:
    """Return the innermost line that is the user's, else of a library's or our model, else of all."""
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if not frame.filename.startswith((*INSTALLED, _OURS, "<"))]
    library = [
        frame for frame in frames if frame.filename.startswith(_ZOO) or not frame.filename.startswith((_TORCH, _OURS))
    ]
    frame = (own or library or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")


def _part(trace: TracebackType | None, module: nn.Module) -> str:
    """Return which part of the model raised."""
    inner: nn.Module | None = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and trace.tb_frame.f_code.co_name == "forward":
            inner = owner
        trace = trace.tb_next
    name = next((name for name, part in module.named_modules() if part is inner), "") if inner is not None else ""
    if name.partition(".")[0] != "model":
        return ""
    assert inner is not None
    text = type(inner).__name__ if list(inner.children()) else repr(inner)
    return (
        f"\n  in the model's part {name.removeprefix('model.')}: {text}"
        if name != "model"
        else f"\n  in the model: {text}"
    )


def _cure(said: str, module: nn.Module) -> str:
    if "scalar types: Long" in said:
        return "\n  an Embedding takes whole numbers (int64): give it those, or the numbers to a layer such as Linear"
    if "index out of range" in said:
        return "\n  an index in the data is beyond what this part holds (an Embedding: 0 to num_embeddings - 1)"
    if "dtype" in said or "expected scalar type" in said or "expected m1 and m2" in said:
        held = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
        return f"\n  the model's parameters are {', '.join(sorted(held))}: give it inputs of that type"
    if "shape" in said or "size" in said:
        return (
            "\n  let the sizes in model.args fit the data (lockstep show prints a sample's shapes), or change the data"
        )
    if "argument" in said:
        return "\n  say in data.fields.inputs what the model is called with"
    return ""
