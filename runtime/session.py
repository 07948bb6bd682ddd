"""Python API for runs: check the launch, install signal handlers, join the process group; undo all of it at the end.

from runtime.session import evaluate, predict, train
result = train("configs/digits.yaml", "limit.epochs=3")
evaluate("runs/digits", checkpoint="best:accuracy").results
predict("runs/digits", split="validation", output="digits.csv")
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from runtime import environment
from runtime.config.file import LoadedConfiguration, load, load_run
from runtime.config.launcher import hidden, load_with_settings
from runtime.config.sections import LimitSection
from runtime.distributed.launcher_watch import launcher_ended
from runtime.distributed.network_interface import choose_interface
from runtime.distributed.stopping import StopRequest
from runtime.errors import EQUAL_ON_ALL_RANKS, LockstepError, PeerError
from runtime.messages import shown_messages
from runtime.open_files import open_files_error
from runtime.outcome import write_launch_outcome, write_outcome
from runtime.output import protected_output
from runtime.run_files import RunFiles

if TYPE_CHECKING:
    from runtime.distributed.watchdog import Watchdog
    from runtime.inference.checkpoint_inference import InferenceResult
    from runtime.run.diagnosis import Diagnosis
    from runtime.run.result import RunResult
    from runtime.strategies import Strategy
    from runtime.training.observers import Observer


class CommandResult(Protocol):
    """Result of a multi-process command."""

    @property
    def outcome(self) -> Literal["finished", "stopped"]:
        """``finished``, or ``stopped`` if it can be resumed."""
        ...

    @property
    def step(self) -> int:
        """Global batches consumed by the model."""
        ...

    @property
    def message(self) -> str:
        """Why it ended early, else empty."""
        ...


_R = TypeVar("_R", bound=CommandResult)
_LOGGER = logging.getLogger("lockstep.session")


@dataclass
class ProcessContext:
    """This process after joining the process group.

    Attributes:
        may_write_outcome: whether rank 0 may record another rank's failure in outcome.json; False once another job owns the
            run folder.
    """

    strategy: Strategy
    stop_request: StopRequest
    watchdog: Watchdog
    may_write_outcome: Callable[[], bool] = lambda: True


def train(source: Path | str | Mapping[str, Any], *overrides: str, observers: Sequence[Observer] = ()) -> RunResult:
    """Train the run that a YAML file (or a mapping) describes, in this process or as one of several.

    Messages are printed, unless the caller has configured logging for the logger ``lockstep``: see :mod:`runtime.messages`.

    Args:
        source: path of the YAML file, or its content as a mapping.
        overrides: ``key.path=value``.
        observers: called in order with a :class:`lockstep.StepReport` after each step of this process, after those of
            ``reporting.observers``. They cannot change the run; an exception in one ends it.

    Raises:
        LockstepError: any error, as one message.
    """
    since = time.monotonic()
    loaded, notes = _with_settings(load, source, overrides, trains=True)

    def act(processes: ProcessContext) -> RunResult:
        from runtime.run.run import Run

        run = Run(
            loaded,
            processes.strategy,
            processes.stop_request,
            processes.watchdog.position,
            notes=notes,
            observers=observers,
        )
        processes.may_write_outcome = run.owns_folder
        if loaded.values.limit.time is not None:
            processes.stop_request.limit_time(loaded.values.limit.time.seconds, since, run.leaving_seconds)
        return run.train()

    return _run_command(
        loaded, act, outcome_file=RunFiles(loaded.output).outcome, world_size=loaded.values.strategy.world_size
    )


def evaluate(
    source: Path | str | Mapping[str, Any],
    *overrides: str,
    checkpoint: str = "newest",
    split: str | None = None,
    weights: Literal["raw", "averaged"] | None = None,
    output: Path | str | None = None,
    force: bool = False,
) -> InferenceResult:
    """Evaluate a checkpoint exactly, in this process or as one of several.

    Args:
        source: path of the YAML file or the run folder, or the YAML's content as a mapping.
        overrides: ``key.path=value``.
        checkpoint: ``newest``, ``best:METRIC``, or the path of a checkpoint.
        split: ``validation`` (the default), ``test``, ``train`` or ``predict``.
        weights: default: those that the run evaluates (``averaging.evaluate``).
        output: JSON file to write.
        force: overwrite an existing file.

    Raises:
        LockstepError: any error, as one message.
    """
    options = {"checkpoint": checkpoint, "split": split, "weights": weights, "force": force}
    return _infer("evaluate", source, overrides, output, options)


def predict(
    source: Path | str | Mapping[str, Any],
    *overrides: str,
    checkpoint: str = "newest",
    split: str | None = None,
    weights: Literal["raw", "averaged"] | None = None,
    output: Path | str | None = None,
    force: bool = False,
) -> InferenceResult:
    """Write predictions of a checkpoint to a file, in this process or as one of several.

    Args:
        source: path of the YAML file or the run folder, or the YAML's content as a mapping.
        overrides: ``key.path=value``.
        checkpoint: ``newest``, ``best:METRIC``, or the path of a checkpoint.
        split: default: ``prediction.data``, else ``data.test``.
        weights: default: those that the run evaluates (``averaging.evaluate``).
        output: .csv, .jsonl or .parquet. Default: ``predictions.csv`` in the run folder.
        force: overwrite an existing file.

    Raises:
        LockstepError: any error, as one message.
    """
    options = {"checkpoint": checkpoint, "split": split, "weights": weights, "force": force}
    return _infer("predict", source, overrides, output, options)


def examine(source: Path | str | Mapping[str, Any], *overrides: str) -> Diagnosis:
    """Check the processes that would train and the network between them, without training.

    Raises:
        LockstepError: any error, as one message.
    """
    loaded, _ = _with_settings(load, source, overrides, trains=True)

    def act(processes: ProcessContext) -> Diagnosis:
        from runtime.run.diagnosis import examine as examine_ranks

        diagnosis = examine_ranks(loaded, processes.strategy)
        processes.strategy.barrier()
        return diagnosis

    world_size = loaded.values.strategy.world_size
    return _run_command(loaded, act, outcome_file=environment.outcome_file(), world_size=world_size)


def _with_settings(
    read: Callable[[Path | str | Mapping[str, Any], Sequence[str]], LoadedConfiguration],
    source: Path | str | Mapping[str, Any],
    overrides: Sequence[str],
    *,
    trains: bool,
) -> tuple[LoadedConfiguration, list[str]]:
    """Read a configuration and adopt the launcher's settings, equal on all ranks; return it and one note per setting."""
    environment.check_launch()
    world_size = environment.requested_world_size(None)
    loaded, _, notes = load_with_settings(
        lambda more: read(source, [*overrides, *more]), os.environ, world_size=world_size, trains=trains
    )
    return loaded, notes


