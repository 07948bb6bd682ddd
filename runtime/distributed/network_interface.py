"""The network interface that ranks talk over: loopback on one machine, else the one that leads to the main host.

Torch's store and gloo ask no password of whoever connects. The store listens on every interface unless it is given a socket.
gloo listens at the address that the host's own name resolves to, which on many machines is loopback (``127.0.1.1`` in
/etc/hosts): the others then wait for minutes and see a timeout. The way to the main host is the one that is known to work.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from contextlib import suppress

from runtime import environment

_BACKLOG = 2048  # as torch's own
_ELSEWHERE = "192.0.2.1"  # an address of no machine (RFC 5737), so what leads to it is the default route
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def choose_interface(address: str) -> None:
    """Let gloo use loopback on one machine, else the interface that leads to an address, unless the user has chosen."""
    if environment.has_chosen_interface():
        return
    one_machine = environment.on_one_machine()
    name = _interface_of("127.0.0.1") if one_machine else interface_to(address) or _outward_interface()
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(address: str) -> str | None:
    """Return the name of the interface that packets to an address take; None for loopback, or where there is no way to it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    return None if ipaddress.ip_address(own).is_loopback else _interface_of(own)


def listening_socket(address: str, port: int, *, one_machine: bool) -> socket.socket | None:
    """Return a socket that listens at an address of this machine's alone, for a store; None where torch is to choose.

    Raises:
        OSError: the port is taken, or the address is another machine's.
    """
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = found[0]
    if ipaddress.ip_address(where[0]).is_loopback and not one_machine:
        return None  # 127.0.1.1 in /etc/hosts: the others know this machine by another address
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
    """Return the interface to other machines, for one whose own name means loopback: its only one, else the default route's."""
    outward = [name for name, address in _addresses().items() if not ipaddress.ip_address(address).is_loopback]
    return outward[0] if len(outward) == 1 else interface_to(_ELSEWHERE)


def _interface_of(own: str) -> str | None:
    return next((name for name, address in _addresses().items() if address == own), None)


def _addresses() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one."""
    found = {}
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
