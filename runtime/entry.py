"""What the entry points share: arguments in, one message and an exit code out, never a traceback for a user's mistake."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from runtime import environment
from runtime.errors import EQUAL_ON_ALL_RANKS, LockstepError


def main(arguments: Sequence[str]) -> int:
    """Train as one of the launched processes; return the exit code: 0 finished or stopped, 2 configuration, 1 failure."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: accelerate launch runtime/train.py CONFIG [key.path=value …]", file=sys.stderr)
        return 0 if arguments else 2
    from runtime.session import train

    try:
        train(arguments[0], *arguments[1:])
    except LockstepError as error:
        return _tell(error)
    return 0


def _tell(error: LockstepError) -> int:
    rank = environment.rank()
    if isinstance(error, EQUAL_ON_ALL_RANKS) and rank != 0:
        # Rank 0 tells it for all. The launcher ends everyone once the first rank has left, so let rank 0 be that one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if signal.sigtimedwait({signal.SIGTERM}, 10) is not None:
            return error.exit_code
    # After all that time rank 0 knows of nothing: then it was this rank's error alone.
    alone = "RANK" in os.environ and (rank != 0 or not isinstance(error, EQUAL_ON_ALL_RANKS))
    print(f"lockstep: {f'rank {rank}: ' if alone else ''}{error}", file=sys.stderr, flush=True)
    return error.exit_code