def _infer(
    act: Literal["evaluate", "predict"],
    source: Path | str | Mapping[str, Any],
    overrides: Sequence[str],
    output: Path | str | None,
    options: Mapping[str, Any],
) -> InferenceResult:
    loaded, notes = _with_settings(load_run, source, overrides, trains=False)

    def infer(processes: ProcessContext) -> InferenceResult:
        for text in notes if processes.strategy.rank == 0 else ():
            _LOGGER.info(text)
        from runtime.inference.checkpoint_inference import Inference
        from runtime.inference.request import InferenceRequest

        request = InferenceRequest(act, output=Path(output) if output is not None else None, **options)
        result = Inference(
            loaded, request, processes.strategy, processes.stop_request, processes.watchdog.position
        ).run()
        processes.strategy.barrier()  # the launcher terminates all ranks when one exits nonzero, as after a stop
        return result

    return _run_command(loaded, infer, outcome_file=None, world_size=None)


def _run_command(
    loaded: LoadedConfiguration,
    act: Callable[[ProcessContext], _R],
    *,
    outcome_file: Path | None,
    world_size: int | None,
) -> _R:
    """Run a command on all ranks: install signal handlers, start the watchdog, write the outcome for the launcher.

    Args:
        outcome_file: the run's, written by rank 0; local rank 0 of each machine also writes the launcher's file.
        world_size: as configured.
    """
    requested = environment.requested_world_size(world_size)
    stop_request = StopRequest(loaded.values.limit.grace_seconds)
    with ExitStack() as stack:
        stack.enter_context(loaded.where.completed())
        stack.enter_context(protected_output())
        stack.enter_context(shown_messages())
        stack.enter_context(hidden())
        stop_request.install()  # before torch is imported, which takes seconds
        stack.callback(stop_request.uninstall)
        stop_request.watch_for("the end of the launcher", launcher_ended())
        stop_request.on_leave = lambda: write_launch_outcome(
            {**_stopped(stop_request), "message": "exited before the first step"}
        )
        processes = _join(loaded, requested, stop_request, stack)
        strategy, watchdog = processes.strategy, processes.watchdog

        def write(outcome: dict[str, Any], *, in_folder: bool = True) -> None:
            if strategy.rank == 0 and in_folder:
                write_outcome(outcome_file, outcome)
            write_launch_outcome(outcome)

        def write_peer_failure(reason: str) -> None:
            from runtime.distributed.watchdog import is_rank_error

            repeats = is_rank_error(reason) and not _lost_contact(reason)
            outcome = {"outcome": "failed", "exit_code": 1, "message": reason, "repeats": repeats}
            write(outcome, in_folder=processes.may_write_outcome())

        def write_unsaved_stop() -> None:
            write({**_stopped(stop_request), "message": "exited without saving a checkpoint"})

        stop_request.on_leave = write_unsaved_stop
        watchdog.on_leave = write_peer_failure
        watchdog.start()
        try:
            result = act(processes)
        except BaseException as raised_error:
            _ignore_lost_workers(stack)
            _report_failure(raised_error, strategy, watchdog, write)
            raise
        finally:
            watchdog.stop()
        ended = {"outcome": "finished", "exit_code": 0} if result.outcome == "finished" else _stopped(stop_request)
        message = {"message": result.message} if result.message else {}
        write({**ended, "step": result.step, **message})
        return result


