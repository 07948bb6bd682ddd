"""One run, attacked and started again until it is finished."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.chaos.check import (
    ASIDE,
    CHECKPOINT,
    Comparison,
    Final,
    best_so_far,
    checkpoints,
    compared,
    digests_of,
    figures_of,
    final,
    is_abandoned,
    is_whole,
    records,
    rollbacks,
    step_of,
)
from tests.chaos.nursery import Nursery
from tests.chaos.setting import (
    FENCE_SECONDS,
    GONE_SECONDS,
    SAVED_EVERY,
    STEPS,
    BrokenPromiseError,
    Setting,
    configuration,
)
from tests.chaos.start import Start

_CRASH = re.compile(r"Fatal Python error: (?!init_)|terminate called|Segmentation fault|core dumped")
_STUBBORN = re.compile(r"had to be killed|forcefully exiting via")  # our launcher's words, and torchrun's


_STARTS = "start"
Strike = Callable[["Campaign", int], None]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Args:
        start_seconds: until its first record.
        step_seconds: of a step, evaluation and saves included.
        counts: bytes written and acts done in its folder by rank 0.
    """

    final: Final
    start_seconds: float
    step_seconds: float
    counts: dict[str, int]


@dataclass
class Attack:
    """One attack, as the table counts it."""

    kind: str
    before: int
    after: int = 0
    seconds: float = 0.0
    struck: bool = True


