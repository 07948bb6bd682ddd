"""List and verify the checkpoints of a run: for ``lockstep checkpoints``, and to choose one to export.

Read-only. A run may write at the same time: a folder that disappears during inspection is left out, and the listing is
repeated. A checkpoint counts as whole if a start of the run would accept it (checkpoint.py).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeElapsedColumn

from runtime import json_files
from runtime.checkpoints.checkpoint import Checkpoint, listed
from runtime.checkpoints.load import damage_of
from runtime.checkpoints.rollback_history import RollbackHistory
from runtime.errors import CheckpointError, RunFolderError
from runtime.run_files import RunFiles

State = Literal["whole", "damaged", "newer format", "moved aside", "partial"]
_UNFINISHED = re.compile(r"step-(\d{8,})(?:-attempt-(\d+))?.*\.(partial|damaged)-[0-9a-f]+")
_LISTINGS = 5  # at most, of a folder that changes
_BIG_BYTES = 1 << 28  # verified in about a quarter of a second; larger totals get a progress bar


@dataclass(frozen=True)
class CheckpointInfo:
    """One folder among a run's checkpoints.

    Args:
        name: of the folder.
        step: steps consumed when it was saved.
        epoch: the epoch of its last step, counted from 1; 0 if that cannot be read.
        attempt: the attempt it belongs to.
        results: of the evaluation after the same step.
        size_bytes: of its files.
        age_seconds: since it was written.
        state: ``whole``; ``damaged``; ``newer format``; ``moved aside`` by a start that found it damaged; ``partial``: being
            written, or left by a killed writer.
        problem: why it is not whole.
        abandoned: whether a rollback returned to an earlier step, so that it is never resumed from.
        best_of: its rank, counted from 1, by metric, if it is among the best of it.
        digest: of its state (:mod:`runtime.state.digest`); empty if it is not whole, or older than digests.
    """

    name: str
    step: int
    epoch: int
    attempt: int
    results: Mapping[str, Any]
    size_bytes: int
    age_seconds: float
    state: State
    problem: str | None
    abandoned: bool
    best_of: Mapping[str, int] = field(default_factory=dict)
    digest: str = ""

    @property
    def in_use(self) -> bool:
        """Whether a start may resume from it."""
        return not self.abandoned and self.state not in ("partial", "moved aside")


@dataclass(frozen=True)
class CheckpointListing:
    """The checkpoints of one run.

    Args:
        folder: that holds them.
        checkpoints: oldest first.
        best: the metrics that ``best.json`` names.
        notes: further messages for the user.
    """

    folder: Path
    checkpoints: Sequence[CheckpointInfo]
    best: Sequence[str]
    notes: Sequence[str]

    @property
    def newest(self) -> CheckpointInfo | None:
        """The checkpoint that a start tries first."""
        candidates = [c for c in self.checkpoints if c.in_use]
        return candidates[-1] if candidates else None

    @property
    def goes_on_from(self) -> CheckpointInfo | None:
        """The checkpoint that a start resumes from; None if it begins at step 0, or refuses one of a newer format."""
        for checkpoint in reversed(self.checkpoints):
            if checkpoint.in_use and checkpoint.state != "damaged":
                return checkpoint if checkpoint.state == "whole" else None
        return None

    @property
    def sound(self) -> bool:
        """Whether a start resumes from the newest checkpoint, or none has been written yet."""
        if self.newest is None:
            return all(c.state == "partial" for c in self.checkpoints)
        return self.newest.state == "whole"

    def as_json(self) -> str:
        """Return the listing as JSON; results that are NaN or infinite become null."""
        content = {
            "folder": str(self.folder),
            "goes_on_from": self.goes_on_from.name if self.goes_on_from else None,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
            "notes": list(self.notes),
        }
        return json.dumps(_without_nan(content), indent=2, allow_nan=False)


def inspect(run: Path) -> CheckpointListing:
    """List all checkpoints of a run and verify every byte; on a terminal, with a progress bar.

    Args:
        run: the run folder, or its folder of checkpoints.

    Raises:
        RunFolderError: it is not such a folder, or cannot be read.
        CheckpointError: the record of rollbacks cannot be read.
    """
    folder = checkpoints_folder(run)
    try:
        known: dict[tuple[Path, int | None], CheckpointInfo] = {}
        for _ in range(_LISTINGS):
            listing = {(c.path, _inode(c.path)): (c, abandoned) for c, abandoned in _listing(folder)}
            known |= _verified({key: entry for key, entry in listing.items() if key not in known})
            known = {(path, inode): i for (path, inode), i in known.items() if _inode(path) == inode is not None}
            if listing.keys() <= known.keys():
                break
        best, notes = _best(folder)
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be read: {error.strerror or error}") from error
    order = {checkpoint.path.name: _age_order(checkpoint) for checkpoint, _ in listing.values()}
    checkpoints = sorted((i for i in known.values() if i.name in order), key=lambda i: order[i.name])
    return CheckpointListing(folder, list(_with_places(checkpoints, best)), list(best), notes)


def newest_whole(run: Path, *, warn: Callable[[str], None]) -> Checkpoint:
    """Return the newest whole checkpoint that no rollback abandoned, without changing anything on disk.

    Args:
        run: the run folder, or its folder of checkpoints.
        warn: called with a message for each damaged checkpoint that is skipped.

    Raises:
        RunFolderError: it is not such a folder, or cannot be read.
        CheckpointError: there is none, or a newer one was written by a newer version of Lockstep.
    """
    folder = checkpoints_folder(run)
    try:
        for _ in range(_LISTINGS):
            usable = [c for c, abandoned in listed(folder, RollbackHistory(folder)) if not abandoned]
            for checkpoint in sorted(usable, key=_age_order, reverse=True):
                damage = damage_of(checkpoint.path)
                if damage is None:
                    return checkpoint
                if not checkpoint.path.exists():
                    break  # a run has just removed it
                warn(f"{checkpoint.path.name} is skipped: it is damaged ({damage})")
            else:
                break
    except OSError as error:
        raise RunFolderError(f"{folder} cannot be read: {error.strerror or error}") from error
    raise CheckpointError(f"{run} holds no whole checkpoint")


def checkpoints_folder(run: Path) -> Path:
    """Return the folder that holds a run's checkpoints.

    Args:
        run: the run folder, or that folder itself.

    Raises:
        RunFolderError: it is not a folder, or it is one checkpoint.
    """
    if not run.is_dir():
        raise RunFolderError(f"{run} is not a folder" if run.exists() else f"there is no folder {run}")
    if (folder := RunFiles(run).checkpoints).is_dir():
        return folder
    if is_checkpoint(run):
        raise RunFolderError(f"{run} is a single checkpoint; give the run folder that it belongs to")
    return run


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, possibly incomplete, or copied under another name."""
    files = ("manifest.json", "state.json")
    return re.match(r"step-\d{8}", folder.name) is not None or all((folder / file).is_file() for file in files)


