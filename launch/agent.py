"""Run a launcher, such as ``accelerate launch``, with a store that does not listen on every interface.

    python launch/agent.py -m accelerate.commands.launch OPTIONS SCRIPT ARGUMENTS

Torch's launch agent hosts a store on every interface of the machine, which anyone can write to. Here it listens on loopback
if all processes are on one machine, else at the address of the main host.
"""

from __future__ import annotations

import runpy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE]  # see train.py


def main() -> None:
    """Run the module named on the command line with the arguments that follow it."""
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

    static_tcp_rendezvous.TCPStore = _store  # type: ignore[assignment,attr-defined]  # torch 2.13 has no option
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _store(address: str, port: int, world_size: int, is_master: bool, timeout: timedelta, **more: Any) -> Any:
    """Create the agent's store as torch's static rendezvous does, on our own socket; ``world_size`` counts machines."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public all the same

    from runtime.distributed.network_interface import listening_socket

    listener = listening_socket(address, port, one_machine=world_size == 1) if is_master else None
    if listener is not None:
        more["master_listen_fd"] = listener.detach()
    return TCPStore(address, port, world_size, is_master, timeout, **more)


if __name__ == "__main__":
    main()
