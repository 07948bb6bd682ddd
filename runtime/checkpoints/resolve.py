"""Resolve a checkpoint choice: the newest, the best by a metric, or a path. Read-only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from runtime import json_files
from runtime.checkpoints.checkpoint import Checkpoint, CheckpointFolder, listed
from runtime.checkpoints.inspection import checkpoints_folder, is_checkpoint, newest_whole
from runtime.checkpoints.load import damage_of
from runtime.checkpoints.rollback_history import RollbackHistory
from runtime.config.sections import BestSection
from runtime.errors import CheckpointError, ConfigurationError, Problem
from runtime.run_files import RunFiles

NEWEST = "newest"
_BEST = "best:"


def check_choice(run: Path, choice: str, best: Sequence[BestSection]) -> None:
    """Validate a choice as far as possible without reading the checkpoints' contents.

    Raises:
        LockstepError: see :func:`chosen`.
    """
    if choice == NEWEST:
        folder = checkpoints_folder(run)
        if all(abandoned for _, abandoned in listed(folder, RollbackHistory(folder))):
            raise CheckpointError(f"{run} holds no whole checkpoint")
    elif choice.startswith(_BEST):
        _best(run, choice, best, warn=lambda text: None)
    else:
        _named(run, choice)


def chosen(run: Path, choice: str, best: Sequence[BestSection], *, warn: Callable[[str], None]) -> Checkpoint:
    """Return the chosen checkpoint, after verifying every byte.

    Args:
        run: the run folder.
        choice: ``newest``, ``best:METRIC``, or the path of a checkpoint or its name in the run.
        best: the configuration's ``checkpoint.best``, which defines whether higher or lower is better.
        warn: called with a message for each damaged checkpoint that is skipped.

    Raises:
        RunFolderError: there is no such run folder.
        CheckpointError: there is no such checkpoint, or it is damaged.
        ConfigurationError: no best checkpoint is kept by this metric.
    """
    if choice == NEWEST:
        return newest_whole(run, warn=warn)
    path = _best(run, choice, best, warn=warn).path if choice.startswith(_BEST) else _named(run, choice)
    damage = damage_of(path)
    if damage is not None:
        raise CheckpointError(f"{path} is damaged ({damage}); choose another with --checkpoint")
    tree = json_files.read(path / "state.json")
    return Checkpoint(path, int(tree["step"]), int(tree["attempt"]), int(tree["epoch"]), dict(tree["results"]))


def _best(run: Path, choice: str, best: Sequence[BestSection], *, warn: Callable[[str], None]) -> Checkpoint:
    metric = choice.removeprefix(_BEST)
    kept_by = {b.metric: b for b in best}
    if metric not in kept_by:
        kept = f"metrics of checkpoint.best: {', '.join(kept_by)}" if kept_by else "checkpoint.best is empty"
        what = f"{choice}: no best checkpoint is kept by {metric!r} ({kept})"
        raise ConfigurationError([Problem("command line", "--checkpoint", what)])
    candidates = CheckpointFolder(checkpoints_folder(run), keep=1, best=(), warn=warn).best(kept_by[metric])
    if not candidates:
        raise CheckpointError(f"{run} holds no checkpoint with a result for {metric!r}")
    return candidates[0]


def _named(run: Path, choice: str) -> Path:
    for path in (Path(choice), RunFiles(run).checkpoints / choice):
        if not path.is_dir():
            continue
        if ".partial-" in path.name:
            raise CheckpointError(f"{path} is partial: it is being written, or its writer was killed")
        if not is_checkpoint(path):
            raise CheckpointError(f"{path} is not a checkpoint: it has no manifest.json")
        return path
    raise CheckpointError(f"there is no checkpoint {choice}; give newest, best:METRIC, or a checkpoint's path or name")