def _listing(folder: Path) -> Iterator[tuple[Checkpoint, bool]]:
    """Yield finished checkpoints and whether they are abandoned, then damaged and partial ones."""
    rollback_history = RollbackHistory(folder)
    yield from listed(folder, rollback_history)
    for path in sorted(folder.iterdir()):
        match = _UNFINISHED.fullmatch(path.name)
        if match is not None and path.is_dir():
            step, attempt = int(match[1]), int(match[2] or 0)
            yield Checkpoint(path, step, attempt, epoch=0, results={}), rollback_history.abandoned(step, attempt)


def _verified(
    listing: Mapping[tuple[Path, int | None], tuple[Checkpoint, bool]],
) -> dict[tuple[Path, int | None], CheckpointInfo]:
    sizes = {key: _size(key[0]) for key in listing}
    console = Console(stderr=True)
    shown = console.is_terminal and sum(sizes.values()) >= _BIG_BYTES
    columns = ("verifying {task.description}", BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    verified = {}
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=sum(sizes.values()))
        for key, (checkpoint, abandoned) in listing.items():
            progress.update(task, description=checkpoint.path.name)
            verified[key] = _inspected(checkpoint, abandoned, size_bytes=sizes[key])
            progress.advance(task, sizes[key])
    return verified


def _inspected(checkpoint: Checkpoint, abandoned: bool, *, size_bytes: int) -> CheckpointInfo:
    path = checkpoint.path
    unfinished = _UNFINISHED.fullmatch(path.name)
    state: State = "whole"
    problem = None
    if unfinished is not None and unfinished[3] == "partial":
        state = "partial"
    else:
        try:
            problem = damage_of(path)
            state = "moved aside" if unfinished is not None else "whole" if problem is None else "damaged"
        except CheckpointError as error:
            state, problem = "newer format", str(error).removeprefix(f"{path} ")
    try:
        age = max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        age = 0.0  # just removed: it will be left out
    return CheckpointInfo(
        name=path.name,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        attempt=checkpoint.attempt,
        results=checkpoint.results,
        size_bytes=size_bytes,
        age_seconds=round(age, 3),
        state=state,
        problem=problem,
        abandoned=abandoned,
        digest=checkpoint.digest if state == "whole" else "",
    )


def _best(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Return the names of the best checkpoints by metric, best first, and messages about an unreadable record."""
    try:
        record = json_files.read(folder / "best.json")
        return {metric: [str(entry["checkpoint"]) for entry in entries] for metric, entries in record.items()}, []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}, ["best.json cannot be read; the next save rewrites it"]


def _with_places(checkpoints: Sequence[CheckpointInfo], best: Mapping[str, Sequence[str]]) -> Iterator[CheckpointInfo]:
    abandoned = {
        i.name for i in checkpoints if i.abandoned
    }  # a rollback does not update best.json before the next save
    places: dict[str, dict[str, int]] = {}
    for metric, names in best.items():
        for place, name in enumerate((name for name in names if name not in abandoned), start=1):
            places.setdefault(name, {})[metric] = place
    for inspected in checkpoints:
        yield CheckpointInfo(**{**vars(inspected), "best_of": places.get(inspected.name, {})})


def _age_order(checkpoint: Checkpoint) -> tuple[int, int, bool, str]:
    """Sort key as used by a start: of two with the same step and attempt, the one with results is newer."""
    return checkpoint.step, checkpoint.attempt, bool(checkpoint.results), checkpoint.path.name


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _size(folder: Path) -> int:
    size = 0
    try:
        for file in folder.iterdir():
            size += file.stat().st_size
    except OSError:
        pass  # it is being removed
    return size


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
