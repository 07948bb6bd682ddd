"""Several process groups in one life of the processes: each is joined under keys of its own.

Torch's ranks find each other through a store, in which each leaves its address under a name that is the same for every group.
Processes that make a second group (a script that calls ``train`` and then ``evaluate``) would read the addresses of the first
there, and wait for ranks that listen no more until the timeout (torch 2.13): always where a launch agent hosts the store, and
where rank 0 does whenever another rank comes to it before it is closed. So the store is kept, and each group gets a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any
from urllib.parse import parse_qs, urlsplit

from torch.distributed import (  # type: ignore[attr-defined]  # public all the same
    DistError,
    PrefixStore,
    Store,
    TCPStore,
    register_rendezvous_handler,
    rendezvous,
)

from runtime import environment
from runtime.distributed.network_interface import listening_socket

_SCHEME = "lockstep"
_stores: dict[tuple[str, int], tuple[Store, int, int]] = {}  # by address and port: as torch made it, for this rank
_joined: dict[tuple[str, int], int] = {}


@cache
def init_method() -> str:
    """Return what ``init_process_group`` takes as its ``init_method``: ``env://``, once for each group."""
    register_rendezvous_handler(_SCHEME, _meet)  # type: ignore[no-untyped-call]
    return f"{_SCHEME}://"


def groups_joined() -> int:
    """Return how many groups this process has joined through the present store; equal on all ranks."""
    return _joined.get(environment.store_address(), 0)


def _meet(url: str, timeout: timedelta, **more: Any) -> Iterator[tuple[Store, int, int]]:
    """Serve torch as a rendezvous handler: yield the store, the rank and the world size, once."""
    # Accelerate says rank and world size of processes on CPUs.
    told = {key: int(values[0]) for key, values in parse_qs(urlsplit(url).query).items()}
    address = environment.store_address()
    if address not in _stores:
        for kept in (_stores, _joined):
            kept.clear()  # of a launch that is over
        _stores[address] = _hosted(timeout, told) or next(rendezvous("env://", timeout=timeout, **told, **more))
    store, rank, world_size = _stores[address]
    number = _joined[address] = groups_joined() + 1
    yield PrefixStore(f"group-{number}", store), rank, world_size


def _hosted(timeout: timedelta, told: dict[str, int]) -> tuple[Store, int, int] | None:
    """Host the store at this rank's address alone; None where another process does, or torch is to do it."""
    rank, world_size = told.get("rank", environment.rank()), told.get("world_size", environment.world_size())
    if rank != 0 or environment.agent_hosts_store():
        return None
    address, port = environment.store_address()
    try:
        listener = listening_socket(address, port, one_machine=environment.on_one_machine())
    except OSError as error:
        raise DistError(f"rank 0 cannot listen at {address}:{port}: {error.strerror or error}") from error
    if listener is None:
        return None
    store = TCPStore(address, port, world_size, True, timeout, multi_tenant=True, master_listen_fd=listener.detach())
    return store, rank, world_size