class Campaign:
    """One run, from its first start to its comparison.

    Args:
        setting: which kind of run.
        chance: decides everything that is not the machine's own timing.
        references: by world size; empty while they are made.
        real_share: of the starts, how many are true launches.
    """

    def __init__(
        self,
        folder: Path,
        setting: Setting,
        chance: random.Random,
        nursery: Nursery,
        references: dict[int, Reference],
        real_share: float,
    ) -> None:
        self.folder, self.run, self.setting = folder, folder / "run", setting
        self.chance = chance
        self.references = references
        self.attacks: list[Attack] = []
        self.attacks_to_come = 0
        self.one_size: int | None = None  # of all starts, if they are to have one
        self.sizes: list[int] = []
        self.ignored: set[str] = set()  # figures whose lines we have damaged
        self.lossy = False  # whether lines of metrics.jsonl may be missing
        self.remarks: list[str] = []
        self._nursery = nursery
        self._real_share = real_share
        self._acceptable = {0}
        self._damaged: set[str] = set()
        self._saved_on_leaving: set[str] = set()
        self._lowered_early = False  # what a rollback had gone back to was lost: the rate is lower from further back on
        self._digests: dict[str, dict[str, str]] = {}
        folder.mkdir(parents=True)
        num_workers = int(bool(references) and chance.random() < 0.2)
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder, setting, num_workers=num_workers)))
        self.log = folder / "log.txt"
        self.plan()

    def tell(self, text: str) -> None:
        """Write to the log, between what the processes say."""
        with self.log.open("a") as log:
            log.write(f"chaos {time.strftime('%H:%M:%S')}: {text}\n")

    def plan(self, fault: dict[str, Any] | None = None, **more: Any) -> None:
        """Choose the fault of the next starts; none without arguments."""
        (self.folder / "struck").unlink(missing_ok=True)
        if fault is not None:
            fault = {"within": str(self.run), "told": str(self.folder / "struck"), **fault}
        plan = {"fence_seconds": FENCE_SECONDS, "rank": 0, "fault": fault, **more}
        (self.folder / "fault.json").write_text(json.dumps(plan))

    def start(self, size: int, how: str | None = None) -> Start:
        """Start the run, and note what it has to go on from."""
        if how is None:
            real = self.chance.random() < self._real_share
            how = self.chance.choice(["lockstep", "accelerate"]) if real else "fork"
        self.sizes.append(size)
        self._acceptable = self.expected()
        gone_back_to = max((r["target_step"] for r in rollbacks(self.run)), default=0)
        self._lowered_early |= self.setting.lowers_rate and min(self._acceptable) < gone_back_to
        self.tell(f"{_STARTS} {how} with {size}; to go on from step {sorted(self._acceptable)}")
        return Start(how, size, self.folder / "config.yaml", self.log, self._nursery)

    def settle(self, start: Start, *, seconds: float = GONE_SECONDS, alone: bool = True) -> None:
        """Wait until a start has gone, and look at what it has left.

        Args:
            alone: there was no other start at the time, which the records could be of.

        Raises:
            BrokenPromiseError: it hangs, has crashed, has gone on from a wrong checkpoint, or has left one that is not whole.
        """
        gone = start.wait(seconds)
        if not gone:
            self.tell(f"still there: {start.alive()}")
            start.abort()
            raise BrokenPromiseError(
                f"processes of a start ({start.how}, {start.world_size}) hang {seconds:g} s after the attack"
            )
        said = self.log.read_text(errors="replace")
        if crash := _CRASH.search(said):
            raise BrokenPromiseError(f"a process crashed: {crash[0]}")
        if "importing 'tiny_chaos' raised" in said:
            raise BrokenPromiseError("an attack does not fit the code any more: its start did not even begin")
        if _STUBBORN.search(said):
            raise BrokenPromiseError("ranks that were asked to leave did not, and their launcher had to kill them")
        began = self.begun(start)
        self.tell(f"gone, code {start.code}; it had begun at step {began.get('step') if began else None}")
        if began is not None and alone and began["step"] not in self._acceptable:
            raise BrokenPromiseError(f"a start went on from step {began['step']}, not {sorted(self._acceptable)}")
        if began is not None and alone and began["world_size"] != start.world_size:
            raise BrokenPromiseError(f"{began['world_size']} processes trained, not {start.world_size}")
        for path in checkpoints(self.run):
            if path.name not in self._damaged and not is_whole(path):
                raise BrokenPromiseError(f"{path.name} has its final name and is not whole")
        self._check_reasons(alone=alone)

    def _check_reasons(self, *, alone: bool) -> None:
        """Check that each checkpoint was due, of one of the best results, or made when a start left.

        Raises:
            BrokenPromiseError: it was not: a start has forgotten which results were the best.
        """
        if not self.references:
            return
        best = set.union(*(best_so_far(reference.final, self.setting) for reference in self.references.values()))
        last = max((r["step"] for r in records(self.run) if r.get("event") == "train"), default=0)
        for path in checkpoints(self.run):
            step = step_of(path)
            # A start that makes up for an evaluation that was cut short saves its step once more, with the results.
            on_leaving = path.name.removesuffix("-evaluated") in self._saved_on_leaving
            if step % SAVED_EVERY == 0 or step in best or step == STEPS or on_leaving:
                continue
            if alone and not self.lossy and step != last:
                raise BrokenPromiseError(f"{path.name} was saved, which was neither due nor of one of the best results")
            self._saved_on_leaving.add(path.name)

    def begun(self, start: Start) -> dict[str, Any] | None:
        """Return the record that a start makes when training begins."""
        found = [r for r in records(self.run) if r.get("event") == "start" and r.get("time", 0) >= start.began - 0.001]
        return found[-1] if found else None

    def wait_for_moment(self, start: Start) -> bool:
        """Wait until a random moment of a start's life; return whether training had begun by then."""
        reference = self.references[start.world_size]
        if self.chance.random() < 0.2:
            real_seconds = 3.0 + 2.0 * start.world_size  # importing torch, on two cores
            time.sleep(self.chance.uniform(0.0, reference.start_seconds if start.how == "fork" else real_seconds))
            return self.begun(start) is not None
        part = self.chance.random()
        deadline = time.monotonic() + GONE_SECONDS
        while (began := self.begun(start)) is None and time.monotonic() < deadline:
            if not start.alive():
                return False
            time.sleep(0.005)
        if began is None:
            self.settle(start, seconds=0.0)
            return False
        later = 1.0 + 0.5 * self.attacks_to_come  # which need something to be left to attack
        time.sleep(part * (STEPS - began["step"] + 1) * reference.step_seconds / later)
        return True

    def kill(self, pids: list[int], number: int) -> None:
        """Send a signal to processes of ours, or to a group if negative."""
        self.tell(f"{signal.Signals(number).name} to {pids}")
        if self.attacks:
            self.attacks[-1].struck = bool(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def ranks(self, start: Start) -> list[int]:
        """Return a start's ranks; waits until there are some, or all has ended."""
        while not (found := start.ranks()) and start.alive():
            time.sleep(0.005)
        return found

    def check_polite(self, start: Start) -> None:
        """Check that a start that was asked to stop, or has finished, saved all that it had done.

        Raises:
            BrokenPromiseError: steps were lost.
        """
        outcome = self.run / "outcome.json"
        if not outcome.is_file() or outcome.stat().st_mtime < start.began:
            raise BrokenPromiseError("asked to stop while training, it left no outcome")
        said = json.loads(outcome.read_text())
        told = [r["step"] for r in records(self.run) if r.get("event") == "train"]
        saved = max(self.expected())
        if said["outcome"] not in ("stopped", "finished") or (not self.lossy and saved != max(told, default=saved)):
            raise BrokenPromiseError(
                f"asked to stop while training: {said}; saved step {saved}, done {max(told, default=None)}"
            )

    def check_named(self, rank: int, start: Start) -> None:
        """Check that the others told, and rank 0 left word, which rank was lost.

        Raises:
            BrokenPromiseError: they did not.
        """
        said = self.log.read_text(errors="replace").rpartition(f"{_STARTS} {start.how} ")[2]
        names = [f"lockstep: rank {rank} (host "] + ["which rank 0 or its launch agent hosts, is silent for"] * (
            rank == 0
        )
        if not any(name in said for name in names):
            raise BrokenPromiseError(f"rank {rank} was stopped, and nobody named it")
        if rank != 0:
            outcome = json.loads((self.run / "outcome.json").read_text())
            if outcome["outcome"] != "failed" or f"rank {rank} (host " not in outcome["message"]:
                raise BrokenPromiseError(f"rank {rank} was stopped, and outcome.json says {outcome}")

    def look_for_promised(self) -> None:
        """Look whether the checkpoints are there that a later save found when the power was lost.

        Raises:
            BrokenPromiseError: the newest of them is not.
        """
        struck = self.folder / "struck"
        names = json.loads(struck.read_text()) if struck.is_file() else []
        finished = [n for n in names if CHECKPOINT.fullmatch(n) and not ASIDE.search(n)]
        steps = [step_of(Path(n)) for n in finished if not is_abandoned(self.run, n)]
        if max(steps, default=0) > max(self.expected()):
            raise BrokenPromiseError(
                f"the checkpoint of step {max(steps)} had been saved and is lost with the power; on disk is {self.expected()}"
            )

    def newest_first(self) -> list[Path]:
        """Return the checkpoints that the next start will look at, in its order."""
        return [path for path in reversed(checkpoints(self.run)) if not is_abandoned(self.run, path.name)]

    def damage(self, path: Path) -> None:
        """Cut a file short, flip a bit in it, overwrite a part with zeros, or remove it."""
        content = bytearray(path.read_bytes())
        first = max(0, len(content) - 1000) if path.name == "metrics.jsonl" else 0
        at = self.chance.randrange(first, len(content)) if content else 0
        ways = ["cut", "flip", "zero", *(["remove"] if path.name != "metrics.jsonl" else [])]
        way = self.chance.choice(ways)
        self.tell(f"damage {path}: {way} at {at} of {len(content)}")
        if path.parent.parent.name == "checkpoints":
            self._damaged.add(path.parent.name)
        before = figures_of(self.run)
        if way == "remove":
            path.unlink()
            return
        if way == "cut":
            del content[at:]
        elif way == "flip" and content:
            content[at] ^= 1 << self.chance.randrange(8)
        else:
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        path.write_bytes(content)
        after = figures_of(self.run)
        self.ignored |= {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}

    def finish(self) -> Comparison:
        """Compare what has come out with the uninterrupted run.

        Raises:
            BrokenPromiseError: it is something else.
        """
        found = final(self.run, self.setting)
        same = len(set(self.sizes)) == 1
        wanted = self.references[self.sizes[0] if same else min(self.references)].final
        figures = {key: value for key, value in wanted.figures.items() if key not in self.ignored}
        got = {key: value for key, value in found.figures.items() if key not in self.ignored}
        if self.lossy:
            figures = {key: value for key, value in figures.items() if key in got}
            if len(figures) < len(wanted.figures):
                self.remarks.append(f"{len(wanted.figures) - len(figures)} lines of metrics.jsonl lost in an attack")
        if self._lowered_early or (self.setting.lowers_rate and found.rollbacks != wanted.rollbacks):
            self.remarks.append(
                "lost what a rollback had gone back to, so its lower rate began elsewhere: not compared"
            )
            return Comparison()
        comparison = compared(wanted._replace(figures=figures), found._replace(figures=got))
        if same and not comparison.bitwise:
            comparison.problems.append(f"not bitwise equal with {self.sizes[0]} processes throughout")
        if comparison.problems:
            raise BrokenPromiseError("another result: " + "; ".join(comparison.problems[:12]))
        return comparison

    def expected(self) -> set[int]:
        """Return the steps that the next start may go on from: the newest whole checkpoint's, and no other.

        Where only a manifest is damaged, in a way that need not be noticed, either is right.
        """
        steps: set[int] = set()
        for path in self.newest_first():
            if is_whole(path):
                return steps | {step_of(path)}
            if self._contents_whole(path):
                steps.add(step_of(path))
        return steps | {0}

    def _contents_whole(self, path: Path) -> bool:
        digests = self._digests.get(path.name)
        return digests is not None and digests == digests_of(path)

    def remember(self, path: Path) -> None:
        """Remember what a checkpoint holds that is about to be damaged."""
        self._digests[path.name] = digests_of(path)
