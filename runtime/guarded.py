"""Errors as messages and exit codes: what every process of ours does around its work."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from runtime import environment
from runtime.errors import EQUAL_ON_ALL_RANKS, LockstepError
from runtime.messages import show_messages
from runtime.open_files import open_files_error, raise_open_files_limit
from runtime.output import protect_output, settle_output


def guarded(act: Callable[[], int]) -> int:
    """Call what a process of ours is for; return its exit code, whatever became of those who read what it printed."""
    protect_output()
    show_messages()
    raise_open_files_limit()
    try:
        return act()
    except OSError as error:
        in_words = open_files_error(error)  # before a run has begun
        if in_words is None:
            raise
        return print_error(in_words)
    except KeyboardInterrupt:  # before a run has taken over the signals, or after
        print("lockstep: interrupted", file=sys.stderr)
        return 75
    finally:
        # Python ends the loader's workers that are left, and torch's handler would raise that they were killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        settle_output()


def print_error(error: LockstepError) -> int:
    """Print an error, once for all ranks where all have it; return its exit code."""
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
