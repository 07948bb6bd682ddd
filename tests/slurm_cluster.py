"""A real Slurm of two nodes on this machine: munged, slurmctld and a slurmd for each node, in a folder of their own.

Nothing in /etc is touched. The daemons are ended by their pid files, and what jobs have left of processes with them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tests.chaos.processes import clean_environment, processes

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
_PATIENCE_SECONDS = 120.0  # for a run to start, on a machine whose cores are shared
_CONFIGURATION = """\
ClusterName=lockstep
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: two minutes by default.
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
JobRequeue=1
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={first} CPUs=4 RealMemory=2000
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={second} CPUs=4 RealMemory=2000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class SlurmCluster:
    """Two nodes, n1 and n2, in a folder that is removed with them.

    The partition ``main`` is preempted by ``urgent``, with a grace time of one minute.
    """

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="lockstep-slurm-"))
        self.folder.chmod(0o755)  # munged does not run as root
        ports = _free_ports(3)
        names = {"host": socket.gethostname().partition(".")[0], "folder": self.folder}
        text = _CONFIGURATION.format(port=ports[0], first=ports[1], second=ports[2], **names)
        self.environment = clean_environment(
            SLURM_CONF=str(self.folder / "slurm.conf"),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )
        try:
            self._start_munge()
            (self.folder / "slurm.conf").write_text(text)
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
            for name in ("state", "spool/n1", "spool/n2"):
                (self.folder / name).mkdir(parents=True)
            self.call("slurmctld", "-c")
            for node in ("n1", "n2"):
                self.start_node(node)
            self.wait(lambda: self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle", "idle"])
        except BaseException:
            self.close()
            raise

    def call(self, *words: str, cwd: Path | None = None) -> str:
        """Run a command as a user of the cluster; return what it says."""
        done = subprocess.run(
            words,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=cwd or self.folder,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"
        return done.stdout

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self.call("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node at once, its daemon and all that runs on it, as a power cut would."""
        ranks, everything = self.pids_on(node), processes()
        starters = {everything[pid].parent for pid in ranks if pid in everything} - set(
            ranks
        )  # Slurm's own, one a step
        daemon = self._pid(f"slurmd.{node}.pid")
        assert daemon is not None
        assert starters
        for pid in (daemon, *starters, *ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def submit(self, config: Path, *words: str) -> str:
        """Submit a run by ``lockstep submit slurm``; return the job's id."""
        said = self.call("lockstep", "submit", "slurm", str(config), *words, cwd=config.parent)
        found = re.match(r"submitted job (\d+):", said)
        assert found, said
        return found[1]

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "-o", "show", "job", number)))

    def wait_for_state(self, number: str, *states: str, seconds: float = _PATIENCE_SECONDS) -> dict[str, str]:
        """Wait until a job is in one of several states; return what Slurm knows of it."""
        self.wait(lambda: self.job(number)["JobState"] in states, seconds=seconds, says=lambda: str(self.job(number)))
        return self.job(number)

    def wait(
        self, condition: Callable[[], bool], *, seconds: float = _PATIENCE_SECONDS, says: Any = lambda: ""
    ) -> None:
        """Wait for a condition."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, says() or (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)

    def pids_on(self, node: str) -> list[int]:
        """Return the processes that run on a node, by the name that Slurm gives them in their environment."""
        mark = f"SLURMD_NODENAME={node}".encode()
        return [pid for pid, variables in _environments() if mark in variables and self._conf in variables]

    def pid_of_rank(self, number: str, rank: int) -> int | None:
        """Return the process of one rank of a job, once it is there."""
        marks = {f"SLURM_JOB_ID={number}".encode(), f"RANK={rank}".encode(), self._conf}
        found = [pid for pid, variables in _environments() if marks <= variables]
        return min(found, default=None)

    def cancel_all(self) -> None:
        """End all jobs and wait until their nodes are free."""
        subprocess.run(["scancel", "--me"], env=self.environment, check=False)
        self.wait(lambda: not self.call("squeue", "-h").strip())

    def close(self) -> None:
        """End all jobs' processes and the daemons, and remove the folder."""
        for pid in (pid for pid, variables in _environments() if self._conf in variables and pid != os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        doomed = [self._pid(name) for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munge/munged.pid")]
        for pid in filter(None, doomed):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with suppress(AssertionError):
            self.wait(lambda: not any(pid in processes() for pid in doomed if pid), seconds=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _conf(self) -> bytes:
        return f"SLURM_CONF={self.folder}/slurm.conf".encode()

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def _start_munge(self) -> None:
        """Give the cluster a key and a daemon of its own, whose user is not root."""
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        (folder / "key").write_bytes(os.urandom(128))
        for path, mode in ((folder / "key", 0o400), (folder, 0o755)):
            path.chmod(mode)
            shutil.chown(path, "munge", "munge")
        files = [f"--{option}={folder}/{name}" for option, name in _MUNGE_FILES.items()]
        self.call(
            "setpriv",
            "--reuid=munge",
            "--regid=munge",
            "--clear-groups",
            "munged",
            "-S",
            f"{folder}/munge.sock",
            *files,
        )


_MUNGE_FILES = {"key-file": "key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}


def outcome(run: Path) -> dict[str, Any]:
    """Return what a run has left of its outcome, nothing if there is none."""
    with suppress(OSError, ValueError):
        return dict(json.loads((run / "outcome.json").read_text()))
    return {}


def steps(run: Path) -> int:
    """Return the last step that a run has reported."""
    try:
        return max(
            (int(found) for found in re.findall(r'"step": (\d+)', (run / "metrics.jsonl").read_text())), default=0
        )
    except OSError:
        return 0


def _environments() -> Iterator[tuple[int, set[bytes]]]:
    for pid in processes():
        with suppress(OSError):
            yield pid, set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def started_cluster() -> Iterator[SlurmCluster]:
    """Yield a cluster, or skip where there is no Slurm or no right to start it."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"a real Slurm needs root and slurm-wlm, munge (not here: {', '.join(missing) or 'root'})")
    cluster = SlurmCluster()
    try:
        yield cluster
    finally:
        cluster.close()
