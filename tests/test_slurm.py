"""Jobs on a real Slurm of two nodes: what they train, and what becomes of them when they end in each of the ways there are."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from runtime.checkpoints.load import load_state
from runtime.config.file import load
from runtime.config.output_name import escaped
from tests.observed import PROJECT, configuration, observe
from tests.process_pool import ProcessPool
from tests.slurm_cluster import SlurmCluster, outcome, started_cluster, steps
from tests.test_failure import endless
from tests.test_slurm_script import HOSTILE

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    yield from started_cluster()


@pytest.fixture
def slurm(cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, with no job of another test on it."""
    yield cluster
    cluster.cancel_all()


def written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def weights(run: Path, step: int) -> dict[str, bytes]:
    """Return all tensors of the state after a step: parameters, buffers, the optimizer's."""
    (checkpoint,) = (run / "checkpoints").glob(f"step-{step:08}*")
    found: dict[str, bytes] = {}
    for path in checkpoint.glob("*.safetensors"):
        found |= {f"{path.name}/{name}": tensor.tobytes() for name, tensor in load_file(path).items()}
    assert found
    return found


def assert_as_if_never_interrupted(pool: ProcessPool, run: Path, config: dict[str, Any], step: int) -> None:
    """Train the same on this machine alone, in two processes and one go, and compare every bit of the state."""
    reference = run.with_name("reference")
    pool.run(observe, 2, {**config, "output": str(reference), "limit": {"steps": step}})
    assert weights(run, step) == weights(reference, step)


def log(cluster: SlurmCluster, run: Path, job: str) -> str:
    path = run / "logs" / f"slurm-{job}.log"
    return path.read_text() if path.exists() else str(cluster.job(job))


def wait_for_step(cluster: SlurmCluster, run: Path, job: str, step: int) -> None:
    cluster.wait(lambda: steps(run) >= step, says=lambda: f"at step {steps(run)}: {log(cluster, run, job)}")


def ended(cluster: SlurmCluster, run: Path, job: str, seconds: float = 120.0) -> dict[str, str]:
    """Wait until a job has ended for good; return what Slurm knows of it."""
    states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
    found = cluster.wait_for_state(job, *states, seconds=seconds)
    cluster.wait(
        lambda: re.search(r"the job (is not requeued|goes back)[^\n]*\n\Z", log(cluster, run, job)) is not None
    )
    return found


def test_two_nodes_train_digits_to_the_same_bits_as_one_machine(
    slurm: SlurmCluster, pool: ProcessPool, tmp_path: Path
) -> None:
    config = load(ROOT / "configs" / "digits.yaml").resolved()
    del config["code"]
    changes: dict[str, Any] = {"limit": {"steps": 24}, "output": str(tmp_path / "run"), "determinism": "strict"}
    path = written(tmp_path, {**config, **changes})
    job = slurm.submit(path, "--nodes", "2", "--env", "MY_TOKEN=hush", "--env", "A_LIST=a,b")
    found = ended(slurm, tmp_path / "run", job)
    said = log(slurm, tmp_path / "run", job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "0"), said
    assert "2 processes on cpu" in said  # rank 0's words are in the job's log, and each rank has its own
    ranks = tmp_path / "run" / "logs" / f"slurm-{job}" / "restart-0"
    assert "2 processes on cpu" in (ranks / "rank-0.log").read_text()
    assert (ranks / "rank-1.log").exists()
    assert outcome(tmp_path / "run")["launch"] == f"{job}-0"
    assert_as_if_never_interrupted(pool, tmp_path / "run", {**config, "determinism": "strict"}, 24)
    assert not list((tmp_path / "run").rglob("secrets"))


