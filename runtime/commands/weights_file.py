"""One checkpoint's weights as a file that any PyTorch code reads: ``lockstep export``.

Verified before, read back after, and renamed into place: what bears the final name is whole and holds what the checkpoint
holds, bit for bit. Nothing of the checkpoint is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime import json_files
from runtime.checkpoints.inspection import is_checkpoint, newest_whole
from runtime.checkpoints.load import damage_of, load_tensors
from runtime.checkpoints.serialization import join_state
from runtime.checkpoints.sharded_files import tensors_on_disk
from runtime.errors import CheckpointError, ConfigurationError, Problem
from runtime.optimization.averaging import averaged_state
from runtime.run_files import RunFiles
from runtime.state.atomic_folder import hidden_folder, put_in_place
from runtime.state.shards import in_memory

_SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class ExportedFile:
    """What was written.

    Args:
        path: the file.
        checkpoint: name of the checkpoint.
        weights: which of its weights.
        num_names: entries of the state dict.
        num_values: numbers in all of them, those of tied weights once: parameters and buffers.
        num_bytes: size of the file.
    """

    path: Path
    checkpoint: str
    weights: str
    num_names: int
    num_values: int
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.weights} weights of {self.checkpoint}: {self.num_names:,} names, {self.num_values:,} parameters and "
            f"buffer values, {self.num_bytes:,} bytes, {self.path}"
        )


def export(
    source: Path,
    out: Path,
    *,
    weights: Literal["raw", "averaged"] = "raw",
    force: bool = False,
    warn: Callable[[str], None],
) -> ExportedFile:
    """Write the model's state dict to a safetensors or torch file.

    A safetensors file holds tied weights under each of their names; in torch's they share their memory, and so they do when
    it is loaded.

    Args:
        source: a checkpoint; or a run folder, whose newest whole checkpoint is taken.
        out: ends in ``.safetensors``, ``.pt`` or ``.pth``.
        weights: ``averaged`` takes the running average of each parameter, and with ``swa`` its BatchNorm statistics.
        force: write over a file that is there.
        warn: told what else a person should know.

    Raises:
        ConfigurationError: ``out`` ends otherwise.
        CheckpointError: the checkpoint is not whole, or its average is not; or ``out`` is there or cannot be written.
        RunFolderError: there is no such folder.
    """
    _check_target(out, force=force)
    checkpoint = _chosen(source, warn=warn)
    try:
        tree = json_files.read(checkpoint / "state.json")
        state = _raw(checkpoint, tree, warn=warn)
        if weights == "averaged":
            state = _averaged(state, checkpoint, tree)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} was removed while it was read, by a run that goes on; try again"
        ) from error
    metadata = _metadata(checkpoint, tree, weights)
    if metadata.get("results_of", weights) != weights:
        warn(
            f"the results of {checkpoint.name} are those of its {metadata['results_of']} weights; these are the {weights}"
        )
    num_bytes = _write(out, state, metadata, force=force)
    distinct = {id(tensor): tensor.numel() for tensor in state.values()}
    return ExportedFile(out, checkpoint.name, weights, len(state), sum(distinct.values()), num_bytes)


def _check_target(out: Path, *, force: bool) -> None:
    if out.suffix not in _SUFFIXES:
        problem = f"{out} must end in .safetensors, or in .pt or .pth for a file of torch's"
        raise ConfigurationError([Problem("command line", "OUT", problem)])
    if not out.parent.is_dir():
        raise CheckpointError(f"{out} cannot be written: there is no folder {out.parent}")
    if out.is_dir():
        raise CheckpointError(f"{out} cannot be written: it is a folder")
    if any(is_checkpoint(folder) for folder in out.resolve().parents):
        raise CheckpointError(f"{out} lies within a checkpoint, which would be damaged by it; choose another folder")
    if os.path.lexists(out) and not force:
        raise CheckpointError(f"{out} is there already; choose another name, or write over it with --force")


def _chosen(source: Path, *, warn: Callable[[str], None]) -> Path:
    """Return a verified checkpoint."""
    if RunFiles(source).checkpoints.is_dir() or not (source.is_dir() and is_checkpoint(source)):
        return newest_whole(source, warn=warn).path
    if ".partial-" in source.name:
        raise CheckpointError(f"{source} is partial: it is being written, or was when its writer was killed")
    damage = damage_of(source)
    if damage is not None:
        raise CheckpointError(f"{source} is damaged ({damage}); nothing was exported")
    return source


def _raw(checkpoint: Path, tree: Mapping[str, Any], *, warn: Callable[[str], None]) -> dict[str, Tensor]:
    state = join_state(tree["model"], load_tensors(checkpoint, "model"))
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        warn(f"left out, since they are no tensors (load with strict=False): {', '.join(others)}")
    return {name: value for name, value in state.items() if name not in others}


def _averaged(state: Mapping[str, Tensor], checkpoint: Path, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    stored = tree["training"].get("averaging")
    if stored is not None:
        stored = in_memory(join_state(stored, tensors_on_disk(checkpoint, "training")))
    try:
        return averaged_state(state, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} {error}") from None


def _metadata(checkpoint: Path, tree: Mapping[str, Any], weights: str) -> dict[str, str]:
    """Return what a safetensors file says of itself; all are texts."""
    training = tree["training"]
    configuration = training.get("identity", {}).get("configuration", {})
    metadata = {
        "format": "pt",  # other libraries' loaders ask for it
        "weights": weights,
        "checkpoint": checkpoint.name,
        "step": str(tree["step"]),
        "epoch": str(tree["epoch"]),
        "attempt": str(tree["attempt"]),
    }
    if "name" in configuration:
        metadata["run"] = configuration["name"]
    if tree["results"]:
        metadata["results"] = json.dumps(tree["results"])
        averages = bool((training.get("averaging") or {}).get("count", 0))
        evaluates_average = averages and (configuration.get("averaging") or {}).get("evaluate", False)
        metadata["results_of"] = "averaged" if evaluates_average else "raw"
    return metadata


def _write(out: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], *, force: bool) -> int:
    """Write beside the target, read back, rename; return the size in bytes."""
    try:
        with hidden_folder(out) as hidden:
            written = hidden / out.name
            _save(written, state, metadata)
            difference = _difference(state, _read(written))
            if difference is not None:
                raise CheckpointError(f"{out} is not written: {difference} when it was read back")
            num_bytes = written.stat().st_size
            _check_target(out, force=force)  # once more: it may have come meanwhile
            put_in_place(written, out)
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides the disk's answer
        reason = getattr(cause, "strerror", None) or cause
        raise CheckpointError(f"{out} could not be written: {reason}; no half file is left") from error
    return num_bytes


def _save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    with path.open("wb") as file:
        if path.suffix == ".safetensors":
            save_file(_untied(state), path, metadata=dict(metadata))
        else:
            torch.save(dict(state), file)
        mode = os.fstat(file.fileno()).st_mode
    path.chmod(mode)  # safetensors replaces the file by one that nobody else may read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
    return state


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each name contiguous memory of its own, which safetensors insists on."""
    untied, seen = {}, set()
    for name, tensor in state.items():
        seen_before = id(tensor) in seen or not tensor.is_contiguous()
        untied[name] = tensor.clone(memory_format=torch.contiguous_format) if seen_before else tensor
        seen.add(id(tensor))
    return untied


def _difference(state: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> str | None:
    """Return what is not the same, judging values by their bits."""
    if state.keys() != back.keys():
        return f"the names differ ({', '.join(sorted(state.keys() ^ back.keys()))})"
    for name, tensor in state.items():
        if (tensor.shape, tensor.dtype) != (back[name].shape, back[name].dtype):
            return f"{name} has another shape or type"
        if not torch.equal(_bits(tensor), _bits(back[name])):
            return f"{name} has other values"
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
