"""Checkpoints as transactions: a folder that bears its final name is whole.

Rank 0 writes ``step-00001200.partial-<token>/``, syncs every file, writes ``manifest.json`` with size and sha256 of each,
syncs, renames, and syncs the parent. Reading verifies the manifest, moves a damaged checkpoint aside and falls back to the
newest good one. Checksums guard against damage, not malice: that is why nothing is ever unpickled.

    checkpoints/step-00001200/
        model.safetensors       the model's own names; loads with safetensors and load_state_dict
        training.safetensors    optimizer, objective, averages
        state.json              progress, cursor, schedule, everything that is not a tensor
        manifest.json           written last
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from runtime.config import Best
from runtime.errors import CheckpointError
from runtime.serialization import checksum, join_state, split_state, sync_folder, write_durably, write_tensors

FORMAT_VERSION = 1
_FILES = ("model.safetensors", "training.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Args:
        path: its folder.
        step: steps consumed when it was made.
        results: of the evaluation of the same step, if there was one.
    """

    path: Path
    step: int
    results: Mapping[str, Any]


class CheckpointFolder:
    """All checkpoints of one run. Writing is for rank 0.

    Args:
        folder: holds nothing else.
        keep: newest checkpoints kept.
        best: which others are kept.
        warn: told what was found damaged.
    """

    def __init__(self, folder: Path, *, keep: int, best: Sequence[Best], warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._keep = keep
        self._best = best
        self._warn = warn

    def save(
        self, step: int, *, model: Mapping[str, Any], training: Mapping[str, Any], results: Mapping[str, Any]
    ) -> Path:
        """Write one checkpoint and drop those that are no longer kept.

        Args:
            model: the model's state dict.
            training: everything else: tensors and plain data, nested.
            results: of the evaluation of this step, empty if there was none.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
        """
        final = self.folder / f"step-{step:08d}"
        if final.exists():
            return final
        partial = self.folder / f"{final.name}.partial-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            self._write(partial, step, model, training, results)
            os.rename(partial, final)
            sync_folder(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"step {step} could not be saved to {self.folder}: {error.strerror or error}; earlier checkpoints are whole"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # nothing is left under this name once it has been renamed
        try:
            self._drop_old()
        except OSError as error:
            self._warn(f"an old checkpoint could not be removed: {error}")
        return final

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; a damaged one is moved aside and named.

        Raises:
            CheckpointError: a checkpoint was written by a newer version of Lockstep.
        """
        for path in reversed(self._paths()):
            damage = _damage(path)
            if damage is None:
                return _opened(path)
            aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(2)}")
            os.rename(path, aside)
            self._warn(
                f"checkpoint {path.name} is damaged ({damage}); moved to {aside.name}, going on from the one before"
            )
        return None

    def clear_partial(self) -> None:
        """Remove what a killed writer left behind."""
        for path in self.folder.glob("step-*.partial-*"):
            shutil.rmtree(path, ignore_errors=True)

    def best(self, metric: str, mode: str) -> Checkpoint | None:
        """Return the kept checkpoint with the best result."""
        ranked = _ranked([_opened(path) for path in self._paths()], metric, mode)
        return ranked[0] if ranked else None

    def _write(
        self, folder: Path, step: int, model: Mapping[str, Any], training: Mapping[str, Any], results: Mapping[str, Any]
    ) -> None:
        model_tree, model_tensors = split_state(dict(model))
        training_tree, training_tensors = split_state(dict(training))
        tree = {
            "version": FORMAT_VERSION,
            "step": step,
            "results": dict(results),
            "model": model_tree,
            "training": training_tree,
        }
        files = {
            "model.safetensors": write_tensors(folder / "model.safetensors", model_tensors),
            "training.safetensors": write_tensors(folder / "training.safetensors", training_tensors),
            "state.json": write_durably(folder / "state.json", json.dumps(tree, indent=1).encode()),
        }
        manifest = {
            "version": FORMAT_VERSION,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
        }
        write_durably(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(folder)

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))

    def _drop_old(self) -> None:
        checkpoints = [_opened(path) for path in self._paths()]
        kept = {checkpoint.path for checkpoint in checkpoints[-self._keep :]}
        for best in self._best:
            kept |= {c.path for c in _ranked(checkpoints, best.metric, best.mode)[: best.keep]}
        for checkpoint in checkpoints:
            if checkpoint.path not in kept:
                # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a final name.
                doomed = checkpoint.path.with_name(f"{checkpoint.path.name}.partial-{secrets.token_hex(4)}")
                os.rename(checkpoint.path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def load_state(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's state dict and the training state of a verified checkpoint, on the CPU."""
    tree = json.loads((checkpoint.path / "state.json").read_text())
    model = join_state(tree["model"], load_file(checkpoint.path / "model.safetensors"))
    training = join_state(tree["training"], load_file(checkpoint.path / "training.safetensors"))
    return model, training


def _opened(path: Path) -> Checkpoint:
    try:
        tree = json.loads((path / "state.json").read_text())
        return Checkpoint(path, tree["step"], tree["results"])
    except (OSError, ValueError, KeyError):
        return Checkpoint(path, int(path.name[5:]), {})


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version = int(manifest["version"])
        files = {
            name: (int(expected["bytes"]), str(expected["sha256"])) for name, expected in manifest["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "manifest.json is missing or unreadable"
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}; this Lockstep reads up to {FORMAT_VERSION}: update it, or use another output"
        )
    for name in _FILES:
        if name not in files:
            return f"{name} is not in manifest.json"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut short"
        if checksum(file) != digest:
            return f"{name} does not match its checksum"
    return None


def _ranked(checkpoints: Sequence[Checkpoint], metric: str, mode: str) -> list[Checkpoint]:
    judged = [c for c in checkpoints if math.isfinite(c.results.get(metric, math.nan))]
    return sorted(judged, key=lambda c: c.results[metric], reverse=mode == "max")
