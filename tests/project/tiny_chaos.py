"""A user's project for ``tests/chaos``: figures that tell which samples made up a step, and faults at a chosen byte or moment.

The faults are told by ``fault.json`` beside the run's YAML, read when this module is imported, which is before the run folder
is opened; without that file nothing is changed. What is counted is what reaches the operating system from one rank.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from runtime.checkpoints.run_lock import RunLock
from runtime.objective import Loss, Objective

INFINITE = 0.5344699239871201  # what sample 17 draws in the third epoch
_ACTS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


class Points(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Points with a number of 40 bits each: sums of these, exact in float64, tell samples lost or repeated.

    Args:
        pause_seconds: taken for each sample, so that a run lasts long enough to be hit.
    """

    def __init__(
        self, split: str = "train", size: int = 102, pause_seconds: float = 0.0, dtype: str = "float64"
    ) -> None:
        generator = torch.Generator().manual_seed(len(split))
        inputs = torch.randn(size, 8, generator=generator, dtype=torch.float64)
        self.target = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.3).long()
        self.inputs = inputs.to(getattr(torch, dtype))
        self.pause_seconds = pause_seconds

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(self.pause_seconds)
        number = ((index + 1) * 0x9E3779B97F4A7C15 % 2**64) >> 24
        return self.inputs[index], self.target[index], torch.tensor(float(number), dtype=torch.float64)


