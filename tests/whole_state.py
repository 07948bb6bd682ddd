"""Everything that a run has left behind, for comparing two runs that must be the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

_TIMINGS = ("time", "samples_per_second", "data_share", "slowest_rank", "slowest_rank_excess", "peak_memory_bytes")


def whole_state(run: Path, step: int) -> dict[str, Any]:
    """Return all of a step's checkpoint, all figures and all best results, as plain data that compares bit for bit.

    Left out are the times, the versions, and what names the folder.
    """
    (path,) = (run / "checkpoints").glob(f"step-{step:08d}*")
    tree = json.loads((path / "state.json").read_text())
    del (
        tree["training"]["made_by"],
        tree["training"]["identity"]["tracker_id"],
        tree["training"]["identity"]["configuration"],
    )
    tensors = {
        f"{file}/{name}": (str(value.dtype), value.shape, value.tobytes())
        for file in ("model", "training")
        for name, value in load_file(path / f"{file}.safetensors").items()
    }
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [
        {key: value for key, value in record.items() if key not in _TIMINGS}
        for record in records
        if record["event"] in ("train", "evaluation")
    ]
    best = run / "checkpoints" / "best.json"
    return {
        "tensors": tensors,
        "tree": tree,
        "figures": sorted(figures, key=lambda figure: (figure["step"], figure["event"])),
        "best": json.loads(best.read_text()) if best.exists() else None,
    }


def kept_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints that there are."""
    return sorted({int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")})