def test_a_run_that_is_configured_wrongly_fails_once_under_any_name(slurm: SlurmCluster, tmp_path: Path) -> None:
    """That one sample cannot keep two processes busy is known only to the ranks. All the names are hostile."""
    name = HOSTILE.replace("\\", "")
    folder = tmp_path / name
    config = configuration(escaped(str(folder / "run")), name=name, batch={"global_size": 1})
    job = slurm.submit(written(folder, config), "--nodes", "2", f"--sbatch=--mail-user={HOSTILE}")
    found = ended(slurm, folder / "run", job)
    said = log(slurm, folder / "run", job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert "1 samples cannot keep 2 processes busy" in said
    assert "the job is not requeued: the failure would repeat" in said
    assert not [path for path in tmp_path.rglob("*") if path.name == "pwned"]
    assert (folder / "run" / "logs" / f"slurm-{job}" / "restart-0" / "rank-1.log").exists()


def test_a_step_that_is_started_with_fewer_tasks_is_refused(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Each rank would train alone, and the job would succeed."""
    config = configuration(tmp_path / "run")
    script = slurm.call(
        "lockstep", "submit", "slurm", str(written(tmp_path, config)), "--nodes", "2", "--dry-run", cwd=tmp_path
    )
    for name in ("jobs", "logs"):
        (tmp_path / "run" / name).mkdir(parents=True)
    changed = re.sub(r"srun --nodes=2 --ntasks=2", "srun --nodes=1 --ntasks=1", script)
    changed = re.sub(r"/\S*/run/jobs/\S*/job.yaml", str(tmp_path / "job.yaml"), changed)
    (tmp_path / "job.sh").write_text(re.sub(r"'code=[^']*'", "", changed))
    job = slurm.call("sbatch", "--parsable", str(tmp_path / "job.sh")).strip()
    found = ended(slurm, tmp_path / "run", job)
    said = log(slurm, tmp_path / "run", job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert "2 processes were asked for, but the process group has 1" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def doctor(slurm: SlurmCluster, config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Examine both nodes in a step of srun's; each has a host name of its own, by which NODE in a word is replaced."""
    named = 'hostname "$SLURMD_NODENAME"; exec "${@//NODE/$SLURMD_NODENAME}"'
    line = ["srun", "--nodes=2", "--ntasks-per-node=1", "unshare", "--uts", "bash", "-c", named, "named"]
    return subprocess.run(
        [*line, "lockstep", "doctor", str(config), *words],
        env=slurm.environment,
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_doctor_names_the_machine_of_a_step_that_differs(slurm: SlurmCluster, tmp_path: Path) -> None:
    path = written(tmp_path, configuration(tmp_path / "run"))
    for node in ("n1", "n2"):
        shutil.copytree(PROJECT, tmp_path / node)
    (tmp_path / "n2" / "more.py").touch()
    done = doctor(slurm, path, f"code={tmp_path}/NODE")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"rank 1 \(host n2\) has code \S+, rank 0 \(host n1\) \S+\n", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_doctor_examines_each_process_of_each_machine_of_a_step(slurm: SlurmCluster, tmp_path: Path) -> None:
    path = written(tmp_path, configuration(tmp_path / "run"))
    done = doctor(slurm, path, "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^rank (\d)  host (\S+)  cpu", done.stdout, re.M)
    assert found == [("0", "n1"), ("1", "n1"), ("2", "n2"), ("3", "n2")]
    assert done.stdout.count("no problems found") == 1


def test_a_job_goes_on_from_its_last_checkpoint_after_a_rank_was_killed(
    slurm: SlurmCluster, pool: ProcessPool, tmp_path: Path
) -> None:
    """The run at W&B is the same one, too: offline, each start leaves a folder whose name ends in the id of its run."""
    run = tmp_path / "run"
    config = endless(tmp_path, checkpoint={"every": "50 steps"})
    tracked = {**config, "reporting": {**config["reporting"], "wandb": {"mode": "offline"}}}
    job = slurm.submit(written(tmp_path, tracked), "--nodes", "2")
    wait_for_step(slurm, run, job, 100)
    doomed = slurm.pid_of_rank(job, 1)
    assert doomed is not None
    os.kill(doomed, signal.SIGKILL)
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", says=lambda: log(slurm, run, job))
    first = log(slurm, run, job)
    assert "rank 1 failed first; its last lines" in first
    assert "the job is requeued: processes were lost (rank 1" in first
    slurm.wait(lambda: "resumed" in log(slurm, run, job), says=lambda: log(slurm, run, job))
    wait_for_step(slurm, run, job, 20 + max(int(s) for s in re.findall(r"after step (\d+)", log(slurm, run, job))))
    assert re.search(rf"\n{job} +RUNNING +2 .* \d+ +{re.escape(str(run))}\n", slurm.call("lockstep", "jobs"))
    assert re.match(r"stopped at step \d+: ", slurm.call("lockstep", "stop", str(run)))
    found = ended(slurm, run, job)
    said = log(slurm, run, job)
    assert (found["ExitCode"], found["Restarts"]) == ("75:0", "1"), said
    assert "the job is not requeued: stopped by the user" in said
    (checkpoint,) = (run / "checkpoints").glob(f"step-{outcome(run)['step']:08}*")
    ids = [path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*-*")]
    assert ids == [load_state(checkpoint)[1]["identity"]["tracker_id"]] * 2
    assert_as_if_never_interrupted(pool, run, config, outcome(run)["step"])


def test_a_cancelled_job_saves_and_is_not_requeued(slurm: SlurmCluster, pool: ProcessPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = endless(tmp_path)  # which saves no state before it is asked to leave
    job = slurm.submit(written(tmp_path, config), "--nodes", "2")
    wait_for_step(slurm, run, job, 40)
    subprocess.run(["scancel", job], env=slurm.environment, check=True)
    found = ended(slurm, run, job)
    said = log(slurm, run, job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), said
    assert "the job is not requeued: saved, the job was cancelled" in said
    assert outcome(run)["outcome"] == "stopped"
    assert_as_if_never_interrupted(pool, run, config, outcome(run)["step"])


def slow(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run whose every step takes a good part of a second, so that few of them fill minutes."""
    rows = {"target": "tiny_failing:Rows", "args": {"size": 6400, "slow_on": 1}}
    every = {"every": "1 step", "progress": False}
    return endless(folder, data={"train": rows}, reporting=every, **changes)


def stopped(cluster: SlurmCluster, pool: ProcessPool, run: Path, job: str, config: dict[str, Any]) -> str:
    """Stop a run after some more steps; return its log once it was found as if it had never been interrupted."""
    wait_for_step(cluster, run, job, steps(run) + 3)
    cluster.call("lockstep", "stop", str(run))
    found = ended(cluster, run, job)
    said = log(cluster, run, job)
    assert found["ExitCode"] == "75:0", said
    swift = {"train": {"target": "tiny_failing:Rows", "args": {"size": 6400}}}
    assert_as_if_never_interrupted(pool, run, {**config, "data": swift}, outcome(run)["step"])
    return said


def resumed_at(said: str) -> list[int]:
    return [int(found) for found in re.findall(r"resumed +after step (\d+)", said)]


@pytest.mark.long
def test_a_time_limit_of_a_minute_is_only_an_interruption(
    slurm: SlurmCluster, pool: ProcessPool, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", slow(tmp_path)
    job = slurm.submit(written(tmp_path, config), "--nodes", "2", "--time", "0:01:00")
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "2", seconds=400, says=lambda: log(slurm, run, job))
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # enough of it
    slurm.wait(lambda: len(resumed_at(log(slurm, run, job))) == 2, says=lambda: log(slurm, run, job))
    said = stopped(slurm, pool, run, job, config)
    assert said.count("the job is requeued: stopped: the time limit is near") == 2
    first, second = resumed_at(said)
    assert 0 < first < second


@pytest.mark.long
def test_a_preempted_job_saves_waits_and_goes_on(slurm: SlurmCluster, pool: ProcessPool, tmp_path: Path) -> None:
    run, config = tmp_path / "run", slow(tmp_path)
    job = slurm.submit(written(tmp_path, config), "--nodes", "2")
    wait_for_step(slurm, run, job, 3)
    urgent = slurm.call("sbatch", "--parsable", "-N2", "-n2", "-p", "urgent", "--exclusive", "--wrap=sleep 3").strip()
    slurm.wait(lambda: "is requeued" in log(slurm, run, job), says=lambda: log(slurm, run, job))
    slurm.wait_for_state(urgent, "COMPLETED")
    slurm.wait(lambda: len(resumed_at(log(slurm, run, job))) == 1, says=lambda: log(slurm, run, job))
    said = stopped(slurm, pool, run, job, config)
    assert "is requeued: stopped: SIGTERM" in said
    assert resumed_at(said)[0] >= 3  # it saves no state before it is asked to leave


@pytest.mark.long
def test_a_run_whose_node_is_lost_goes_on_when_there_is_one(
    slurm: SlurmCluster, pool: ProcessPool, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", slow(tmp_path, checkpoint={"every": "2 steps"})
    job = slurm.submit(written(tmp_path, config), "--nodes", "2", "--env", "SOME_KEY=hush")
    wait_for_step(slurm, run, job, 5)
    slurm.kill_node("n2")
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", seconds=200, says=lambda: log(slurm, run, job))
    slurm.start_node("n2")
    slurm.wait(lambda: len(resumed_at(log(slurm, run, job))) == 1, seconds=200, says=lambda: log(slurm, run, job))
    said = stopped(slurm, pool, run, job, config)
    assert resumed_at(said)[0] >= 2
    assert "is requeued: Slurm requeued it" in said or "processes were lost (rank 1" in said
