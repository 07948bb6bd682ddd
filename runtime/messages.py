"""User-facing messages: the logger ``lockstep`` and the handler that prints it.

The command line and the processes that it launches always print messages. So does a program that calls ``lockstep.train``,
unless it has configured logging: if the logger ``lockstep`` or one above it has a handler, messages go to that and are not
printed. Levels are INFO and WARNING. Imports only the standard library.

    lockstep.run       messages of a run while it trains: printed to standard output
    lockstep.*         everything else: printed to standard error, prefixed with ``lockstep:``

Not sent through logging: training figures, progress bars, tables and other results of a command; errors, which are raised; and
the last message of a process that must exit at once, since a hanging thread may hold a lock of logging's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOGGER = logging.getLogger("lockstep")
_RUN = "lockstep.run"
_WARNING_PREFIXES = {_RUN: "warning: ", "lockstep.export": "warning: "}
_PREFIXES = {_RUN: ""}


class MessageHandler(logging.Handler):
    """Prints messages of a run to standard output, others to standard error.

    Attributes:
        print_run_message: prints a run's message while a progress bar is shown. Default: to ``sys.stdout``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.print_run_message: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        try:
            prefixes = _WARNING_PREFIXES if record.levelno >= logging.WARNING else _PREFIXES
            text = f"{prefixes.get(record.name, 'lockstep: ')}{self.format(record)}"
            if record.name != _RUN:
                print(text, file=sys.stderr, flush=True)
            elif self.print_run_message is not None:
                self.print_run_message(text)
            else:
                print(text, flush=True)
        except Exception:
            self.handleError(record)


def show_messages() -> None:
    """Print messages from now on; for processes that Lockstep starts."""
    if not any(isinstance(handler, MessageHandler) for handler in _LOGGER.handlers):
        _install(MessageHandler())


@contextmanager
def shown_messages(*, always: bool = False) -> Iterator[None]:
    """Print messages within this context.

    Args:
        always: even if the caller has configured logging, as for a command.
    """
    present = any(isinstance(handler, MessageHandler) for handler in _LOGGER.handlers)
    if present or (_LOGGER.hasHandlers() and not always):
        yield
        return
    handler, level, propagate = MessageHandler(), _LOGGER.level, _LOGGER.propagate
    _install(handler)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagate


def print_run_messages_by(print_line: Callable[[str], None] | None) -> None:
    """Print a run's messages, if they are printed at all, through a function that redraws the progress bar below them."""
    for handler in _LOGGER.handlers:
        if isinstance(handler, MessageHandler):
            handler.print_run_message = print_line


def _install(handler: MessageHandler) -> None:
    _LOGGER.addHandler(handler)
    _LOGGER.propagate = False  # a user's module may add handlers to the root logger; they must not print again
    if _LOGGER.level == logging.NOTSET:
        _LOGGER.setLevel(logging.INFO)
