"""What a run has left on disk, judged without Lockstep, and how far it is from another run."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from tests.chaos.setting import EVALUATED_EVERY, KEPT_BEST, STEPS, TOLERANCE, BrokenPromiseError, Setting

CHECKPOINT = re.compile(r"step-(\d{8,})(?:-attempt-(\d+))?(-epoch-.*|-evaluated)?")
ASIDE = re.compile(r"\.(partial|damaged)-[0-9a-f]+$")
_TIMINGS = ("time", "samples_per_second", "data_share", "slowest_rank", "slowest_rank_excess", "peak_memory_bytes")


def is_whole(path: Path) -> bool:
    """Tell whether a checkpoint's files are what its manifest says. Not Lockstep's own judgement."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = manifest["files"]
        return (
            manifest["version"] == 1
            and set(files) == {"model.safetensors", "training.safetensors", "state.json"}
            and all(
                hashlib.sha256((path / name).read_bytes()).hexdigest() == entry["sha256"]
                for name, entry in files.items()
            )
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def digests_of(path: Path) -> dict[str, str]:
    """Return the checksums of a checkpoint's files but for its manifest."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir() if f.name != "manifest.json"}


def checkpoints(run: Path) -> list[Path]:
    """Return what bears a checkpoint's final name, oldest first."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
    return sorted((p for p in found if not ASIDE.search(p.name)), key=lambda p: (*line_of(p.name), len(p.name)))


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name tells."""
    return int(path.name.split("-")[1])


def line_of(name: str) -> tuple[int, int]:
    """Return the step and the attempt that a checkpoint's name tells."""
    match = CHECKPOINT.fullmatch(name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def rollbacks(run: Path) -> list[dict[str, Any]]:
    """Return what the record of rollbacks tells."""
    try:
        return list(json.loads((run / "checkpoints" / "rollbacks.json").read_bytes())["rollbacks"])
    except FileNotFoundError:
        return []


def is_abandoned(run: Path, name: str) -> bool:
    """Tell whether a rollback went back before a checkpoint."""
    step, attempt = line_of(name)
    return any(attempt < r["attempt"] and step > r["target_step"] for r in rollbacks(run))


def records(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of ``metrics.jsonl``."""
    found = []
    with suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    found.append(record)
    return found


def figures_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all records of each step and of each evaluation, without times; there should be one."""
    figures: dict[str, list[dict[str, Any]]] = {}
    for record in records(run):
        if record.get("event") in ("train", "evaluation"):
            kept = {k: v for k, v in record.items() if k not in _TIMINGS}
            figures.setdefault(f"{record['event']} {record.get('step')}", []).append(kept)
    return figures


class Final(NamedTuple):
    """What a run has come to.

    Args:
        tensors: all of the last checkpoint, by file and name.
        tree: all else of the last checkpoint, but for what names the folder and the versions.
        figures: of each step, and of each evaluation.
        best: value, step and epoch of the best checkpoints, by metric.
        rollbacks: how often the run went back; more often than once only where it lost all its checkpoints.
    """

    tensors: dict[str, np.ndarray]
    tree: dict[str, Any]
    figures: dict[str, list[dict[str, Any]]]
    best: dict[str, Any]
    rollbacks: int


def final(run: Path, setting: Setting) -> Final:
    """Read what a finished run has left.

    Raises:
        BrokenPromiseError: it is not whole, or not the end.
    """
    newest = checkpoints(run)[-1]
    if step_of(newest) != STEPS or not is_whole(newest):
        raise BrokenPromiseError(f"the last checkpoint is {newest.name}, whole: {is_whole(newest)}")
    tensors = {
        f"{file}/{name}": value
        for file in ("model", "training")
        for name, value in load_file(newest / f"{file}.safetensors").items()
    }
    tree = json.loads((newest / "state.json").read_text())
    fingerprint = tree["training"]["identity"]
    del tree["training"]["made_by"], fingerprint["tracker_id"], fingerprint["configuration"]
    # A run that lost all its checkpoints meets the infinite sample again.
    del tree["attempt"], tree["training"]["progress"]["attempt"]
    tree["training"]["meter"] = _summed(tree["training"]["meter"])
    skipped = tree["training"]["progress"]["skipped_batches"]
    tree["training"]["progress"]["skipped_batches"] = sorted({repr(batch) for batch in skipped})
    if len(tree["training"]["progress"]["skipped_batches"]) != setting.rollbacks:
        raise BrokenPromiseError(f"skipped were {skipped}, not the one batch that is infinite")
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    for entry in (entry for entries in best.values() for entry in entries):
        if not is_whole(run / "checkpoints" / entry.pop("checkpoint")):
            raise BrokenPromiseError("best.json names a checkpoint that is not whole")
    return Final(tensors, tree, figures_of(run), best, len(rollbacks(run)))


def _summed(meter: dict[str, Any]) -> dict[str, Any]:
    """Return the figures since the last report with each sum as one number."""
    return {**meter, "sums": {name: math.fsum(parts) for name, parts in meter["sums"].items()}}


def best_so_far(found: Final, setting: Setting) -> set[int]:
    """Return the steps of the evaluations that were among the best when they were made, and so had to be saved."""
    sign = 1.0 if setting.best == "min" else -1.0
    steps, losses = set(), []
    for step in range(EVALUATED_EVERY, STEPS + 1, EVALUATED_EVERY):
        losses.append((sign * found.figures[f"evaluation {step}"][0]["loss"], step))
        if step in {number for _, number in sorted(losses)[:KEPT_BEST]}:
            steps.add(step)
    return steps


@dataclass
class Comparison:
    """How far one run is from another."""

    bitwise: bool = True
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)

    def compare(self, where: str, wanted: Any, got: Any) -> None:
        """Compare two trees."""
        if isinstance(wanted, dict) and isinstance(got, dict):
            if wanted.keys() != got.keys():
                self.problems.append(f"{where}: {sorted(set(wanted) ^ set(got))} only in one of them")
            for key in wanted.keys() & got.keys():
                self.compare(f"{where}/{key}", wanted[key], got[key])
        elif isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
            for number, (one, other) in enumerate(zip(wanted, got, strict=True)):
                self.compare(f"{where}/{number}", one, other)
        elif isinstance(wanted, np.ndarray) and isinstance(got, np.ndarray) and wanted.shape == got.shape:
            scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-12)
            self._note(where, wanted.tobytes() == got.tobytes(), float(np.abs(wanted - got).max(initial=0.0)) / scale)
        elif isinstance(wanted, float) and isinstance(got, float):
            self._note(where, wanted == got, abs(wanted - got) / max(abs(wanted), 1e-12))
        elif wanted != got:
            self.problems.append(f"{where}: {_short(wanted)} has become {_short(got)}")

    def _note(self, where: str, same: bool, difference: float) -> None:
        self.bitwise &= same
        self.worst = max(self.worst, difference if math.isfinite(difference) else math.inf)
        if not difference <= TOLERANCE:
            self.problems.append(f"{where} differs by {difference:.1e}")


def compared(wanted: Final, got: Final) -> Comparison:
    """Compare all that two runs have come to, but for how often they were rolled back."""
    comparison = Comparison()
    comparison.compare("", wanted._replace(rollbacks=0)._asdict(), got._replace(rollbacks=0)._asdict())
    return comparison


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
