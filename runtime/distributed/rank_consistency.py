"""Consistency checks between ranks: configuration, code, versions, data and shapes before the first step; weights at a save.

A rank that differs (another version on one host, a data set in another order) would silently train a wrong model.
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

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare(
    facts: Mapping[str, Any], *, if_known: Mapping[str, Any] | None = None, host: str, device: torch.device
) -> None:
    """Compare facts with those of rank 0. Collective: every rank must call this.

    Args:
        facts: JSON-serializable values by name.
        if_known: further facts, compared only if both ranks have them.
        host: host of this rank, for the message.

    Raises:
        RanksDifferError: names the ranks and the facts that differ; raised on every rank.
    """
    own = json.dumps([host, dict(facts), dict(if_known or {})], default=str).encode()
    gathered = [json.loads(payload) for payload in gather_bytes(own, device)]
    (first_host, first, first_known), others = gathered[0], gathered[1:]
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
        raise RanksDifferError("the ranks differ: " + "; ".join(differences))


def common_digests(
    digests: Mapping[str, Mapping[str, str]],
    *,
    may_differ: Collection[str] = (),
    host: str,
    device: torch.device,
    where: Callable[[str, str], str],
) -> dict[str, dict[str, str]]:
    """Return the digests of the data that all ranks have, which must be equal. Collective: every rank must call this.

    Digests that a rank lacks (it could not read the data, for example) are left out.

    Args:
        digests: digests by part of the data and by property.
        may_differ: properties that are left out if ranks differ in them.
        host: host of this rank, for the message.
        where: returns a description of a part of the data and a property.

    Raises:
        RanksDifferError: names what differs from rank 0; raised on every rank.
    """
    gathered = [json.loads(payload) for payload in gather_bytes(json.dumps([host, digests]).encode(), device)]
    (first_host, first), others = gathered[0], gathered[1:]
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
            f"the ranks have other data than rank 0 (host {first_host}): {', '.join(differences)}. Hosts list the "
            "files of a folder in different orders (sort the result of os.listdir, glob or iterdir), or one of them has "
            "other files; random choices while the data set is built must use the global generators of Python, NumPy or "
            "torch, which are seeded equally on all ranks"
        )
    return common


def shapes(module: nn.Module) -> str:
    """Return a digest of the names, shapes and dtypes of all parameters and buffers, and of the names of extra state."""
    entries = [
        (name, tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else (name, type(value).__name__)
        for name, value in module.state_dict().items()
    ]
    return sha256(repr(entries).encode()).hexdigest()[:12]


def compare_values(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Compare replicated tensors by sums of their bits, which ignore the order. Collective: every rank must call this.

    One pass over the tensors, on their device, and one message of 16 bytes per tensor.

    Raises:
        RanksDifferError: names the tensors that differ; raised on every rank.
    """
    sums = torch.stack([_sum_of_bits(tensor).to(device) for tensor in tensors.values()])
    largest = torch.cat([sums, -sums])  # max(x) == -max(-x) only if all are equal
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    most, least = largest.cpu().chunk(2)
    differing = [name for name, differs in zip(tensors, (most != -least).tolist(), strict=True) if differs]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise RanksDifferError(
            f"{', '.join(differing[:4])}{more}: not the same on all ranks, so nothing was saved. Gradients are equal, so "
            "something else changed them: a forward pass that writes to weights, or an optimizer that uses its own random "
            "generator or the rank. Training with one process is not affected"
        )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return real.view(_INTEGERS[real.itemsize]).sum(dtype=torch.int64)


def code_digest(folder: Path) -> str:
    """Return a digest of the Python files directly within a folder: the user's modules."""
    digest = sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
