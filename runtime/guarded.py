"""Convert errors to messages and exit codes, in every Lockstep process."""

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
    """Call the main function of a process and return its exit code, even if the reader of its output has exited."""
    protect_output()
    show_messages()
    raise_open_files_limit()
    try:
        return act()
    except OSError as error:
        readable = open_files_error(error)  # before a run has started
        if readable is None:
            raise
        return print_error(readable)
    except KeyboardInterrupt:  # before a run has installed its signal handlers, or after
        print("lockstep: interrupted", file=sys.stderr)
        return 75
    finally:
        # Python terminates the remaining loader workers, and torch's handler would raise that they were killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        settle_output()


def print_error(error: LockstepError) -> int:
    """Print an error, once if all ranks have it, and return its exit code."""
    rank = environment.rank()
    if isinstance(error, EQUAL_ON_ALL_RANKS) and rank != 0:
        # Rank 0 prints it for all. The launcher terminates all ranks when the first exits, so wait for rank 0 to exit first.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if signal.sigtimedwait({signal.SIGTERM}, 10) is not None:
            return error.exit_code
    # No SIGTERM within the timeout: rank 0 does not have the error, so it is specific to this rank.
    alone = "RANK" in os.environ and (rank != 0 or not isinstance(error, EQUAL_ON_ALL_RANKS))
    print(f"lockstep: {f'rank {rank}: ' if alone else ''}{error}", file=sys.stderr, flush=True)
    return error.exit_code
