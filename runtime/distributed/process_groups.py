"""Allow several process groups in one process: each uses its own store prefix.

Torch's ranks find each other through a store, where each writes its address under a key that is the same for every group. A
second group (a script that calls ``train`` and then ``evaluate``) would read the addresses of the first one and wait for
closed sockets until the timeout (torch 2.13): always if a launch agent hosts the store; if rank 0 does, whenever another rank
connects before it is closed. So the store is kept, and each group gets a prefix.
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
_stores: dict[tuple[str, int], tuple[Store, int, int]] = {}  # by address and port: store, rank, world size
_num_joined: dict[tuple[str, int], int] = {}


@cache
def init_method() -> str:
    """Return the ``init_method`` for ``init_process_group``: like ``env://``, but for any number of groups."""
    register_rendezvous_handler(_SCHEME, _handle_rendezvous)  # type: ignore[no-untyped-call]
    return f"{_SCHEME}://"


def groups_joined() -> int:
    """Return how many groups this process has joined through the current store; equal on all ranks."""
    return _num_joined.get(environment.store_address(), 0)


def _handle_rendezvous(url: str, timeout: timedelta, **more: Any) -> Iterator[tuple[Store, int, int]]:
    """Rendezvous handler for torch: yield the store, the rank and the world size, once."""
    # For processes on CPUs, Accelerate passes rank and world size.
    passed = {key: int(values[0]) for key, values in parse_qs(urlsplit(url).query).items()}
    address = environment.store_address()
    if address not in _stores:
        for entries in (_stores, _num_joined):
            entries.clear()  # left from an earlier launch
        _stores[address] = _host_store(timeout, passed) or next(rendezvous("env://", timeout=timeout, **passed, **more))
    store, rank, world_size = _stores[address]
    number = _num_joined[address] = groups_joined() + 1
    yield PrefixStore(f"group-{number}", store), rank, world_size


def _host_store(timeout: timedelta, passed: dict[str, int]) -> tuple[Store, int, int] | None:
    """Host the store, only at this rank's address; return None if another process hosts it, or torch should."""
    rank, world_size = passed.get("rank", environment.rank()), passed.get("world_size", environment.world_size())
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
