"""The attacks: each one starts the run, strikes, and sees that all has gone."""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from typing import Any

from tests.chaos.campaign import Campaign, Strike
from tests.chaos.check import is_whole
from tests.chaos.setting import NOTICED_SECONDS, STEPS, BrokenPromiseError


def signal_one_rank(number: int) -> Strike:
    """Send a signal to one rank."""

    def strike(campaign: Campaign, size: int) -> None:
        start = campaign.start(size)
        training = campaign.wait_for_moment(start)
        ranks = campaign.ranks(start)
        campaign.kill(ranks and [campaign.chance.choice(ranks)], number)
        campaign.settle(start)
        if training and number != signal.SIGKILL:
            campaign.check_polite(start)

    return strike


def signal_launcher(number: int, *, group: bool = False) -> Strike:
    """Send a signal to the launcher, or to its process group. Ranks that it leaves behind have to end by themselves."""

    def strike(campaign: Campaign, size: int) -> None:
        start = campaign.start(size)
        training = campaign.wait_for_moment(start)
        launcher = [-start.launcher if group else start.launcher]
        campaign.kill(launcher if start.launcher in [p.pid for p in start.alive()] else [], number)
        campaign.settle(start)
        if training:
            campaign.check_polite(start)

    return strike


def kill_all(campaign: Campaign, size: int) -> None:
    """Kill the launcher and all ranks, as the loss of a machine does."""
    start = campaign.start(size)
    campaign.wait_for_moment(start)
    campaign.kill([p.pid for p in start.alive()], signal.SIGKILL)
    struck = campaign.attacks[-1].struck
    while left := [p.pid for p in start.alive()]:  # the launcher was starting them just then
        campaign.kill(left, signal.SIGKILL)
    campaign.attacks[-1].struck = struck
    campaign.settle(start)


def kill_some(campaign: Campaign, size: int) -> None:
    """Kill any subset of the processes."""
    start = campaign.start(size)
    campaign.wait_for_moment(start)
    alive = [p.pid for p in start.alive()]
    campaign.kill(alive and campaign.chance.sample(alive, campaign.chance.randint(1, len(alive))), signal.SIGKILL)
    campaign.settle(start)


def kill_worker(campaign: Campaign, size: int) -> None:
    """Kill a rank's loader worker, or the rank where there is none."""
    start = campaign.start(size)
    campaign.wait_for_moment(start)
    ranks = campaign.ranks(start)
    workers = [p.pid for p in start.alive() if p.parent in ranks]
    campaign.kill([campaign.chance.choice(workers or ranks)] if ranks else [], signal.SIGKILL)
    campaign.settle(start)


def kill_launcher_and_restart(campaign: Campaign, size: int) -> None:
    """Kill the launcher and run the command again while the ranks go on: one of the two has to give way."""
    first = campaign.start(size, "fork")
    campaign.wait_for_moment(first)
    campaign.kill([first.launcher] if first.launcher in [p.pid for p in first.alive()] else [], signal.SIGKILL)
    second = campaign.start(campaign.one_size or campaign.chance.choice(sorted(campaign.references)), "fork")
    campaign.settle(second, alone=False)


def stop_file(campaign: Campaign, size: int) -> None:
    """Make a STOP file."""
    start = campaign.start(size)
    training = campaign.wait_for_moment(start)
    campaign.attacks[-1].struck = bool(start.alive()) and campaign.run.is_dir()
    if campaign.attacks[-1].struck:
        (campaign.run / "STOP").touch()
        campaign.tell("STOP")
    campaign.settle(start)
    if training:
        campaign.check_polite(start)


def fault(do: str, unit: str, **more: Any) -> Strike:
    """Let rank 0 strike itself at a byte that it writes or before an act on its folder."""

    def strike(campaign: Campaign, size: int) -> None:
        reference = campaign.references[size]
        left = 1.0 - max(campaign.expected()) / STEPS
        most = max(30, round(reference.counts[unit] * left))
        if campaign.chance.random() < 0.2:
            most = 30 if unit == "act" else 3000  # while it starts
        chosen = {
            "do": do, "unit": unit, "number": campaign.chance.randint(1, most), "seed": campaign.chance.getrandbits(32),
        }  # fmt: skip
        if do == "fail":
            chosen["times"] = campaign.chance.choice([1, 1 << 30])
        campaign.plan({**chosen, **more})
        campaign.tell(f"{chosen}")
        campaign.lossy |= do != "die"
        start = campaign.start(size)
        campaign.settle(start)
        campaign.attacks[-1].struck = (campaign.folder / "struck").is_file()
        if do == "lose power":
            campaign.look_for_promised()
        campaign.plan()

    return strike


def moment(after: str, *, most: int, occurrences: int = 1) -> Strike:
    """Let a rank kill itself shortly after an event: at one of its next changes of phase, passes or acts."""

    def strike(campaign: Campaign, size: int) -> None:
        chosen = {
            "after": after,
            "occurrence": campaign.chance.randint(1, occurrences),
            "number": campaign.chance.randint(1, most),
            "told": str(campaign.folder / "struck"),
        }
        rank = campaign.chance.randrange(size)
        campaign.plan(rank=rank, moment=chosen)
        campaign.tell(f"rank {rank}: {chosen}")
        campaign.settle(campaign.start(size))
        campaign.attacks[-1].struck = (campaign.folder / "struck").is_file()
        campaign.plan()

    return strike


