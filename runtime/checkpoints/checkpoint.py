"""Checkpoints as transactions: a folder with its final name is complete.

Rank 0 writes ``step-00001200.partial-<token>/``, syncs every file, writes ``manifest.json`` with size and sha256 of each,
syncs, renames, and syncs the parent. Reading verifies the manifest, renames a damaged checkpoint and falls back to the
newest valid one. Checksums guard against damage, not malice: therefore nothing is ever unpickled.

    checkpoints/step-00001200/
        model.safetensors       the model's own names; loads with safetensors and load_state_dict
        training.safetensors    optimizer, objective, averages
        state.json              progress, cursor, schedule, everything that is not a tensor
        manifest.json           written last: sizes and checksums of the files, and the digest of the state
    checkpoints/step-00001600/                          of a sharded strategy:
        model-00000-of-00002.safetensors, …, shards.json    instead of the first two (sharded_files.py)
    checkpoints/step-00001600-epoch-4-loss-0.2171/      one of the best when it was saved
    checkpoints/step-00001600-attempt-2/                saved after the second rollback
    checkpoints/best.json                               the best checkpoints of each metric, with values
    checkpoints/rollbacks.json                          which checkpoints a rollback abandoned (rollback_history.py)
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import json_files
from runtime.checkpoints.best import ranked
from runtime.checkpoints.load import damage_of
from runtime.checkpoints.rollback_history import RollbackHistory
from runtime.checkpoints.serialization import dtype_name, write_tensors
from runtime.checkpoints.sharded_files import INDEX, WrittenShards, digest_of_written, index_of, write_pieces
from runtime.checkpoints.snapshot import Snapshot
from runtime.checkpoints.writer_group import SINGLE_WRITER, WriterGroup
from runtime.config.sections import BestSection
from runtime.errors import CheckpointError
from runtime.state.digest import TensorSum, digest_of, is_state, sum_of
from runtime.state.durable_files import make_folder, replace_file, sync_folder, write_durably
from runtime.state.shards import Shard

_NAME = re.compile(r"step-(\d{8,})(?:-attempt-(\d+))?(-epoch-.*|-evaluated)?")
_UNFINISHED = re.compile(r"\.(partial|damaged)-[0-9a-f]+$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Args:
        path: its folder.
        step: steps consumed when it was saved.
        attempt: the attempt it belongs to.
        epoch: the epoch of its last step, counted from 1.
        results: of the evaluation after the same step, if there was one.
        judged: False if that evaluation was due only because the run ended. Such results count among the best only while the
            run ends there: the best must not depend on where a run ended before its limit was raised.
    """

    path: Path
    step: int
    attempt: int
    epoch: int
    results: Mapping[str, Any]
    judged: bool = True

    @property
    def digest(self) -> str:
        """The digest of its state (:mod:`runtime.state.digest`); empty if it has none, or cannot be read."""
        try:
            return str(json_files.read(self.path / "manifest.json").get("digest", ""))
        except (OSError, ValueError):
            return ""


