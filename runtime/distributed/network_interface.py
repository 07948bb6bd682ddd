"""The network interface for communication between ranks: loopback on one machine, else the one to the main host.

Torch's store and gloo accept any connection, without authentication. The store listens on every interface unless it is given a
socket. gloo listens at the address that the host name resolves to, which on many machines is loopback (``127.0.1.1`` in
/etc/hosts): the other ranks then time out after minutes. The interface to the main host is the one known to work.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from contextlib import suppress

from runtime import environment

_BACKLOG = 2048  # as in torch
_UNUSED_ADDRESS = "192.0.2.1"  # reserved for documentation (RFC 5737): reached by the default route
_SIOCGIFADDR = 0x8915  # Linux: get the address of an interface


def choose_interface(address: str) -> None:
    """Set gloo's interface, unless the user has: loopback on one machine, else the interface that leads to ``address``."""
    if environment.has_chosen_interface():
        return
    one_machine = environment.on_one_machine()
    name = _interface_of("127.0.0.1") if one_machine else interface_to(address) or _outward_interface()
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(address: str) -> str | None:
    """Return the name of the interface that routes to an address; None for loopback, or if there is no route."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    return None if ipaddress.ip_address(own).is_loopback else _interface_of(own)


def listening_socket(address: str, port: int, *, one_machine: bool) -> socket.socket | None:
    """Return a socket for a store that listens only at an address of this machine; None if torch should choose.

    Raises:
        OSError: the port is in use, or the address is not this machine's.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if ipaddress.ip_address(where[0]).is_loopback and not one_machine:
        return None  # 127.0.1.1 in /etc/hosts: other machines use another address
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _outward_interface() -> str | None:
    """Return the interface to other machines if the host name means loopback: the only one, else the default route's."""
    outward = [name for name, address in _addresses().items() if not ipaddress.ip_address(address).is_loopback]
    return outward[0] if len(outward) == 1 else interface_to(_UNUSED_ADDRESS)


def _interface_of(own: str) -> str | None:
    return next((name for name, address in _addresses().items() if address == own), None)


def _addresses() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one."""
    addresses = {}
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses
