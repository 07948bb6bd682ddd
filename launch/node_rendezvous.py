"""The machines of one ``lockstep train --nodes`` meet before any of them starts a process.

``accelerate launch`` on several machines waits minutes for one that does not come, and then ends in a traceback of its own; it
does not notice that a machine was given another number of processes. Here the first machine listens at the address and port
that the processes will meet at, the others say who they are, and all get the same answer: start, or what is wrong, and where.
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
    """Which of several machines this is, and where they meet.

    Args:
        nodes: machines.
        node_rank: this one, counted from 0; the first one is the main host.
        address: name or address of the main host.
        port: on it.
        processes: on each machine.
    """

    nodes: int
    node_rank: int
    address: str
    port: int
    processes: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def meet(place: NodeInfo, *, patience_seconds: float) -> tuple[NodeInfo, str]:
    """Wait for all machines; return a token that all have got, and the place, whose address is one that others can reach.

    Raises:
        RendezvousError: one did not come, or was started differently than the first; on every machine that came.
    """
    until = time.monotonic() + patience_seconds
    if place.node_rank == 0:
        return _receive(place, until, patience_seconds)
    return place, _join(place, until, patience_seconds)


def _receive(place: NodeInfo, until: float, patience_seconds: float) -> tuple[NodeInfo, str]:
    with ExitStack() as stack:
        server = stack.enter_context(_listening(place))
        came: dict[int, tuple[str, socket.socket]] = {}
        connections: list[socket.socket] = []
        try:
            while len(came) < place.nodes - 1:
                server.settimeout(max(0.01, until - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    missing = ", ".join(str(n) for n in range(1, place.nodes) if n not in came)
                    raise RendezvousError(
                        f"of {place.nodes} machines, node rank {missing} did not come to {place} within "
                        f"{patience_seconds:g} s (limit.start_seconds): is `lockstep train` running there, with this "
                        "--main-address and --main-port?"
                    ) from None
                stack.enter_context(connection)
                hello = _heard(connection)
                if hello is not None:
                    connections.append(connection)
                    came[_checked(place, hello, came)] = (str(hello["host"]), connection)
        except RendezvousError as error:
            for connection in connections:
                _say(connection, {"error": str(error)})
            raise
        token = secrets.token_hex(8)
        for connection in connections:
            _say(connection, {"token": token})
        for connection in connections:
            with suppress(OSError):  # they hang up first: the port is free for the processes at once
                connection.recv(1)
        reached = [ipaddress.ip_address(connection.getsockname()[0]) for connection in connections]
        own = next((str(address) for address in reached if address.version == 4 and not address.is_loopback), None)
        return replace(place, address=own or place.address), token


def _checked(place: NodeInfo, hello: dict[str, object], came: dict[int, tuple[str, socket.socket]]) -> int:
    """Return the rank of a machine that has come, or say to it and to all what is wrong with it."""
    host, rank = hello["host"], hello["node_rank"]
    here = asdict(place)
    differing = [f"--{key} {hello.get(key)} there, {here[key]} here" for key in _ALIKE if hello.get(key) != here[key]]
    if differing:
        who = f"host {host} (node rank {rank}) was started otherwise than host {_host()}"
        raise RendezvousError(f"{who}: {'; '.join(differing)}")
    if not isinstance(rank, int) or not 0 < rank < place.nodes:
        raise RendezvousError(f"host {host} says that it is node rank {rank}, of {place.nodes} machines")
    if rank in came:
        raise RendezvousError(f"hosts {came[rank][0]} and {host} both say that they are node rank {rank}")
    return rank


def _join(place: NodeInfo, until: float, patience_seconds: float) -> str:
    why = ""
    while time.monotonic() < until:
        try:
            with socket.create_connection((place.address, place.port), timeout=until - time.monotonic()) as connection:
                hello = {key: value for key, value in asdict(place).items() if key not in ("address", "port")}
                _say(connection, {"hello": _HELLO, "host": _host(), **hello})
                connection.settimeout(until - time.monotonic() + 5)  # the first machine waits for others as well
                answer = _line(connection)
        except (OSError, ValueError) as error:
            why = _why(error)
        else:
            if "token" in answer:
                return str(answer["token"])
            if "error" in answer:
                raise RendezvousError(str(answer["error"]))
            why = "what listens there is not the first machine of this run"
        time.sleep(min(_RETRY_SECONDS, max(0.0, until - time.monotonic())))
    raise RendezvousError(
        f"the main host {place} cannot be reached from host {_host()} ({why}) within {patience_seconds:g} s "
        "(limit.start_seconds): is `lockstep train --node-rank 0` running there, with this --main-port?"
    )


@contextmanager
def _listening(place: NodeInfo) -> Iterator[socket.socket]:
    try:
        found = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RendezvousError(f"the main host {place.address} is unknown here: {_why(error)}") from error
    with socket.socket(found[0], found[1]) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", place.port) if _is_loopback_here_alone(place.address, found[4][0]) else found[4])
            server.listen(place.nodes)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                what = f"{place.address} is not an address of this machine ({_host()}), which is node rank 0: the main host"
                raise RendezvousError(what) from error
            in_use = error.errno == errno.EADDRINUSE
            hint = "; choose another --main-port on all machines" if in_use else ""
            raise RendezvousError(f"{place} cannot be listened at: {_why(error)}{hint}") from error
        yield server


def _is_loopback_here_alone(name: str, address: str | int) -> bool:
    """Tell whether a machine's name means loopback on that machine only, as in Debian's /etc/hosts (``127.0.1.1 NAME``).

    The others know it by another address, which is the one that their connections come to.
    """
    return ipaddress.ip_address(address).is_loopback and name not in ("localhost", address)


def _heard(connection: socket.socket) -> dict[str, object] | None:
    """Return what a machine says of itself; None for whoever else knocks."""
    connection.settimeout(5)
    try:
        said = _line(connection)
    except (OSError, ValueError):
        return None
    if said.get("hello") != _HELLO or "host" not in said or "node_rank" not in said:
        return None
    connection.settimeout(10)
    return said


def _say(connection: socket.socket, message: dict[str, object]) -> None:
    with suppress(OSError):  # gone; whoever it was will be missed
        connection.sendall(json.dumps(message).encode() + b"\n")


def _line(connection: socket.socket) -> dict[str, object]:
    text = b""
    while not text.endswith(b"\n") and len(text) < _LINE_BYTES:
        part = connection.recv(_LINE_BYTES)
        if not part:
            break
        text += part
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError("not what a machine of ours says")
    return said


def _host() -> str:
    return socket.gethostname()


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