class CheckpointFolder:
    """All checkpoints of one run. Only rank 0 writes.

    Args:
        folder: used for nothing else.
        keep: number of newest checkpoints kept.
        best: which others are kept.
        warn: called with a message about damaged checkpoints.
        before_commit: called before a checkpoint gets its final name; raises if another process has taken over the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        best: Sequence[BestSection],
        warn: Callable[[str], None],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._keep = keep
        self._best = best
        self._warn = warn
        self._before_commit = before_commit
        self.rollback_history = RollbackHistory(folder)

    def write(self, snapshot: Snapshot, writers: WriterGroup = SINGLE_WRITER) -> Path:
        """Write one checkpoint and remove those that are no longer kept.

        Args:
            writers: the ranks that write it together; the others call :func:`write_own_shard` at the same time.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        waiting = True  # the other ranks wait for the folder
        try:
            same_step = [c for c in self._checkpoints() if (c.step, c.attempt) == (snapshot.step, snapshot.attempt)]
            if same_step and (same_step[-1].results or not snapshot.results):
                return same_step[-1].path
            final = self.folder / self._name(snapshot, evaluated=bool(same_step))
            partial = self.folder / f"{final.name}.partial-{secrets.token_hex(4)}"
            make_folder(self.folder)
            partial.mkdir()
            waiting = False
            writers.broadcast(str(partial))
        except OSError as error:
            raise self._unsaved(snapshot, error) from error
        finally:
            if waiting:
                writers.broadcast(None)
        self._finish(partial, final, snapshot, writers)
        return final

    def at(self, path: Path) -> Checkpoint | None:
        """Return the checkpoint of a folder, None if it has been removed."""
        return next((checkpoint for checkpoint in self._checkpoints() if checkpoint.path == path), None)

    def _finish(self, partial: Path, final: Path, snapshot: Snapshot, writers: WriterGroup) -> None:
        try:
            _write_files(partial, snapshot, writers)
            self._before_commit()
            os.rename(partial, final)
            sync_folder(self.folder)
        except OSError as error:
            raise self._unsaved(snapshot, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # does nothing after the rename
        try:
            self.record_best()
            self._drop_old()
        except OSError as error:
            self._warn(f"old checkpoints could not be removed: {error}")

    def _unsaved(self, snapshot: Snapshot, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"step {snapshot.step} could not be saved to {self.folder}: {error.strerror or error}; "
            "earlier checkpoints are whole"
        )

    def newest(self, *, usable: Callable[[Checkpoint], str | None] = lambda checkpoint: None) -> Checkpoint | None:
        """Return the newest whole checkpoint that no rollback abandoned; damaged ones are renamed, with a warning.

        Args:
            usable: returns why a whole checkpoint cannot be used, or None.

        Raises:
            CheckpointError: a checkpoint was written by a newer version of Lockstep.
        """
        for checkpoint in reversed(list(self._checkpoints())):
            path = checkpoint.path
            damage = damage_of(path)
            if damage is not None:
                aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(2)}")
                os.rename(path, aside)
                self._warn(
                    f"checkpoint {path.name} is damaged ({damage}); renamed to {aside.name}, trying the previous one"
                )
                continue
            unusable = usable(checkpoint)
            if unusable is None:
                return checkpoint
            self._warn(f"checkpoint {path.name} is skipped: {unusable}")
        return None

    def clear_partial(self) -> None:
        """Remove partial checkpoints of killed writers."""
        for path in self.folder.glob("step-*.partial-*"):
            shutil.rmtree(path, ignore_errors=True)

    def best(self, best: BestSection) -> list[Checkpoint]:
        """Return the kept checkpoints with the best results, best first."""
        return self._ranked(self._checkpoints(), best)

    def results(self) -> list[Mapping[str, Any]]:
        """Return the judged results of the checkpoints that no rollback abandoned, oldest first."""
        return [checkpoint.results for checkpoint in self._checkpoints() if checkpoint.judged]

    def _name(self, snapshot: Snapshot, *, evaluated: bool) -> str:
        name = f"step-{snapshot.step:08d}" + (f"-attempt-{snapshot.attempt}" if snapshot.attempt else "")
        others = list(self._checkpoints())
        this = Checkpoint(
            self.folder / name, snapshot.step, snapshot.attempt, snapshot.epoch, snapshot.results, snapshot.judged
        )
        leading = [best.metric for best in self._best if this in self._ranked([*others, this], best)]
        if leading:
            values = (f"-{re.sub('[^A-Za-z0-9_]', '_', m)}-{snapshot.results[m]:.4g}" for m in leading)
            return f"{name}-epoch-{snapshot.epoch}" + "".join(values)
        return f"{name}-evaluated" if evaluated else name

    def _checkpoints(self) -> Iterator[Checkpoint]:
        """Yield those that no rollback abandoned, oldest first."""
        valid = (checkpoint for checkpoint, abandoned in listed(self.folder, self.rollback_history) if not abandoned)
        yield from sorted(valid, key=lambda c: (c.step, c.attempt, bool(c.results)))

    def record_best(self) -> None:
        """Write ``best.json`` if it is out of date: a kill may have come before it was written."""
        if not self._best or not self.folder.is_dir():
            return
        checkpoints = list(self._checkpoints())
        record = {
            best.metric: [
                {"checkpoint": c.path.name, "value": c.results[best.metric], "step": c.step, "epoch": c.epoch}
                for c in self._ranked(checkpoints, best)
            ]
            for best in self._best
        }
        file, text = self.folder / "best.json", json.dumps(record, indent=1)
        if not file.is_file() or file.read_bytes() != text.encode():
            replace_file(file, text)

    @staticmethod
    def _ranked(checkpoints: Iterable[Checkpoint], best: BestSection) -> list[Checkpoint]:
        by_age = list(checkpoints)  # oldest first
        return ranked(
            [checkpoint for checkpoint in by_age if checkpoint.judged or checkpoint is by_age[-1]], best, _results
        )

    def _drop_old(self) -> None:
        checkpoints = list(self._checkpoints())
        current = {(c.step, c.attempt): c for c in checkpoints}  # of two for the same step, the one with results
        kept = {c.path for c in list(current.values())[-self._keep :]}
        judged = [c for c in checkpoints if c.judged]  # the best if the run is continued
        for best in self._best:
            kept |= {c.path for c in [*self._ranked(checkpoints, best), *self._ranked(judged, best)]}
        for checkpoint, _ in listed(self.folder, self.rollback_history):
            if checkpoint.path not in kept:
                # Rename first: a kill during the removal must not leave half a checkpoint under a final name.
                doomed = checkpoint.path.with_name(f"{checkpoint.path.name}.partial-{secrets.token_hex(4)}")
                os.rename(checkpoint.path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _results(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return checkpoint.results


def listed(folder: Path, rollback_history: RollbackHistory) -> list[tuple[Checkpoint, bool]]:
    """Return every checkpoint with a final name, and whether a rollback abandoned it."""
    checkpoints = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        if match is not None and not _UNFINISHED.search(path.name) and path.is_dir():
            checkpoint = _opened(path, step=int(match[1]), attempt=int(match[2] or 0))
            checkpoints.append((checkpoint, rollback_history.abandoned(checkpoint.step, checkpoint.attempt)))
    return checkpoints


def write_own_shard(snapshot: Snapshot, writers: WriterGroup) -> None:
    """Write this rank's shard of a checkpoint that rank 0 writes. For ranks other than 0."""
    folder = writers.broadcast()
    if folder is not None:
        receipt = write_pieces(Path(folder), snapshot, rank=writers.rank, world_size=writers.world_size)
        writers.gather(receipt.as_bytes())


def _write_files(folder: Path, snapshot: Snapshot, writers: WriterGroup) -> None:
    together = writers.world_size > 1  # the other ranks wait even if nothing is sharded
    version = 2 if together or snapshot.shards else 1
    tree = {
        "version": version,
        "step": snapshot.step,
        "attempt": snapshot.attempt,
        "epoch": snapshot.epoch,
        "results": dict(snapshot.results),
        "judged": snapshot.judged,
        **snapshot.trees,
    }
    files: dict[str, tuple[int, str]] = {}
    if together or snapshot.shards:
        own = write_pieces(folder, snapshot, rank=0, world_size=writers.world_size)
        receipts = [WrittenShards.read(payload) for payload in writers.gather(own.as_bytes())]
        index, digest = index_of(receipts, folder), digest_of_written(receipts)
        for receipt in receipts:
            files |= receipt.files
        files[INDEX] = write_durably(folder / INDEX, json.dumps(index, indent=1).encode())
    else:
        for file, tensors in snapshot.tensors.items():
            files[f"{file}.safetensors"] = write_tensors(folder / f"{file}.safetensors", tensors)
        digest = _digest(snapshot)
    files["state.json"] = write_durably(folder / "state.json", json.dumps(tree, indent=1).encode())
    manifest = {
        "version": version,
        "digest": digest,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
    }
    write_durably(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    sync_folder(folder)


def _digest(snapshot: Snapshot) -> str:
    """Return the digest of a state of which this process holds all."""
    tensors = {f"{part}/{name}": t for part, held in snapshot.tensors.items() for name, t in held.items()}
    return digest_of(
        {
            name: TensorSum(dtype_name(t.dtype), tuple(t.shape), sum_of(Shard(tuple(t.shape), (0,) * t.ndim, t)))
            for name, t in tensors.items()
            if is_state(name)
        }
    )


def _opened(path: Path, *, step: int, attempt: int) -> Checkpoint:
    try:
        tree = json_files.read(path / "state.json")
        return Checkpoint(
            path, step, attempt, int(tree["epoch"]), dict(tree["results"]), bool(tree.get("judged", True))
        )
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return Checkpoint(path, step, attempt, 0, {})  # damaged: detected when it is verified
