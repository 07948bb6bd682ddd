"""Verify and read the files of a checkpoint; checkpoint.py describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runtime import json_files
from runtime.checkpoints.serialization import join_state
from runtime.checkpoints.sharded_files import INDEX, tensors_on_disk
from runtime.errors import CheckpointError
from runtime.state.durable_files import checksum
from runtime.state.shards import in_memory, whole

FORMAT_VERSION = 2  # 1: without shards, still written if nothing is sharded
_WRONG = (ValueError, LookupError, TypeError, AttributeError, OverflowError, SafetensorError, RuntimeError)
_FILES = ("model.safetensors", "training.safetensors", "state.json")
_SHARDED_FILES = (INDEX, "state.json")


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's state dict and the training state of a verified checkpoint, on the CPU."""
    tree = json_files.read(path / "state.json")
    return join_state(tree["model"], load_tensors(path, "model")), join_state(
        tree["training"], load_tensors(path, "training")
    )


def open_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Like :func:`load_state`, but tensors are read lazily, and only the slices requested."""
    tree = json_files.read(path / "state.json")
    return join_state(tree["model"], tensors_on_disk(path, "model")), join_state(
        tree["training"], tensors_on_disk(path, "training")
    )


def load_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """Return all tensors of a verified checkpoint, unsharded.

    Args:
        part: ``model`` or ``training``.
    """
    if (path / INDEX).is_file():
        return {name: whole(tensor) for name, tensor in tensors_on_disk(path, part).items()}
    return load_file(path / f"{part}.safetensors")


def load_model(path: Path) -> dict[str, Any]:
    """Return the model's state dict of a verified checkpoint, on the CPU; tied weights are one tensor."""
    tree = json_files.read(path / "state.json")["model"]
    return cast(dict[str, Any], join_state(tree, load_tensors(path, "model")))


@dataclass(frozen=True)
class LoadedWeights:
    """The parts of a checkpoint needed for inference.

    Args:
        model: state dict with the raw weights.
        objective: state dict of the objective.
        averaging: state of the running average; None without one.
        buffers: those not in the state dicts (:class:`runtime.state.module_buffers.BufferState`).
        fingerprint: of the run, with ``slots`` and ``configuration``.
        preparation: preprocessing and class names taken from the training data; empty if unknown.
        code: the user's code, as :mod:`runtime.code_digests` describes it.
    """

    model: Mapping[str, Any]
    objective: Mapping[str, Any]
    averaging: Mapping[str, Any] | None
    buffers: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    preparation: Mapping[str, Any]
    code: Mapping[str, Mapping[str, str]]


def load_weights(path: Path) -> LoadedWeights:
    """Return the parts of a verified checkpoint needed for inference, on the CPU; the optimizer's state is not read.

    Raises:
        CheckpointError: a file of it was removed.
    """
    try:
        tree = json_files.read(path / "state.json")
        training = tree["training"]
        model = join_state(tree["model"], load_tensors(path, "model"))
        lazy = tensors_on_disk(path, "training")
        parts = {part: in_memory(join_state(training[part], lazy)) for part in ("objective", "averaging", "buffers")}
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): a running job removed it; try again"
        ) from error
    return LoadedWeights(
        model,
        parts["objective"],
        parts["averaging"],
        parts["buffers"],
        training["identity"],
        training.get("preparation", {}),
        training["code"],
    )


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if every byte is as written.

    Raises:
        CheckpointError: it was written by a newer version of Lockstep.
    """
    try:
        manifest = json_files.read(path / "manifest.json")
        version = int(manifest["version"])
        files = {
            name: (int(expected["bytes"]), str(expected["sha256"])) for name, expected in manifest["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return "manifest.json is missing or unreadable"
    outside = next((name for name in files if Path(name).name != name), None)
    if outside is not None:
        return f"manifest.json names {outside!r}, which is not a file of the checkpoint"
    if version > FORMAT_VERSION and _version_of_state(path) == version:  # otherwise the number itself is damaged
        raise CheckpointError(
            f"{path} has format {version}; this Lockstep reads up to {FORMAT_VERSION}: update it, or use another output"
        )
    for name in _SHARDED_FILES if INDEX in files else _FILES:
        if name not in files:
            return f"{name} is not in manifest.json"
    for name, (size, digest) in files.items():
        file = path / name
        try:
            if not file.is_file() or file.stat().st_size != size:
                return f"{name} is missing or cut short"
            if checksum(file) != digest:
                return f"{name} does not match its checksum"
        except OSError as error:  # a bad sector
            return f"{name} cannot be read: {error.strerror or error}"
    if version != _version_of_state(path):
        return "manifest.json and state.json name different formats"
    return _misfit(path)


def _misfit(path: Path) -> str | None:
    """Return why files with correct checksums are not a valid checkpoint, or None."""
    try:
        tree = json_files.read(path / "state.json")
        int(tree["step"]), int(tree["attempt"]), int(tree["epoch"]), dict(tree["results"])
        for part in ("model", "training"):
            tensors = tensors_on_disk(path, part)
            if not isinstance(join_state(tree.get(part, {}), tensors), dict):
                return f"state.json has no state for {part}"
    except (OSError, *_WRONG) as error:
        return f"its files do not describe a state ({type(error).__name__}: {error})"
    return None


def _version_of_state(path: Path) -> int | None:
    try:
        return int(json_files.read(path / "state.json")["version"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
