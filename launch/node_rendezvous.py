"""Rendezvous of the machines of one ``lockstep train --nodes``, before any of them starts a process.

``accelerate launch`` on several machines waits minutes for one that does not come, and then ends in its own traceback; it does
not notice that a machine was given another number of processes. Here the first machine listens at the address and port that
the processes will use, the others register, and every machine gets the same answer: start, or the error and the node it is on.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from runtime.errors import RendezvousError

_RETRY_SECONDS = 0.5
_LINE_BYTES = 4096
_HELLO = "lockstep"
_ALIKE = ("nodes", "processes")


@dataclass(frozen=True)
class NodeInfo:
    """Place of this machine among several, and the address of the main host.

    Args:
        nodes: machines.
        node_rank: rank of this machine, counted from 0; 0 is the main host.
        address: name or address of the main host.
        port: port on the main host.
        processes: processes on each machine.
    """

    nodes: int
    node_rank: int
    address: str
    port: int
    processes: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def rendezvous(place: NodeInfo, *, timeout_seconds: float) -> tuple[NodeInfo, str]:
    """Wait for all machines; return the place, with an address that the others can reach, and a token that all share.

    Raises:
        RendezvousError: a machine did not come, or its options differ from the first one's; raised on every machine that came.
    """
    until = time.monotonic() + timeout_seconds
    if place.node_rank == 0:
        return _receive(place, until, timeout_seconds)
    return place, _join(place, until, timeout_seconds)


def _receive(place: NodeInfo, until: float, timeout_seconds: float) -> tuple[NodeInfo, str]:
    with ExitStack() as stack:
        server = stack.enter_context(_listening(place))
        registered: dict[int, tuple[str, socket.socket]] = {}
        connections: list[socket.socket] = []
        try:
            while len(registered) < place.nodes - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = ", ".join(str(n) for n in range(1, place.nodes) if n not in registered)
                    raise RendezvousError(
                        f"node rank {missing} of {place.nodes} machines did not connect to {place} within "
                        f"{timeout_seconds:g} s (limit.start_seconds): is `lockstep train` running there, with this "
                        "--main-address and --main-port?"
                    ) from None
                stack.enter_context(connection)
                hello = _registration(connection)
                if hello is not None:
                    connections.append(connection)
                    registered[_check(place, hello, registered)] = (str(hello["host"]), connection)
        except RendezvousError as error:
            for connection in connections:
                _send(connection, {"error": str(error)})
            raise
        token = secrets.token_hex(8)
        for connection in connections:
            _send(connection, {"token": token})
        for connection in connections:
            with suppress(OSError):  # the others close first, so that the port is free for the processes at once
                connection.recv(1)
        reached = [ipaddress.ip_address(connection.getsockname()[0]) for connection in connections]
        own = next((str(address) for address in reached if address.version == 4 and not address.is_loopback), None)
        return replace(place, address=own or place.address), token


def _check(place: NodeInfo, hello: dict[str, object], registered: dict[int, tuple[str, socket.socket]]) -> int:
    """Return the rank of a machine that has registered; raise RendezvousError if its options are wrong."""
    host, rank = hello["host"], hello["node_rank"]
    here = asdict(place)
    differing = [f"--{key} {hello.get(key)} there, {here[key]} here" for key in _ALIKE if hello.get(key) != here[key]]
    if differing:
        who = f"host {host} (node rank {rank}) was started with other options than host {_host()}"
        raise RendezvousError(f"{who}: {'; '.join(differing)}")
    if not isinstance(rank, int) or not 0 < rank < place.nodes:
        raise RendezvousError(f"host {host} was started as node rank {rank}, but there are {place.nodes} machines")
    if rank in registered:
        raise RendezvousError(f"hosts {registered[rank][0]} and {host} were both started as node rank {rank}")
    return rank


def _join(place: NodeInfo, until: float, timeout_seconds: float) -> str:
    why = ""
    while time.monotonic() < until:
        try:
            with socket.create_connection((place.address, place.port), timeout=until - time.monotonic()) as connection:
                hello = {key: value for key, value in asdict(place).items() if key not in ("address", "port")}
                _send(connection, {"hello": _HELLO, "host": _host(), **hello})
                connection.settimeout(until - time.monotonic() + 5)  # the first machine may still be waiting for others
                answer = _receive_line(connection)
        except (OSError, ValueError) as error:
            why = _why(error)
        else:
            if "token" in answer:
                return str(answer["token"])
            if "error" in answer:
                raise RendezvousError(str(answer["error"]))
            why = "another program listens there"
        time.sleep(min(_RETRY_SECONDS, max(0.0, until - time.monotonic())))
    raise RendezvousError(
        f"the main host {place} cannot be reached from host {_host()} ({why}) within {timeout_seconds:g} s "
        "(limit.start_seconds): is `lockstep train --node-rank 0` running there, with this --main-port?"
    )


@contextmanager
def _listening(place: NodeInfo) -> Iterator[socket.socket]:
    try:
        found = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RendezvousError(f"the main host {place.address} cannot be resolved here: {_why(error)}") from error
    with socket.socket(found[0], found[1]) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", place.port) if _is_loopback_here_alone(place.address, found[4][0]) else found[4])
            server.listen(place.nodes)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                what = f"{place.address} is not an address of this machine ({_host()}), which is node rank 0, the main host"
                raise RendezvousError(what) from error
            in_use = error.errno == errno.EADDRINUSE
            hint = "; choose another --main-port on all machines" if in_use else ""
            raise RendezvousError(f"cannot listen at {place}: {_why(error)}{hint}") from error
        yield server


def _is_loopback_here_alone(name: str, address: str | int) -> bool:
    """Return whether a name resolves to loopback only on the machine itself, as in Debian's /etc/hosts (``127.0.1.1 NAME``).

    The other machines resolve it to another address, and connect to that.
    """
    return ipaddress.ip_address(address).is_loopback and name not in ("localhost", address)


def _registration(connection: socket.socket) -> dict[str, object] | None:
    """Parse a machine's registration; return None for any other connection."""
    connection.settimeout(5)
    try:
        message = _receive_line(connection)
    except (OSError, ValueError):
        return None
    if message.get("hello") != _HELLO or "host" not in message or "node_rank" not in message:
        return None
    connection.settimeout(10)
    return message


def _send(connection: socket.socket, message: dict[str, object]) -> None:
    with suppress(OSError):  # disconnected: reported as missing later
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive_line(connection: socket.socket) -> dict[str, object]:
    text = b""
    while not text.endswith(b"\n") and len(text) < _LINE_BYTES:
        part = connection.recv(_LINE_BYTES)
        if not part:
            break
        text += part
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("not a message of lockstep train")
    return message


def _host() -> str:
    return socket.gethostname()


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
