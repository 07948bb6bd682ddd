"""Export a checkpoint's weights to a file that any PyTorch code can load: ``lockstep export``.

The checkpoint is verified first; the file is read back and then renamed into place. A file under the final name is therefore
complete and equal to the checkpoint bit for bit. The checkpoint is not modified.
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
    """The exported file.

    Args:
        path: the file.
        checkpoint: name of the checkpoint.
        weights: ``raw`` or ``averaged``.
        num_names: entries of the state dict.
        num_values: elements of all parameters and buffers, tied weights counted once.
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

    A safetensors file holds a copy of tied weights under each of their names; in a torch file they share memory, also when
    loaded.

    Args:
        source: a checkpoint; or a run folder, for its newest whole checkpoint.
        out: file whose name ends in ``.safetensors``, ``.pt`` or ``.pth``.
        weights: ``averaged``: the running average of each parameter, and with ``swa`` its BatchNorm statistics.
        force: overwrite an existing file.
        warn: called with each warning.

    Raises:
        ConfigurationError: ``out`` has another suffix.
        CheckpointError: the checkpoint or its average is not whole; or ``out`` exists already or cannot be written.
        RunFolderError: the folder does not exist.
    """
    _check_target(out, force=force)
    checkpoint = _chosen(source, warn=warn)
    try:
        tree = json_files.read(checkpoint / "state.json")
        state = _raw(checkpoint, tree, warn=warn)
        if weights == "averaged":
            state = _averaged(state, checkpoint, tree)
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} was removed by its run while it was read; try again") from error
    metadata = _metadata(checkpoint, tree, weights)
    if metadata.get("results_of", weights) != weights:
        warn(
            f"the results of {checkpoint.name} are those of its {metadata['results_of']} weights; exported are the {weights}"
        )
    num_bytes = _write(out, state, metadata, force=force)
    distinct = {id(tensor): tensor.numel() for tensor in state.values()}
    return ExportedFile(out, checkpoint.name, weights, len(state), sum(distinct.values()), num_bytes)


def _check_target(out: Path, *, force: bool) -> None:
    if out.suffix not in _SUFFIXES:
        problem = f"{out} must end in .safetensors, or in .pt or .pth for a torch file"
        raise ConfigurationError([Problem("command line", "OUT", problem)])
    if not out.parent.is_dir():
        raise CheckpointError(f"{out} cannot be written: there is no folder {out.parent}")
    if out.is_dir():
        raise CheckpointError(f"{out} cannot be written: it is a folder")
    if any(is_checkpoint(folder) for folder in out.resolve().parents):
        raise CheckpointError(f"{out} is inside a checkpoint folder, which it would damage; choose another folder")
    if os.path.lexists(out) and not force:
        raise CheckpointError(f"{out} already exists; choose another name, or overwrite it with --force")


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
    skipped = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if skipped:
        warn(f"left out because they are not tensors (load with strict=False): {', '.join(skipped)}")
    return {name: value for name, value in state.items() if name not in skipped}


def _averaged(state: Mapping[str, Tensor], checkpoint: Path, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    stored = tree["training"].get("averaging")
    if stored is not None:
        stored = in_memory(join_state(stored, tensors_on_disk(checkpoint, "training")))
    try:
        return averaged_state(state, stored)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint} {error}") from None


def _metadata(checkpoint: Path, tree: Mapping[str, Any], weights: str) -> dict[str, str]:
    """Return the metadata of a safetensors file, which must be strings."""
    training = tree["training"]
    configuration = training.get("identity", {}).get("configuration", {})
    metadata = {
        "format": "pt",  # required by other libraries' loaders
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
    """Write to a hidden folder next to the target, read back, rename; return the size in bytes."""
    try:
        with hidden_folder(out) as hidden:
            written = hidden / out.name
            _save(written, state, metadata)
            difference = _difference(state, _read(written))
            if difference is not None:
                raise CheckpointError(f"{out} was not written: {difference} when read back")
            num_bytes = written.stat().st_size
            _check_target(out, force=force)  # again: it may have been created meanwhile
            put_in_place(written, out)
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = (
            error.__context__ if isinstance(error.__context__, OSError) else error
        )  # torch's error hides the OSError
        reason = getattr(cause, "strerror", None) or cause
        raise CheckpointError(f"{out} could not be written: {reason}; no partial file is left") from error
    return num_bytes


def _save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    with path.open("wb") as file:
        if path.suffix == ".safetensors":
            save_file(_untied(state), path, metadata=dict(metadata))
        else:
            torch.save(dict(state), file)
        mode = os.fstat(file.fileno()).st_mode
    path.chmod(mode)  # safetensors replaces the file by one that only its owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
    return state


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each name separate contiguous memory, as safetensors requires."""
    untied, seen = {}, set()
    for name, tensor in state.items():
        copied = id(tensor) in seen or not tensor.is_contiguous()
        untied[name] = tensor.clone(memory_format=torch.contiguous_format) if copied else tensor
        seen.add(id(tensor))
    return untied


def _difference(state: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> str | None:
    """Return a description of the first difference, comparing values bit for bit; None if equal."""
    if state.keys() != back.keys():
        return f"the names differ ({', '.join(sorted(state.keys() ^ back.keys()))})"
    for name, tensor in state.items():
        if (tensor.shape, tensor.dtype) != (back[name].shape, back[name].dtype):
            return f"{name} has another shape or dtype"
        if not torch.equal(_bits(tensor), _bits(back[name])):
            return f"{name} has other values"
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