def stop_one_rank(campaign: Campaign, size: int) -> None:
    """Stop one rank: the others have to leave and name it. It is killed then, or wakes up and has to leave by itself.

    Alone, it sleeps for a second and goes on.
    """
    start = campaign.start(size)
    training = campaign.wait_for_moment(start)
    ranks = campaign.ranks(start)
    complete = training and len(ranks) == size
    number = campaign.chance.randrange(len(ranks)) if ranks else 0
    campaign.kill(ranks[number : number + 1], signal.SIGSTOP)
    others = set(ranks) - set(ranks[number : number + 1])
    deadline = time.monotonic() + (NOTICED_SECONDS if others else 1.0)
    while (left := others & {p.pid for p in start.alive()}) or (not others and time.monotonic() < deadline):
        if left and time.monotonic() > deadline:
            campaign.tell(f"still there: {left}")
            start.abort()
            raise BrokenPromiseError(
                f"rank {number} was stopped, and {NOTICED_SECONDS:g} s later others are still there"
            )
        time.sleep(0.05)
    wakes = not others or campaign.chance.random() < 0.5
    campaign.kill(ranks[number : number + 1], signal.SIGCONT if wakes else signal.SIGKILL)
    campaign.settle(start)
    if complete and others and STEPS not in campaign.expected():
        campaign.check_named(number, start)


def full_disk(campaign: Campaign, size: int) -> None:
    """Fill the disk while the run goes on, but for a few pages; without a disk of its own, limit the size of its files."""
    free = campaign.chance.choice([0, 1, 2, 3, 4, 6, 10])
    campaign.lossy = True
    if not campaign.run.is_mount():
        campaign.plan(limit_bytes=campaign.chance.randint(1, 12_000))
        campaign.settle(campaign.start(size))
        campaign.plan()
        return
    start = campaign.start(size)
    campaign.wait_for_moment(start)
    ballast = campaign.run / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with suppress(OSError):
        os.truncate(ballast, max(0, ballast.stat().st_size - 4096 * free))
    campaign.tell(f"the disk is full but for {free} pages")
    campaign.attacks[-1].struck = bool(start.alive())
    campaign.settle(start)
    ballast.unlink()


def damage(*patterns: str) -> Strike:
    """Kill everything, and damage a file."""

    def strike(campaign: Campaign, size: int) -> None:
        kill_all(campaign, size)
        newest = [path for path in campaign.newest_first() if is_whole(path)]
        places = newest[: campaign.chance.choice([1, 1, 2])] if "checkpoint" in patterns else [campaign.run]
        names = ["model.safetensors", "training.safetensors", "state.json"] if "checkpoint" in patterns else patterns
        found = [[path for name in names for path in place.glob(name)] for place in places]
        campaign.attacks[-1].struck = any(found)
        for paths in filter(None, found):
            campaign.damage(campaign.chance.choice(paths))

    return strike


def damage_manifest(campaign: Campaign, size: int) -> None:
    """Kill everything, and damage the manifest of the newest checkpoint."""
    kill_all(campaign, size)
    newest = campaign.newest_first()
    campaign.attacks[-1].struck = bool(newest)
    if newest:
        campaign.remember(newest[0])
        campaign.damage(newest[0] / "manifest.json")


KINDS: dict[str, tuple[str, Strike]] = {
    "kill-rank": ("SIGKILL of one rank", signal_one_rank(signal.SIGKILL)),
    "kill-all": ("SIGKILL of all ranks and the launcher", kill_all),
    "kill-some": ("SIGKILL of any of the processes", kill_some),
    "kill-worker": ("SIGKILL of a loader worker", kill_worker),
    "kill-launcher": ("SIGKILL of the launcher alone", signal_launcher(signal.SIGKILL)),
    "restart": ("SIGKILL of the launcher, and started again at once", kill_launcher_and_restart),
    "term-rank": ("SIGTERM to one rank", signal_one_rank(signal.SIGTERM)),
    "term-launcher": ("SIGTERM to the launcher", signal_launcher(signal.SIGTERM)),
    "term-group": ("SIGTERM to the process group", signal_launcher(signal.SIGTERM, group=True)),
    "int-rank": ("SIGINT to one rank", signal_one_rank(signal.SIGINT)),
    "int-group": ("SIGINT to the process group", signal_launcher(signal.SIGINT, group=True)),
    "usr1-rank": ("SIGUSR1 to one rank", signal_one_rank(signal.SIGUSR1)),
    "stop": ("STOP file", stop_file),
    "stop-rank": ("SIGSTOP of one rank", stop_one_rank),
    "first-step": ("SIGKILL of one rank in its first step", moment("start", most=14)),
    "epoch-edge": ("SIGKILL of one rank on an epoch's edge", moment("epoch", most=8, occurrences=3)),
    "evaluation": ("SIGKILL of one rank in an evaluation", moment("evaluation", most=8, occurrences=3)),
    "rollback": ("SIGKILL of one rank in a rollback or its replay", moment("rollback", most=40)),
    "byte": ("SIGKILL at a byte that is written", fault("die", "byte")),
    "act": ("SIGKILL between two acts on the folder", fault("die", "act")),
    "power": ("loss of power between two acts", fault("lose power", "act")),
    "io-error": ("EIO while writing", fault("fail", "byte", error=errno.EIO)),
    "io-error-act": ("EIO at an act on the folder", fault("fail", "act", error=errno.EIO)),
    "disk": ("disk full", full_disk),
    "damage": ("the newest checkpoint's files damaged", damage("checkpoint")),
    "manifest": ("the newest checkpoint's manifest damaged", damage_manifest),
    "fence": ("the fence's lock damaged", damage("fence-*.json")),
    "metrics": ("metrics.jsonl's tail damaged", damage("metrics.jsonl")),
    "records": (
        "best.json, outcome.json or config.yaml damaged",
        damage("checkpoints/best.json", "outcome.json", "config.yaml"),
    ),
}  # fmt: skip
