"""Kill anything, any time, any way; run the same command again; get the same model: ``python -m tests.chaos``.

A campaign is one run that is started, attacked and started again until an undisturbed start finishes it. What comes out is
compared with an uninterrupted run: bit for bit if all starts had the same number of processes, to 1e-10 otherwise (float64).
In between are looked at: that every process has gone within a bounded time, that every checkpoint with a final name is
whole, and that each start goes on from the newest whole one. Whether a checkpoint is whole is judged here anew, with hashlib.

    python -m tests.chaos --kills 100 --seed 0 --table chaos.md
    python -m tests.chaos --only power --kills 20
    python -m tests.chaos --campaign 17         one of the same seed again, with its folder kept

Most starts are forks of a process that has imported torch (the nursery): a start takes 0.2 s rather than 5 s. Some are real:
``lockstep train`` and ``accelerate launch``.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import errno
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "runtime" / "train.py"
STEPS = 40
TOLERANCE = 1e-10
FENCE_SECONDS = 3.0  # of a damaged lock, which has to be watched; 30 s would only be longer
LAUNCHER_PATIENCE_SECONDS = 30.0  # torchrun's
GONE_SECONDS = 60.0  # in which every process has to be gone
DISK_BYTES = 1 << 20
_CHECKPOINT = re.compile(r"step-(\d{8,})(-attempt-\d+)?(-epoch-.*|-evaluated)?")
_ASIDE = re.compile(r"\.(partial|damaged)-[0-9a-f]+$")
_TIMINGS = ("time", "samples_per_second", "data_share", "slowest_rank", "slowest_rank_excess")
_CRASH = re.compile(r"Fatal Python error: (?!init_)|terminate called|Segmentation fault|core dumped")
_STUBBORN = re.compile(r"had to be killed|forcefully exiting via")  # our launcher's words, and torchrun's


def configuration(folder: Path, *, num_workers: int = 0) -> dict[str, Any]:
    """Dropout, BatchNorm, random transforms, shuffling, momentum, averaging, warm-up and cosine, evaluation, a best."""
    points = {"target": "tiny_chaos:Points", "args": {"pause_seconds": 0.0015}, "transform": "tiny_chaos:add_noise"}
    return {
        "name": "chaos",
        "output": str(folder / "run"),
        "code": str(ROOT / "tests" / "project"),
        "model": {"target": "tiny:Mlp", "args": {}},
        "data": {
            "train": points,
            "validation": {"target": "tiny_chaos:Points", "args": {"split": "validation", "size": 31}},
            "loader": {"num_workers": num_workers},
        },
        "batch": {"global_size": 18, "slots": 6},  # 1, 2 and 3 processes divide it
        "objective": "tiny_chaos:Named",
        "optimizer": {"target": "SGD", "args": {"lr": 0.1, "momentum": 0.9}, "max_grad_norm": 1.0},
        "schedule": {"target": "CosineAnnealingLR", "args": {"T_max": STEPS}, "warmup_steps": 5},
        "averaging": {"decay": 0.9},
        "limit": {"steps": STEPS, "grace_seconds": 5.0, "stall_seconds": 20.0},
        # An epoch has six steps, so every evaluation is followed by a save, wherever a run is stopped besides.
        "checkpoint": {"every": "3 steps", "keep": 3, "best": [{"metric": "loss", "mode": "min"}]},
        "reporting": {"every": "1 step", "progress": False},
    }


class BrokenPromiseError(Exception):
    """The promise was broken."""


# Processes


class Process(NamedTuple):
    """An entry of /proc."""

    pid: int
    parent: int
    state: str


def processes() -> dict[int, Process]:
    """Return all processes of this machine."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                words = Path(entry, "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = Process(int(entry.name), int(words[1]), words[0])
    return found


