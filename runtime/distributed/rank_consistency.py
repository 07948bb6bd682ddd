"""What all ranks must agree on before the first step: configuration, code, versions, data, shapes; and the weights at a save.

A rank that differs (another version on one host, a data set that another rank draws otherwise) would silently train a wrong
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.distributed.collectives import gather_bytes
from runtime.errors import RanksDifferError

_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare(
    facts: Mapping[str, Any], *, if_known: Mapping[str, Any] | None = None, host: str, device: torch.device
) -> None:
    """Compare facts with those of rank 0. Collective: every rank must call this.

    Args:
        facts: name to anything that JSON can hold.
        if_known: the same, compared only where both ranks have it.
        host: of this rank, for the message.

    Raises:
        RanksDifferError: naming the ranks that differ, and in what; on every rank alike.
    """
    own = json.dumps([host, dict(facts), dict(if_known or {})], default=str).encode()
    told = [json.loads(reply) for reply in gather_bytes(own, device)]
    (first_host, first, first_known), others = told[0], told[1:]
    differences = [
        f"rank {rank} (host {its_host}) has {name} {_shown(its.get(name))}, "
        f"rank 0 (host {first_host}) {_shown(there.get(name))}"
        for rank, (its_host, its_facts, its_known) in enumerate(others, start=1)
        for its, there, names in (
            (its_facts, first, {**first, **its_facts}),
            (its_known, first_known, its_known.keys() & first_known.keys()),
        )
        for name in names
        if its.get(name) != there.get(name)
    ]
    if differences:
        raise RanksDifferError("the ranks would not train the same thing: " + "; ".join(differences))


def agreed(
    known: Mapping[str, Mapping[str, str]],
    *,
    may_differ: Collection[str] = (),
    host: str,
    device: torch.device,
    where: Callable[[str, str], str],
) -> dict[str, dict[str, str]]:
    """Return what all ranks know of the data, which is the same for all. Collective: every rank must call this.

    What a rank does not know (it could not read it, say) is left out.

    Args:
        known: digests by part of the data, and by what was looked at.
        may_differ: what is left out where ranks differ in it.
        where: returns a description of a part of the data and of what was looked at.

    Raises:
        RanksDifferError: naming what the ranks have otherwise than rank 0; on every rank alike.
    """
    told = [json.loads(reply) for reply in gather_bytes(json.dumps([host, known]).encode(), device)]
    (first_host, first), others = told[0], told[1:]
    common = {
        part: {
            key: value
            for key, value in of_part.items()
            if all(key in its.get(part, {}) and (key not in may_differ or its[part][key] == value) for _, its in others)
        }
        for part, of_part in first.items()
    }
    differences = [
        f"{where(part, key)} on rank {rank} (host {its_host})"
        for rank, (its_host, its) in enumerate(others, start=1)
        for part, of_part in common.items()
        for key, value in of_part.items()
        if its[part][key] != value
    ]
    if differences:
        raise RanksDifferError(
            f"the ranks have different data: not what rank 0 (host {first_host}) has is {', '.join(differences)}. Hosts list "
            "the files of a folder in different orders (sort what os.listdir, glob or iterdir gives), or one of them "
            "has other files; what is drawn while the data set is built must come from Python's, NumPy's or torch's global "
            "generator, which are seeded alike"
        )
    return common


def shapes(module: nn.Module) -> str:
    """Return a digest of the names, shapes and types of all parameters and buffers, and of the names of extra state."""
    listed = [
        (name, tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else (name, type(value).__name__)
        for name, value in module.state_dict().items()
    ]
    return sha256(repr(listed).encode()).hexdigest()[:12]


def compare_values(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Compare tensors that all ranks hold alike, bit for bit but for their order. Collective: every rank must call this.

    One pass over them, on their device, and one message of 16 bytes each.

    Raises:
        RanksDifferError: naming those that differ; on every rank alike.
    """
    sums = torch.stack([_sum_of_bits(tensor).to(device) for tensor in tensors.values()])
    largest = torch.cat([sums, -sums])  # the largest and, below zero, the smallest are the same where all are
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    most, least = largest.cpu().chunk(2)
    differing = [name for name, differs in zip(tensors, (most != -least).tolist(), strict=True) if differs]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise RanksDifferError(
            f"{', '.join(differing[:4])}{more}: not the same on all ranks, so nothing was saved. Gradients are, so something "
            "else wrote to them: a forward pass that changes weights, or an optimizer whose steps draw from a generator of "
            "their own or ask for their rank. Training with one process is not affected"
        )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return real.view(_OF_SIZE[real.itemsize]).sum(dtype=torch.int64)


def code_digest(folder: Path) -> str:
    """Return a digest of the Python files directly within a folder, the user's own modules."""
    digest = sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