def _report_failure(
    raised_error: BaseException, strategy: Strategy, watchdog: Watchdog, write: Callable[..., None]
) -> None:
    """Report this rank's error to the other ranks and the launcher; raise a more readable error in its place, if any."""
    error = _readable(raised_error)
    try:
        lost_contact = isinstance(error, RuntimeError) and strategy.world_size > 1 and _lost_contact(str(error))
        if not isinstance(error, EQUAL_ON_ALL_RANKS):
            watchdog.report_failure(f"{type(error).__name__}: {error}", lost_contact=lost_contact)
        exit_code = error.exit_code if isinstance(error, LockstepError) else 1
        repeats = not (lost_contact or isinstance(error, PeerError))
        write({"outcome": "failed", "exit_code": exit_code, "message": str(error), "repeats": repeats})
        if lost_contact:
            raise PeerError("lost contact with another rank; see that rank's log for the cause") from raised_error
        if error is not raised_error:
            raise error from raised_error
    finally:
        # An error referenced from a frame of its own traceback is only freed by the garbage collector. Until then all frames
        # stay alive, among them the wrapped module's with the process group's connections, on which other ranks wait.
        del error, raised_error


def _ignore_lost_workers(stack: ExitStack) -> None:
    """Keep torch from raising about lost workers while a failure is handled: several may be killed at once."""
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        stack.callback(signal.signal, signal.SIGCHLD, previous)


def _readable(error: BaseException) -> BaseException:
    """Return a LockstepError with a clear message for known errors of Python and torch; others unchanged."""
    from runtime.data.loading import lost_worker

    return open_files_error(error) or lost_worker(error) or error


def _stopped(stop_request: StopRequest) -> dict[str, Any]:
    """Return the outcome of a stopped run; the reason is None if another rank got the stop request."""
    return {"outcome": "stopped", "exit_code": 75, "reason": stop_request.reason}


def _join(loaded: LoadedConfiguration, requested: int, stop_request: StopRequest, stack: ExitStack) -> ProcessContext:
    """Check the components, join the process group, and create its watchdog, not yet started."""
    from runtime.build.components import check_components
    from runtime.determinism import default_determinism, determinism
    from runtime.strategies.zero.requirements import check_requirements

    check_components(loaded)
    check_requirements(loaded.values.strategy)
    values = loaded.values
    stack.enter_context(determinism(values.determinism or default_determinism(), values.matmul))

    from torch.distributed import DistError

    from runtime.build.strategy import build_strategy

    if not environment.has_chosen_interface():
        choose_interface(environment.store_address()[0])
        stack.callback(os.environ.pop, "GLOO_SOCKET_IFNAME", None)  # it would stay in effect after the run
    stall_seconds = values.limit.stall_seconds
    stop_request.starting()
    try:
        strategy = build_strategy(loaded)
    except DistError as error:
        address, port = environment.store_address()
        raise PeerError(
            f"not all ranks connected to {address}:{port} within {stall_seconds:g} s (limit.stall_seconds): {error}"
        ) from error
    stop_request.started()
    stack.callback(strategy.close)
    environment.check_world_size(requested, strategy.world_size)
    return ProcessContext(
        strategy, stop_request, _watchdog(values.limit, rank=strategy.rank, world_size=strategy.world_size)
    )


def _watchdog(limit: LimitSection, *, rank: int, world_size: int) -> Watchdog:
    """Create the watchdog over the other ranks."""
    from runtime.distributed.process_groups import groups_joined
    from runtime.distributed.watchdog import Watchdog

    return Watchdog(
        rank=rank,
        world_size=world_size if environment.is_watched() else 1,
        host=socket.gethostname(),
        store=environment.store_address(),
        silence_seconds=limit.silence_seconds,
        stall_seconds=limit.stall_seconds,
        prefix=f"{environment.start_token()}-{groups_joined()}",
    )


def _lost_contact(message: str) -> bool:
    text = message.lower()
    return any(word in text for word in ("gloo", "connection closed", "connection reset", "nccl", "broken pipe"))
