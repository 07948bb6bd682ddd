"""From Python to a run: the world checked, signals taken over, processes joined, and all of it undone at the end.

from runtime.session import train
result = train("configs/digits.yaml", "limit.epochs=3")
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import environment
from runtime.config_file import LoadedConfiguration, load
from runtime.errors import EQUAL_ON_ALL_RANKS, LockstepError, PeerError
from runtime.stopping import StopWish

if TYPE_CHECKING:
    from runtime.run import RunResult
    from runtime.watch import Watch

OUTCOME = "outcome.json"


def train(source: Path | str | Mapping[str, Any], *overrides: str) -> RunResult:
    """Train what a YAML file (or a mapping) describes, in this process or as one of several.

    Args:
        source: path of the YAML file, or its content as a mapping.
        overrides: ``key.path=value``.

    Raises:
        LockstepError: whatever is wrong, as one message.
    """
    since = time.monotonic()
    loaded = load(source, overrides)
    requested = environment.requested_world_size(loaded.values.strategy.world_size)
    stop_wish = StopWish(loaded.values.limit.grace_seconds)
    with ExitStack() as stack:
        stop_wish.install()  # before torch is imported, which takes seconds
        stack.callback(stop_wish.uninstall)
        return _train(loaded, requested, stop_wish, stack, since)


def _train(
    loaded: LoadedConfiguration, requested: int, stop_wish: StopWish, stack: ExitStack, since: float
) -> RunResult:
    from runtime.assembly import check_components
    from runtime.determinism import default_determinism, determinism

    check_components(loaded)
    values = loaded.values
    stack.enter_context(determinism(values.determinism or default_determinism(), values.matmul))

    from torch.distributed import DistError

    from runtime.run import Run
    from runtime.strategies.accelerated import AcceleratedStrategy

    stall_seconds = values.limit.stall_seconds
    try:
        strategy = AcceleratedStrategy(
            precision=values.precision,
            options=values.strategy.ddp,
            max_grad_value=values.optimizer.max_grad_value,
            timeout_seconds=stall_seconds,
        )
    except DistError as error:
        address, port = environment.store_address()
        raise PeerError(
            f"the ranks did not come together at {address}:{port} within {stall_seconds:g} s (limit.stall_seconds): {error}"
        ) from error
    stack.callback(strategy.close)
    environment.check_world_size(requested, strategy.world_size)
    stop_wish.on_leave = lambda: _write_outcome(
        loaded, strategy.rank, {"outcome": "stopped", "exit_code": 75, "message": "left without a save"}
    )
    watch = _watch(loaded, rank=strategy.rank, world_size=strategy.world_size)
    run = Run(loaded, strategy, stop_wish, watch.position)
    watch.on_leave = lambda reason: _write_outcome(
        loaded, strategy.rank, {"outcome": "failed", "exit_code": 1, "message": reason}, owned=run.owns_folder
    )
    if values.limit.time is not None:
        stop_wish.limit_time(values.limit.time.seconds, since, run.leaving_seconds)
    watch.start()
    try:
        result = run.train()
    except BaseException as error:
        lost_contact = isinstance(error, RuntimeError) and strategy.world_size > 1 and _lost_contact(error)
        if not isinstance(error, EQUAL_ON_ALL_RANKS):
            watch.report_failure(f"{type(error).__name__}: {error}", lost_contact=lost_contact)
        exit_code = error.exit_code if isinstance(error, LockstepError) else 1
        _write_outcome(loaded, strategy.rank, {"outcome": "failed", "exit_code": exit_code, "message": str(error)})
        if lost_contact:
            raise PeerError("lost contact with another rank, whose own message tells why") from error
        raise
    finally:
        watch.stop()
    exit_code = 0 if result.outcome == "finished" else 75
    _write_outcome(loaded, strategy.rank, {"outcome": result.outcome, "exit_code": exit_code, "step": result.step})
    return result


def _watch(loaded: LoadedConfiguration, *, rank: int, world_size: int) -> Watch:
    """Make the watch over the other ranks, which says what it must know of the launch."""
    from runtime.watch import Watch

    limit = loaded.values.limit
    return Watch(
        rank=rank,
        world_size=world_size if environment.is_watched() else 1,
        host=socket.gethostname(),
        store=environment.store_address(),
        silence_seconds=limit.silence_seconds,
        stall_seconds=limit.stall_seconds,
        prefix=environment.start_token(),
    )


def read_outcome(folder: Path, launch: str) -> dict[str, Any] | None:
    """Return what became of one launch, or None if it left no word."""
    try:
        outcome: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
    except (OSError, ValueError):
        return None
    return outcome if outcome.get("launch") == launch else None


def _write_outcome(
    loaded: LoadedConfiguration, rank: int, outcome: dict[str, Any], *, owned: Callable[[], bool] = lambda: True
) -> None:
    """Leave word for the launcher: exit codes do not survive ``accelerate launch``."""
    if rank != 0 or not loaded.output.is_dir() or not owned():
        return
    from runtime.serialization import replace_file

    with suppress(OSError):  # the disk is full or gone, which the run's own message tells
        replace_file(loaded.output / OUTCOME, json.dumps({**outcome, "launch": environment.launch_token()}))


def _lost_contact(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "connection closed", "connection reset", "nccl", "broken pipe"))