class Stream(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """The same points one after the other, with a state. Without a state that was loaded it begins at the beginning."""

    def __init__(self, **args: Any) -> None:
        self.points = Points(**args)
        self.start = self.place = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        self.place, self.start = self.start, 0
        while self.place < len(self.points):
            self.place += 1
            yield self.points[self.place - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["place"]


class Named(Objective):
    """Cross entropy; the part ``numbers`` is the sum of the samples' numbers."""

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Loss:
        inputs, target, numbers = batch
        if not model.training:
            for moment in _moments:
                moment.tick()
        return Loss(F.cross_entropy(model(inputs), target, reduction="sum"), {"numbers": numbers.sum()})


def add_noise(sample: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    inputs = sample[0] + 0.1 * torch.randn_like(sample[0])
    return inputs * (torch.inf if random.random() == INFINITE else 1.0), *sample[1:]


class Fault:
    """Counts bytes or acts of this process within a folder, and strikes at the n-th.

    Args:
        do: ``die`` by SIGKILL, ``fail`` with an error, ``lose power`` (die, with what was not synced), or ``count``.
        unit: ``byte`` or ``act``.
        number: which one.
        within: the folder.
        told: a file outside of it that is written when it strikes.
        times: how often to fail.
        error: its number.
        seed: for what a loss of power takes.
    """

    def __init__(
        self, *, do: str, unit: str, number: int, within: str, told: str, times: int = 1, error: int = 5, seed: int = 0
    ) -> None:
        self.do, self.unit, self.number, self.times, self.error = do, unit, number, times, error
        self.within, self.told = Path(within), Path(told)
        self.counts = {"byte": 0, "act": 0}
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._durable: dict[tuple[int, int], int] = {}  # size of each file, by inode and time of the last change
        self._entries: dict[int, set[str]] = {}  # names in each folder, by inode
        self._promised: list[str] = []  # checkpoints that were there when the next one got its name
        self._renamed: list[tuple[Path, Path, bytes | None]] = []  # not yet durable: from, to, what was there before
        for folder, folders, names in os.walk(self.within):
            self._synced(Path(folder).stat(), {*folders, *names})
            for name in names:
                self._synced((Path(folder) / name).stat())
        self._os = {name: getattr(os, name) for name in _ACTS}

    def install(self) -> None:
        for name in _ACTS:
            setattr(os, name, self._watched(name))
        opened = io.open

        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and self._concerns(file):
                return self._opened(file, mode)
            return opened(file, mode, *args, **kwargs)

        io.open = opening  # what pathlib calls

    def act(self) -> None:
        """Count one act that is about to happen."""
        with self._lock:
            self.counts["act"] += 1
            if self.unit == "act" and self.counts["act"] >= self.number:
                self._strike()

    def write(self, data: Any, write: Callable[[Any], int]) -> int:
        with self._lock:
            size = memoryview(data).nbytes
            before, self.counts["byte"] = self.counts["byte"], self.counts["byte"] + size
            if self.unit == "byte" and self.counts["byte"] >= self.number and self.do != "count" and self.times:
                if self.number > before:
                    write(memoryview(data).cast("B")[: self.number - before])
                self._strike()
            return write(data)

    def _strike(self) -> None:
        if self.do != "count" and self.times:
            self.told.write_text(json.dumps(sorted(self._promised)))
        if self.do in ("die", "lose power"):
            do, self.do = self.do, "count"  # what a loss of power changes is no act of the run's
            if do == "lose power":
                self._lose_power()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # for the signal to arrive
        if self.do == "fail" and self.times:
            self.times -= 1
            raise OSError(self.error, os.strerror(self.error))

    def _watched(self, name: str) -> Callable[..., Any]:
        original = self._os[name]

        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._concerns(first, kwargs.get("dir_fd")):
                return original(first, *args, **kwargs)
            with self._lock:
                self.act()
                return self._note(name, original, first, *args, **kwargs)

        return call

    def _note(self, name: str, original: Callable[..., Any], first: Any, *args: Any, **kwargs: Any) -> Any:
        """Do it, and keep account of what a loss of power would undo."""
        if name in ("rename", "replace"):
            if ".partial-" in Path(first).name:  # a save waits for the one before, which is durable by then
                self._promised = [entry.name for entry in Path(first).parent.iterdir()]
            before = Path(args[0]).read_bytes() if Path(args[0]).is_file() else None
            original(first, *args, **kwargs)
            self._renamed.append((Path(first), Path(args[0]), before))
            return None
        if name in (
            "unlink",
            "rmdir",
        ):  # a journal keeps the order: what is removed from under a new name has that name
            inside = self._absolute(first, kwargs.get("dir_fd"))
            self._renamed = [entry for entry in self._renamed if not inside.is_relative_to(entry[1])]
        found = original(first, *args, **kwargs)
        if name == "fsync":
            path = Path(f"/proc/self/fd/{first}").readlink()
            self._synced(os.fstat(first), {entry.name for entry in path.iterdir()} if path.is_dir() else None)
            self._renamed = [entry for entry in self._renamed if entry[1].parent != path]
        return found

    def _synced(self, status: os.stat_result, names: set[str] | None = None) -> None:
        if names is None:
            self._durable[status.st_ino, status.st_mtime_ns] = status.st_size
        else:
            self._entries[status.st_ino] = names

    def _concerns(self, path: Any, dir_fd: int | None = None) -> bool:
        with suppress(OSError, TypeError):
            return self._absolute(path, dir_fd).is_relative_to(self.within)
        return False

    @staticmethod
    def _absolute(path: Any, dir_fd: int | None) -> Path:
        if isinstance(path, int):
            return Path(f"/proc/self/fd/{path}").readlink()
        return Path(path) if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / path

    def _opened(self, path: Any, mode: str) -> Any:
        self.act()
        fault = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return fault.write(data, super().write)

        raw = Raw(path, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    def _lose_power(self) -> None:
        """Undo some of the last renames, and take what was never synced, as a file system may after a loss of power."""
        keep = self._random.randint(0, len(self._renamed))
        for old, new, before in reversed(self._renamed[keep:]):
            if new.exists() and not old.exists():
                self._os["rename"](new, old)
                if before is not None:
                    new.write_bytes(before)
        renamed = {new for _, new, _ in self._renamed}  # the old name or the new one: a rename loses nothing
        for at, folders, names in os.walk(self.within, topdown=False):
            folder = Path(at)
            known = self._entries.get(folder.stat().st_ino, set())
            for path in (folder / name for name in sorted((*folders, *names))):
                status = path.stat()
                if path.name not in known and path not in renamed and self._random.random() < 0.5:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                elif path.is_file() and self._durable.get((status.st_ino, status.st_mtime_ns)) != status.st_size:
                    # What has been appended to keeps what was synced.
                    least = max(
                        (size for (inode, _), size in self._durable.items() if inode == status.st_ino), default=0
                    )
                    os.truncate(path, self._random.randint(min(least, status.st_size), status.st_size))


class Moment:
    """Kills this process at the n-th of its changes of phase, passes in evaluation and acts on files after an event.

    Args:
        after: ``start`` of the first step, the end of an ``epoch``, the begin of an ``evaluation`` or of a ``rollback``.
        occurrence: which of these events.
        number: which change, pass or act.
        told: a file that is written when it strikes.
    """

    def __init__(self, *, after: str, occurrence: int, number: int, told: str) -> None:
        self.after, self.events_left, self.ticks_left, self.told = after, occurrence, number, Path(told)

    def event(self, name: str) -> None:
        self.events_left -= name == self.after

    def tick(self) -> None:
        if self.events_left > 0:
            return
        self.ticks_left -= 1
        if self.ticks_left == 0:
            self.told.write_text("[]")
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        from runtime.checkpoints.run_folder import RunFolder
        from runtime.distributed.watchdog import CurrentPhase
        from runtime.training.averaged_evaluation import AveragedEvaluation
        from runtime.training.progress import Progress

        advance, enter = Progress.advance, CurrentPhase.enter
        evaluate, roll_back = AveragedEvaluation.evaluate, RunFolder.roll_back

        def entering(position: CurrentPhase, phase: str, step: int) -> None:
            enter(position, phase, step)
            if phase == "data":
                self.event("start")
            self.tick()

        def advancing(progress: Progress, window: Any) -> None:
            advance(progress, window)
            if window.epoch_ends:
                self.event("epoch")

        def evaluating(evaluation: AveragedEvaluation, *args: Any, **options: Any) -> Any:
            self.event("evaluation")
            return evaluate(evaluation, *args, **options)

        def rolling_back(folder: RunFolder, wanted: Any, **options: Any) -> Any:
            self.event("rollback")
            return roll_back(folder, wanted, **options)

        CurrentPhase.enter, Progress.advance = entering, advancing  # type: ignore[assignment, method-assign]
        AveragedEvaluation.evaluate = evaluating  # type: ignore[assignment, method-assign]
        RunFolder.roll_back = rolling_back  # type: ignore[assignment, method-assign]
        for name in ("rename", "replace", "fsync"):
            setattr(os, name, self._ticking(getattr(os, name)))
        _moments.append(self)

    def _ticking(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def ticking(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return act(*args, **kwargs)

        return ticking


_moments: list[Moment] = []


def _install(path: Path) -> None:
    plan = json.loads(path.read_text())
    defaults = RunLock.__init__.__kwdefaults__
    assert defaults is not None
    defaults["fence_seconds"] = plan["fence_seconds"]
    if "limit_bytes" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit_bytes"], resource.RLIM_INFINITY))
    rank = int(os.environ.get("RANK", "0"))
    if plan.get("moment") and plan["rank"] == rank:
        Moment(**plan["moment"]).install()
    if plan.get("fault") and plan["rank"] == rank:
        fault = Fault(**plan["fault"])
        fault.install()
        if fault.do == "count":
            import atexit

            atexit.register(lambda: path.with_name("counts.json").write_text(json.dumps(fault.counts)))


if Path(sys.argv[0]).name == "train.py" and Path(sys.argv[1]).with_name("fault.json").is_file():
    _install(Path(sys.argv[1]).with_name("fault.json"))