def descendants(everything: dict[int, Process], root: int, *, without: int) -> list[Process]:
    """Return the processes that stem from one, zombies left out."""
    found, known = [], {root}
    for _ in range(6):  # generations
        found = [p for p in everything.values() if p.parent in known and p.pid != without]
        known = {root, *(p.pid for p in found)}
    return sorted(p for p in found if p.state not in "ZX")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that none is lost sight of."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def clean_environment(**added: str) -> dict[str, str]:
    """The environment of a user's shell on a machine without GPUs."""
    unwanted = ("ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_", "MASTER_", "LOCKSTEP_", "SLURM_", "TORCHELASTIC_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        **added,
    }


class Nursery:
    """A process that has imported torch and Lockstep, and forks launchers like accelerate's, which fork ranks."""

    def __init__(self) -> None:
        line = [sys.executable, "-m", "tests.chaos", "--nursery"]
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment()
        )
        self.pid = self._process.pid
        self._answer()

    def start(self, config: Path, world_size: int, log: Path) -> int:
        """Return the process id of a launcher."""
        assert self._process.stdin is not None
        request = {"config": str(config), "world_size": world_size, "log": str(log), "port": free_port()}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        """End it; it has no children of its own."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the nursery has died; its own message tells why")
        return answer


def nurse() -> int:
    """Serve as the nursery."""
    for module in (
        "accelerate",
        "torch.distributed",
        "torch._inductor",  # strict determinism imports it, which takes a second
        "runtime.assembly",
        "runtime.entry",
        "runtime.run",
        "runtime.session",
        "runtime.strategies.accelerated",
    ):
        importlib.import_module(module)
    gc.freeze()  # no garbage collection in a child touches, and so copies, what it shares with us
    print("ready", flush=True)
    for line in sys.stdin:
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            launcher = os.fork()
            if launcher == 0:
                os.close(reader)
                os.close(writer)
                _launch(**json.loads(line))
            os.write(writer, f"{launcher}\n".encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(between, 0)  # its child is an orphan now, and the runner's
        print(os.read(reader, 100).decode().strip(), flush=True)
        os.close(reader)
    return 0


class _AskedError(Exception):
    pass


def _launch(*, config: str, world_size: int, log: str, port: int) -> NoReturn:
    """Do what ``accelerate launch`` does: start ranks; when one fails or a signal comes, end the others.

    With one process accelerate passes no signal on and starts no session; with several each rank has a session of its own.
    """
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    ranks = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            _rank(config, rank, world_size, port)
        ranks.append(pid)
    if world_size == 1:
        os._exit(1 if os.waitpid(ranks[0], 0)[1] else 0)

    def asked(number: int, frame: object) -> None:
        raise _AskedError(number)

    failed, last_signal = False, signal.SIGTERM
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, asked)
        while ranks and not failed:
            time.sleep(0.05)
            failed = _reap(ranks)
    except _AskedError as error:
        failed, last_signal = True, error.args[0]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _end(ranks, last_signal)
    os._exit(1 if failed else 0)


def _reap(ranks: list[int]) -> bool:
    """Forget the ranks that have ended; tell whether one has failed."""
    failed = False
    for pid in ranks.copy():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            ranks.remove(pid)
            failed |= status != 0
    return failed


def _end(ranks: list[int], number: int) -> None:
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
    deadline = time.monotonic() + LAUNCHER_PATIENCE_SECONDS
    while ranks and time.monotonic() < deadline:
        time.sleep(0.02)
        _reap(ranks)
    for pid in ranks:
        print(f"launcher: rank process {pid} had to be killed", file=sys.stderr, flush=True)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _rank(config: str, rank: int, world_size: int, port: int) -> NoReturn:
    """Be one rank: what ``runtime/train.py`` does in a process that has just been started."""
    import torch

    import runtime.entry

    os.environ.update(LOCKSTEP_WORLD_SIZE=str(world_size), ACCELERATE_USE_CPU="true")
    if world_size > 1:
        os.setsid()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    sys.argv = [str(TRAIN), config]
    random.seed()  # a new process has random numbers of its own
    np.random.seed()
    torch.seed()
    code = 1
    try:
        code = runtime.entry.main([config])
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # taking torch's modules apart would take 1.5 s; true launches do


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Start:
    """One start of the run: a launcher and its ranks.

    Args:
        how: ``fork``, ``lockstep`` or ``accelerate``.
    """

    def __init__(self, how: str, world_size: int, config: Path, log: Path, nursery: Nursery) -> None:
        self.how, self.world_size, self.log = how, world_size, log
        self.began = time.time()
        self._nursery = nursery
        self._popen: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self.code: int | None = None
        if how == "fork":
            self.launcher = nursery.start(config, world_size, log)
        else:
            self._popen = self._really(config)
            self.launcher = self._popen.pid

    def _really(self, config: Path) -> subprocess.Popen[bytes]:
        if self.how == "lockstep":
            line = [sys.executable, "-m", "runtime.cli", "train", str(config), "--processes", str(self.world_size)]
            added = {}
        else:
            several = ["--multi_gpu", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
            line = [
                sys.executable, "-m", "accelerate.commands.launch", *(several if self.world_size > 1 else ["--cpu"]),
                "--num_processes", str(self.world_size), "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", str(TRAIN), str(config),
            ]  # fmt: skip
            added = {"ACCELERATE_USE_CPU": "true"}
        with self.log.open("ab") as out:
            return subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=clean_environment(**added),
            )

    def alive(self) -> list[Process]:
        """Return all its processes: we are the parent of those whose parent has died."""
        everything = processes()  # 4 ms
        self._reap(everything)
        return descendants(everything, os.getpid(), without=self._nursery.pid)

    def ranks(self) -> list[int]:
        """Return the process ids of its ranks, in order as far as that can be seen."""
        alive = self.alive()
        if self.how == "fork":
            return [p.pid for p in alive if p.parent == self.launcher]
        trains = {p.pid: p.parent for p in alive if _is_rank(p.pid)}
        return sorted(pid for pid, parent in trains.items() if parent not in trains)

    def wait(self, seconds: float) -> bool:
        """Wait until all processes have gone; return whether they have."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.03)
        self._reap(processes())  # what was a zombie by then
        return True

    def abort(self) -> None:
        """End processes that hang, with their stacks in the log."""
        for number in (signal.SIGABRT, signal.SIGKILL):
            for process in self.alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
            self.wait(3.0)

    def _reap(self, everything: dict[int, Process]) -> None:
        if self._popen is not None and self._popen.poll() is not None:
            self.code = self._popen.returncode
        for process in everything.values():
            if process.parent == os.getpid() and process.state == "Z" and process.pid != self._nursery.pid:
                with suppress(ChildProcessError):
                    status = os.waitpid(process.pid, os.WNOHANG)[1]
                    if process.pid == self.launcher:
                        self.code = os.waitstatus_to_exitcode(status)


