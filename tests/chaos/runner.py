"""Runs campaigns and keeps the count."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.chaos.attacks import KINDS
from tests.chaos.campaign import Attack, Campaign, Reference
from tests.chaos.check import compared, final, records
from tests.chaos.nursery import Nursery
from tests.chaos.processes import descendants, processes
from tests.chaos.report import Row
from tests.chaos.setting import DISK_BYTES, SETTINGS, STEPS, BrokenPromiseError, Setting


class Runner:
    """Runs campaigns and keeps the count.

    Args:
        folder: for the runs' folders.
        real_share: of the starts, how many are true launches.
    """

    def __init__(self, folder: Path, *, seed: int, real_share: float, kinds: list[str], sizes: list[int]) -> None:
        self._folder, self._seed, self._real_share, self._kinds, self._sizes = folder, seed, real_share, kinds, sizes
        self._nursery = Nursery()
        self._references: dict[str, dict[int, Reference]] = {setting.name: {} for setting in SETTINGS}
        self.rows: dict[str, Row] = {kind: Row() for kind in kinds}
        self.remarks: Counter[str] = Counter()
        self.failures: list[str] = []
        self.struck = self.missed = 0

    def close(self) -> None:
        """End every process of ours that is left, and the nursery."""
        for process in descendants(processes(), os.getpid(), without=self._nursery.pid):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self._nursery.close()

    def make_references(self) -> None:
        """Run without interruption with each number of processes, and compare.

        Raises:
            BrokenPromiseError: they differ.
        """
        for setting in SETTINGS:
            made = {size: self._reference(setting, size) for size in self._sizes}
            self._references[setting.name] = made
            for reference in made.values() if setting.any_size else ():
                comparison = compared(made[self._sizes[0]].final, reference.final)
                if comparison.problems:
                    raise BrokenPromiseError(f"{setting.name}: " + "; ".join(comparison.problems[:12]))

    def _reference(self, setting: Setting, size: int) -> Reference:
        seed = f"reference {setting.name} {size}"
        campaign = self._campaign(self._folder / seed.replace(" ", "-"), setting, seed)
        campaign.plan({"do": "count", "unit": "act", "number": 0})
        start = campaign.start(size, "fork")
        campaign.settle(start)
        if start.code != 0:
            raise BrokenPromiseError(f"the uninterrupted run with {size} processes failed:\n{campaign.log.read_text()}")
        found = final(campaign.run, setting)
        if found.rollbacks != setting.rollbacks:
            raise BrokenPromiseError(
                f"the uninterrupted run has been rolled back {found.rollbacks} times: is no sample infinite?"
            )
        told = records(campaign.run)
        times = {record["event"]: record["time"] for record in told}
        return Reference(
            found,
            start_seconds=told[0]["time"] - start.began,
            step_seconds=(times["train"] - told[0]["time"]) / STEPS,
            counts=json.loads((campaign.folder / "counts.json").read_text()),
        )

    def run_campaign(self, number: int) -> None:
        """Attack one run until it is finished, and count what became of it."""
        chance = random.Random(f"{self._seed}/{number}")
        # Each kind gets its turn, whatever the seed; the others of a campaign are drawn.
        kinds = [self._kinds[number % len(self._kinds)], *chance.choices(self._kinds, k=chance.choice([0, 1, 1, 2, 3]))]
        chance.shuffle(kinds)
        if chance.random() < 0.6:  # later on there may be nothing left to attack
            kinds.sort(key=lambda kind: kind != self._kinds[number % len(self._kinds)])
        kinds.sort(key=lambda kind: kind != "rollback")  # which there is one of in a run
        setting = chance.choice(SETTINGS)
        one_size = chance.choice(self._sizes) if chance.random() < 0.5 or not setting.any_size else None
        folder = self._folder / f"campaign-{number}"
        campaign = self._campaign(folder, setting, f"{self._seed}/{number}")
        campaign.one_size = one_size
        try:
            with ExitStack() as stack:
                if "disk" in kinds and mounted(campaign.run):
                    stack.callback(unmount, campaign.run)
                for to_come, kind in reversed(list(enumerate(reversed(kinds)))):
                    campaign.attacks_to_come = to_come
                    self._attack(campaign, kind, one_size or chance.choice(self._sizes))
                    if STEPS in campaign.expected() and chance.random() < 0.8:
                        break  # there is little left to attack
                self._finish(campaign, one_size or chance.choice(self._sizes))
            shutil.rmtree(folder)
        except BrokenPromiseError as failure:
            self._fail(campaign, number, kinds, failure)

    def _campaign(self, folder: Path, setting: Setting, seed: str) -> Campaign:
        references = self._references[setting.name]
        return Campaign(folder, setting, random.Random(seed), self._nursery, references, self._real_share)

    def _attack(self, campaign: Campaign, kind: str, size: int) -> None:
        if campaign.attacks:
            campaign.attacks[-1].after = size
        attack = Attack(kind, size)
        campaign.attacks.append(attack)
        campaign.tell(f"attack: {KINDS[kind][0]}")
        began = time.monotonic()
        KINDS[kind][1](campaign, size)
        attack.seconds = time.monotonic() - began

    def _finish(self, campaign: Campaign, size: int) -> None:
        campaign.attacks[-1].after = size
        start = campaign.start(size)
        campaign.settle(start)
        if start.code != 0:
            raise BrokenPromiseError(f"the last start, which nothing disturbed, ended with code {start.code}")
        comparison = campaign.finish()
        aside = len(list((campaign.run / "checkpoints").glob("*.damaged-*")))
        for attack in campaign.attacks:
            row = self._row(attack)
            row.bitwise += comparison.bitwise
            row.close += not comparison.bitwise
            row.worst = max(row.worst, comparison.worst)
            if attack.kind in ("damage", "manifest"):
                row.aside, aside = row.aside + aside, 0
        self.remarks.update(campaign.remarks)

    def _row(self, attack: Attack) -> Row:
        row = self.rows[attack.kind]
        self.struck += attack.struck
        self.missed += not attack.struck
        row.attacks += attack.struck
        row.worlds[f"{attack.before}→{attack.after}"] += 1
        row.seconds += attack.seconds
        return row

    def _fail(self, campaign: Campaign, number: int, kinds: list[str], failure: BrokenPromiseError) -> None:
        for attack in campaign.attacks:
            self._row(attack).failed += 1
        self.failures.append(
            f"campaign {number} of seed {self._seed} ({campaign.setting.name}; {', '.join(kinds)}): {failure}\n"
            f"  again: python -m tests.chaos --seed {self._seed} --campaign {number}\n  its folder: {campaign.folder}\n"
            + "".join(f"    {line}\n" for line in campaign.log.read_text(errors="replace").splitlines())
        )


def mounted(folder: Path) -> bool:
    """Mount a disk of 1 MiB; return whether we may."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    try:
        return subprocess.run(line, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def unmount(folder: Path) -> None:
    """Take the disk away; what was on it stays in the folder."""
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()
    kept.rename(folder)
