"""The network interface that ranks on several machines talk over.

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

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def choose_interface(address: str) -> None:
    """Let gloo use the interface that leads to an address, unless the user has chosen or it is this machine's loopback."""
    if environment.has_chosen_interface():
        return
    name = interface_to(address)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_to(address: str) -> str | None:
    """Return the name of the interface that packets to an address take; None for loopback, or if it cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    if ipaddress.ip_address(own).is_loopback:
        return None
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None
