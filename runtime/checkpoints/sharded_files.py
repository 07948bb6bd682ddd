"""The files of a sharded checkpoint, written by all ranks, and one interface to read sharded and plain checkpoints.

    model-00001-of-00004.safetensors       rank 1's shards of the model; likewise training-…
    shards.json                            each tensor's global shape and dtype, and the location of its shards

All ranks write in parallel and report their files to rank 0; rank 0 verifies that the shards cover every tensor before it
finishes the transaction (checkpoint.py). A checkpoint can be read by any number of ranks, by slices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from runtime import json_files
from runtime.checkpoints.serialization import dtype_called, dtype_name, write_tensors
from runtime.checkpoints.snapshot import Snapshot
from runtime.errors import CheckpointError
from runtime.state.digest import TensorSum, digest_of, is_state, sum_of
from runtime.state.shards import FileSlice, Shard, TensorOnDisk

INDEX = "shards.json"


@dataclass(frozen=True)
class WrittenShards:
    """The files that one rank has written.

    Args:
        files: name to size in bytes and sha256.
        pieces: by part (``model``, ``training``) and tensor: ``file``, ``dtype``, ``whole`` shape, ``offsets``, ``shape``, and
            the ``sum`` of :func:`runtime.state.digest.sum_of`.
        problem: why writing failed.
    """

    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    pieces: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    problem: str | None = None

    def as_bytes(self) -> bytes:
        """Serialise for sending to rank 0."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, payload: bytes) -> WrittenShards:
        """Undo :meth:`as_bytes`."""
        content = json.loads(payload)
        return cls(
            {name: tuple(facts) for name, facts in content["files"].items()}, content["pieces"], content["problem"]
        )


def write_pieces(folder: Path, snapshot: Snapshot, *, rank: int, world_size: int) -> WrittenShards:
    """Write this rank's part; an error is returned, not raised, since the other ranks wait for the result."""
    files: dict[str, tuple[int, str]] = {}
    pieces: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for part, replicated in snapshot.tensors.items():
            held = {name: shard for name, shard in snapshot.shards.get(part, {}).items() if shard.part is not None}
            if rank == 0:
                held |= {name: Shard(tuple(t.shape), (0,) * t.ndim, t) for name, t in replicated.items()}
            file = f"{part}-{rank:05d}-of-{world_size:05d}.safetensors"
            values = {name: shard.part for name, shard in held.items() if shard.part is not None}
            if values:
                files[file] = write_tensors(folder / file, values)
            pieces[part] = {
                name: {
                    "file": file,
                    "dtype": dtype_name(values[name].dtype),
                    "whole": list(shard.shape),
                    "offsets": list(shard.offsets),
                    "shape": list(values[name].shape),
                    "sum": sum_of(shard),
                }
                for name, shard in held.items()
            }
    except OSError as error:
        return WrittenShards(problem=error.strerror or str(error))
    except CheckpointError as error:
        return WrittenShards(problem=str(error))
    return WrittenShards(files, pieces)


def digest_of_written(receipts: Sequence[WrittenShards]) -> str:
    """Return the digest of the state that the ranks have written together."""
    sums: dict[str, TensorSum] = {}
    for receipt in receipts:
        for part, pieces in receipt.pieces.items():
            for name, piece in pieces.items():
                before = sums.get(f"{part}/{name}", TensorSum(piece["dtype"], tuple(piece["whole"]), 0))
                sums[f"{part}/{name}"] = before._replace(sum=(before.sum + piece["sum"]) % 2**64)
    return digest_of({name: total for name, total in sums.items() if is_state(name)})


def index_of(receipts: Sequence[WrittenShards], folder: Path) -> dict[str, Any]:
    """Return the content of ``shards.json``.

    Raises:
        CheckpointError: a rank could not write, rank 0 does not see its file, or the shards do not cover a tensor.
    """
    index: dict[str, dict[str, Any]] = {}
    for rank, receipt in enumerate(receipts):
        if receipt.problem is not None:
            raise CheckpointError(f"rank {rank} could not write its part: {receipt.problem}")
        for file, (size, _) in receipt.files.items():
            if not (folder / file).is_file() or (folder / file).stat().st_size != size:
                raise CheckpointError(
                    f"rank {rank} wrote {file}, which rank 0 does not see in {folder}: the run folder must be on a file "
                    "system that all hosts share"
                )
        for part, pieces in receipt.pieces.items():
            for name, piece in pieces.items():
                whole = {"dtype": piece["dtype"], "shape": piece["whole"]}
                entry = index.setdefault(part, {}).setdefault(name, {**whole, "pieces": []})
                entry["pieces"].append({key: piece[key] for key in ("file", "offsets", "shape")})
    for entries in index.values():
        for name, entry in entries.items():
            written = sum(math.prod(piece["shape"]) for piece in entry["pieces"])
            if written != math.prod(entry["shape"]):
                raise CheckpointError(f"{name}: the ranks wrote {written} of {math.prod(entry['shape'])} values")
    return index


def tensors_on_disk(checkpoint: Path, part: str) -> dict[str, TensorOnDisk]:
    """Return the tensors of a verified checkpoint, without reading their values.

    Args:
        part: ``model`` or ``training``.

    Raises:
        OSError: a file was removed.
    """
    if (checkpoint / INDEX).is_file():
        entries = json_files.read(checkpoint / INDEX).get(part, {})
        return {name: _indexed(checkpoint, name, entry) for name, entry in entries.items()}
    path, tensors = checkpoint / f"{part}.safetensors", {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            view = file.get_slice(name)
            shape = tuple(view.get_shape())
            dtype = dtype_called(view.get_dtype())
            tensors[name] = TensorOnDisk(shape, dtype, [FileSlice(path, name, (0,) * len(shape), shape)])
    return tensors


def _indexed(checkpoint: Path, name: str, entry: Mapping[str, Any]) -> TensorOnDisk:
    """Return a tensor as the index describes it.

    Raises:
        ValueError: its pieces exceed it or do not cover it, so that reading it would return uninitialised memory.
    """
    shape, pieces = entry["shape"], []
    for piece in entry["pieces"]:
        box = list(zip(piece["offsets"], piece["shape"], shape, strict=True))
        if not all(type(n) is int and n >= 0 for sizes in box for n in sizes) or any(a + b > c for a, b, c in box):
            raise ValueError(f"a piece of {name} exceeds the tensor")
        if Path(piece["file"]).name != piece["file"]:
            raise ValueError(f"{name} refers to {piece['file']!r}, which is not a file of the checkpoint")
        pieces.append(FileSlice(checkpoint / piece["file"], name, tuple(piece["offsets"]), tuple(piece["shape"])))
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        raise ValueError(f"the pieces of {name} do not cover the tensor")
    return TensorOnDisk(shape, dtype_called(entry["dtype"]), pieces)