def _is_rank(pid: int) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return str(TRAIN).encode() in words and b"accelerate.commands.launch" not in words
    return False


# What is on disk


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
    found = [p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name)] if folder.is_dir() else []
    return sorted((p for p in found if not _ASIDE.search(p.name)), key=lambda p: (step_of(p), len(p.name)))


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name tells."""
    return int(path.name.split("-")[1])


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
        best: value, step and epoch of the best checkpoints.
    """

    tensors: dict[str, np.ndarray]
    tree: dict[str, Any]
    figures: dict[str, list[dict[str, Any]]]
    best: dict[str, Any]


def final(run: Path) -> Final:
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
    identity = tree["training"]["identity"]
    del tree["training"]["made_by"], identity["tracker_id"], identity["configuration"]
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    for entry in (entry for entries in best.values() for entry in entries):
        if not is_whole(run / "checkpoints" / entry.pop("checkpoint")):
            raise BrokenPromiseError("best.json names a checkpoint that is not whole")
    return Final(tensors, tree, figures_of(run), best)


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


# Campaigns

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
        chance: decides everything that is not the machine's own timing.
        references: by world size; empty while they are made.
        real_share: of the starts, how many are true launches.
    """

    def __init__(
        self, folder: Path, chance: random.Random, nursery: Nursery, references: dict[int, Reference], real_share: float
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        self.chance = chance
        self.references = references
        self.attacks: list[Attack] = []
        self.attacks_to_come = 0
        self.sizes: list[int] = []
        self.ignored: set[str] = set()  # figures whose lines we have damaged
        self.lossy = False  # whether lines of metrics.jsonl may be missing
        self.remarks: list[str] = []
        self._nursery = nursery
        self._real_share = real_share
        self._acceptable: set[int] | None = {0}
        self._damaged: set[str] = set()
        self._digests: dict[str, dict[str, str]] = {}
        folder.mkdir(parents=True)
        num_workers = int(bool(references) and chance.random() < 0.2)
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration(folder, num_workers=num_workers)))
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
        self.tell(f"start {how} with {size}; to go on from step {sorted(self._acceptable)}")
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

    def look_for_promised(self) -> None:
        """Look whether the checkpoints are there that a later save found when the power was lost.

        Raises:
            BrokenPromiseError: the newest of them is not.
        """
        struck = self.folder / "struck"
        names = json.loads(struck.read_text()) if struck.is_file() else []
        steps = [step_of(Path(n)) for n in names if _CHECKPOINT.fullmatch(n) and not _ASIDE.search(n)]
        if max(steps, default=0) > max(self.expected()):
            raise BrokenPromiseError(
                f"the checkpoint of step {max(steps)} had been saved and is lost with the power; on disk is {self.expected()}"
            )

    def newest_first(self) -> list[Path]:
        """Return the checkpoints that the next start will look at, in its order."""
        return list(reversed(checkpoints(self.run)))

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
        found = final(self.run)
        same = len(set(self.sizes)) == 1
        wanted = self.references[self.sizes[0] if same else 1].final
        figures = {key: value for key, value in wanted.figures.items() if key not in self.ignored}
        got = {key: value for key, value in found.figures.items() if key not in self.ignored}
        if self.lossy:
            figures = {key: value for key, value in figures.items() if key in got}
            if len(figures) < len(wanted.figures):
                self.remarks.append(f"{len(wanted.figures) - len(figures)} lines of metrics.jsonl lost in an attack")
        comparison = Comparison()
        comparison.compare("", wanted._replace(figures=figures)._asdict(), found._replace(figures=got)._asdict())
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


# Attacks: each one starts the run, strikes, and sees that all has gone


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
    second = campaign.start(campaign.chance.choice([1, 2, 3]), "fork")
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


# The runner


@dataclass
class Row:
    """What the table says of one kind."""

    attacks: int = 0
    worlds: Counter[str] = field(default_factory=Counter)
    bitwise: int = 0
    close: int = 0
    failed: int = 0
    worst: float = 0.0
    aside: int = 0
    seconds: float = 0.0


class Runner:
    """Runs campaigns and keeps the count.

    Args:
        folder: for the runs' folders.
        real_share: of the starts, how many are true launches.
    """

    def __init__(self, folder: Path, *, seed: int, real_share: float, kinds: list[str], sizes: list[int]) -> None:
        self._folder, self._seed, self._real_share, self._kinds, self._sizes = folder, seed, real_share, kinds, sizes
        self._nursery = Nursery()
        self._references: dict[int, Reference] = {}
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
        for size in self._sizes:
            campaign = self._campaign(self._folder / f"reference-{size}", f"reference {size}")
            campaign.plan({"do": "count", "unit": "act", "number": 0})
            start = campaign.start(size, "fork")
            campaign.settle(start)
            if start.code != 0:
                raise BrokenPromiseError(
                    f"the uninterrupted run with {size} processes failed:\n{campaign.log.read_text()}"
                )
            told = records(campaign.run)
            times = {record["event"]: record["time"] for record in told}
            self._references[size] = Reference(
                final(campaign.run),
                start_seconds=told[0]["time"] - start.began,
                step_seconds=(times["train"] - told[0]["time"]) / STEPS,
                counts=json.loads((campaign.folder / "counts.json").read_text()),
            )
            campaign.finish()

    def run_campaign(self, number: int) -> None:
        """Attack one run until it is finished, and count what became of it."""
        chance = random.Random(f"{self._seed}/{number}")
        # Each kind gets its turn, whatever the seed; the others of a campaign are drawn.
        kinds = [self._kinds[number % len(self._kinds)], *chance.choices(self._kinds, k=chance.choice([0, 1, 1, 2, 3]))]
        chance.shuffle(kinds)
        one_size = chance.choice(self._sizes) if chance.random() < 0.5 else None
        folder = self._folder / f"campaign-{number}"
        campaign = self._campaign(folder, f"{self._seed}/{number}")
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

    def _campaign(self, folder: Path, seed: str) -> Campaign:
        return Campaign(folder, random.Random(seed), self._nursery, self._references, self._real_share)

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
            f"campaign {number} of seed {self._seed} ({', '.join(kinds)}): {failure}\n"
            f"  again: python -m tests.chaos --seed {self._seed} --campaign {number}\n  its folder: {campaign.folder}\n"
            + "".join(f"    {line}\n" for line in campaign.log.read_text(errors="replace").splitlines())
        )

    def table(self) -> str:
        """Return what happened, in Markdown."""
        lines = [
            "| attack | kind | struck | processes before→after | bitwise equal | equal to 1e-10 | failed | worst difference "
            "| moved aside | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        rows = {**{KINDS[kind][0]: (kind, row) for kind, row in self.rows.items() if row.worlds}}
        for text, (kind, row) in rows.items():
            worlds = " ".join(f"{pair}×{count}" if count > 1 else pair for pair, count in sorted(row.worlds.items()))
            lines.append(
                f"| {text} | `{kind}` | {row.attacks} | {worlds} | {row.bitwise} | {row.close} | {row.failed} "
                f"| {row.worst:.1e} | {row.aside} | {row.seconds:.1f} |"
            )
        return "\n".join(lines)


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


def main(arguments: list[str]) -> int:
    """Run campaigns until enough attacks have struck; return 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="attacks that have to strike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND", action="append", choices=KINDS, help=", ".join(KINDS))
    parser.add_argument("--campaign", type=int, help="only the one of this number")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3], help="numbers of processes")
    parser.add_argument("--real", type=float, default=0.08, help="share of starts that are true launches")
    parser.add_argument("--table", type=Path, help="file for the table")
    parser.add_argument("--nursery", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.nursery:
        return nurse()
    adopt_orphans()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    runner = Runner(
        folder,
        seed=options.seed,
        real_share=options.real,
        kinds=options.only or list(KINDS),
        sizes=sorted(options.sizes),
    )
    try:
        runner.make_references()
        numbers = [options.campaign] if options.campaign is not None else itertools.count()
        for number in numbers:
            if runner.struck >= options.kills:
                break
            runner.run_campaign(number)
            so_far = f"{runner.struck} attacks, {len(runner.failures)} failures"
            print(f"{time.monotonic() - began:6.1f} s  campaign {number}: {so_far}", flush=True)
    finally:
        runner.close()
    summary = [
        runner.table(),
        "",
        f"{runner.struck} attacks in {time.monotonic() - began:.0f} s, seed {options.seed}; {runner.missed} more hit nothing.",
        *(f"- {text} ({count} campaigns)" for text, count in sorted(runner.remarks.items())),
    ]
    print("\n".join(summary))
    if options.table is not None:
        options.table.write_text("\n".join(summary) + "\n")
    for failure in runner.failures:
        print(f"\nFAILED: {failure}")
    if not runner.failures:
        shutil.rmtree(folder)
    return 1 if runner.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
