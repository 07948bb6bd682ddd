"""The job script as text: compared with files that a person has read, and run by bash in place of a cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.job import JobSpec
from launch.slurm.script import SlurmOptions, script, warning_seconds
from launch.submission_folder import secrets_text
from runtime.errors import ConfigurationError

GOLDEN = Path(__file__).parent / "golden"
CPU = JobSpec(
    script=Path("/opt/lockstep/runtime/train.py"),
    config=Path("/shared/runs/digits/jobs/20261122-120000/digits.yaml"),
    overrides=["limit.epochs=3", 'code="/shared/runs/digits/jobs/20261122-120000/code"'],
    nodes=2,
    name="digits",
    run_folder=Path("/shared/runs/digits"),
    working_folder=Path("/shared"),
    time_limit_seconds=600,
)
GPU = replace(
    CPU,
    nodes=4,
    processes_per_node=8,
    use_gpus=True,
    time_limit_seconds=14400,
    environment={"NCCL_DEBUG": "WARN", "NOTE": "a,b c"},
    secrets=["WANDB_API_KEY"],
    max_requeues=3,
)
ON_GPUS = SlurmOptions(
    partition="gpu",
    account="vision",
    qos="long",
    constraint="h200&ib",
    cpus_per_process=16,
    interface="ib0",
    extra=["--mem=0", "--exclusive", "--mail-user=a b@c.org"],
)
HOSTILE = 'it\'s $(touch pwned) `touch pwned` "x" %j; touch pwned # \\ @{command} ü'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("slurm-cpu.sh", script(CPU, SlurmOptions(), python="/opt/venv/bin/python", secrets_file=None)),
        (
            "slurm-gpu.sh",
            script(GPU, ON_GPUS, python="/opt/venv/bin/python", secrets_file=Path("/shared/runs/s/secrets")),
        ),
        (
            "slurm-container.sh",
            script(
                GPU,
                SlurmOptions(container="registry.example#lockstep:1", mounts=["/datasets:/data:ro"], interface="ib0"),
                python="/opt/venv/bin/python",
                secrets_file=None,
                module="runtime.train",
            ),
        ),
    ],
)
def test_the_script_is_the_one_that_was_reviewed(name: str, text: str) -> None:
    if os.environ.get("LOCKSTEP_REVIEW"):  # to write it anew, and then to read it
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


FAKES = {
    # What the script calls, each telling how it was called; one argument a line, so that nothing can be mistaken.
    "srun": 'for a in "$@"; do echo "srun: $a" >> "$TOLD"; done; env > "$TOLD.env"; exit 3',
    "scontrol": 'case "$2" in hostnames) echo "$3";; *) echo "NodeName=n1 NodeAddr=10.1.2.3 NodeHostName=n1";; esac',
    "python": 'for a in "$@"; do echo "python: $a" >> "$TOLD"; done; exit 9',
}


def run_by_bash(folder: Path, job: JobSpec, options: SlurmOptions, secrets: Path | None = None) -> tuple[int, str, str]:
    """Run a script with fakes for what it calls; return its exit code, how they were called, and srun's environment."""
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    text = script(job, options, python=str(folder / "python"), secrets_file=secrets)
    told = folder / "told"
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "TOLD": str(told),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_RESTART_COUNT": "2",
        "RANK": "7",
        "ACCELERATE_USE_FSDP": "true",
    }
    done = subprocess.run(["bash", "-c", text], env=variables, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, told.read_text(), told.with_name("told.env").read_text()


def test_hostile_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("\\", "")
    folder.mkdir()
    job = replace(
        CPU,
        name=HOSTILE,
        run_folder=folder,
        working_folder=tmp_path,
        config=folder / "x.yaml",
        overrides=[f"name={HOSTILE}"],
        environment={"VALUE": HOSTILE},
    )
    options = SlurmOptions(interface=HOSTILE)
    code, told, variables = run_by_bash(tmp_path, job, options)
    assert code == 9  # the exit code of the requeue decision
    assert not [path for path in tmp_path.rglob("*") if path.name == "pwned"]
    assert f"srun: name={HOSTILE}\n" in told
    assert f"srun: {folder}/x.yaml\n" in told
    assert f"python: {folder}\n" in told
    assert f"VALUE={HOSTILE}\n" in variables
    assert f"GLOO_SOCKET_IFNAME={HOSTILE}\n" in variables
    assert "--output=" + str(folder).replace("%", "%%") in told


def test_hostile_names_in_the_options_are_quoted(tmp_path: Path) -> None:
    text = script(
        replace(CPU, name=HOSTILE, run_folder=Path("/x y/%j")),
        SlurmOptions(partition=HOSTILE, extra=[f"--mail-user={HOSTILE}"]),
        python="p",
        secrets_file=None,
    )
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    parsed = [shlex.split(line) for line in options]  # Slurm reads quotes as a shell does: tests/test_slurm.py
    assert [f"--job-name={HOSTILE}"] in parsed
    assert [f"--partition={HOSTILE}"] in parsed
    assert [f"--mail-user={HOSTILE}"] in parsed
    assert ["--output=/x y/%%j/logs/slurm-%j.log"] in parsed


def test_the_ranks_get_what_they_need_and_nothing_of_another_launch(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(secrets_text({"WANDB_API_KEY": HOSTILE}))
    job = replace(CPU, run_folder=tmp_path / "run", working_folder=tmp_path, environment={"LIST": "a,b"})
    _, told, variables = run_by_bash(tmp_path, job, SlurmOptions(), secrets)
    found = dict(line.split("=", 1) for line in variables.splitlines() if "=" in line)
    assert found["MASTER_ADDR"] == "10.1.2.3"
    assert found["MASTER_PORT"] == "11234"
    assert found["LOCKSTEP_WORLD_SIZE"] == "2"
    assert found["LOCKSTEP_LAUNCH"] == "41234-2"
    assert found["ACCELERATE_USE_CPU"] == "true"
    assert found["PYTHONSAFEPATH"] == "1"
    assert found["LIST"] == "a,b"  # sbatch --export would end it at the comma
    assert found["WANDB_API_KEY"] == HOSTILE
    assert not {"RANK", "ACCELERATE_USE_FSDP"} & found.keys()
    assert "python: 41234-2\n" in told
    assert "python: --code\npython: 3\n" in told
    assert not secrets.exists()  # the decision was not to requeue


def test_a_job_that_slurm_itself_started_too_often_trains_no_more(tmp_path: Path) -> None:
    job = replace(CPU, run_folder=tmp_path / "run", working_folder=tmp_path, max_requeues=1)
    with pytest.raises(FileNotFoundError):  # srun was never called
        run_by_bash(tmp_path, job, SlurmOptions())


def test_two_jobs_on_a_node_meet_at_different_ports_below_the_systems_own(tmp_path: Path) -> None:
    (line,) = [
        line for line in script(CPU, SlurmOptions(), python="p", secrets_file=None).splitlines() if "10000 +" in line
    ]

    def port(job: int) -> int:
        shell = f"SLURM_JOB_ID={job}; {line}; echo $MASTER_PORT"
        return int(subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout)

    ports = [port(job) for job in (1, 2, 19_999, 20_000, 67_108_863)]
    assert len(set(ports)) == 5
    assert all(1024 < port < 32_768 for port in ports)


def test_no_secret_is_in_the_script() -> None:
    text = script(GPU, SlurmOptions(), python="p", secrets_file=Path("/s"))
    assert "WANDB_API_KEY" not in text
    with pytest.raises(ConfigurationError, match="HF_TOKEN: is a secret"):
        replace(GPU, environment={"HF_TOKEN": "x"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "a\n#SBATCH --wrap=x"}, "name: contains a line break"),
        ({"overrides": ["name=a\rb"]}, "override 'name': contains a line break"),
        ({"environment": {"A": "x\ny"}}, "variable 'A': contains a line break"),
        ({"environment": {"A;B": "x"}}, "'A;B': is not a valid environment variable name"),
        ({"run_folder": Path("/a\nb")}, "output: contains a line break"),
    ],
)
def test_what_could_begin_a_line_of_its_own_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        replace(CPU, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": "a\nb"}, "--partition: contains a line break"),
        ({"partition": ""}, "--partition: is empty"),
        ({"container": "registry.example/a/b:1"}, "needs a # after the registry, as in 'registry.example#a/b:1'"),
        ({"container": "localhost:5000/a"}, "'localhost:5000#a'"),
        ({"mounts": ["/data"]}, "--container-mount: needs --container"),
        ({"container": "a", "mounts": ["data:/data"]}, "'data:/data' must have absolute paths"),
        ({"container": "a", "mounts": ["/a,/b"]}, "'/a,/b' must have absolute paths"),
        ({"container": "a", "mounts": ["/$(id):/b"]}, "must have absolute paths"),
        ({"container": "a", "mounts": ["/a:/b:rw"]}, "'/a:/b:rw' ends in 'rw'; only ro is allowed"),
        ({"container": "a", "mounts": ["/a\nb"]}, "--container-mount: contains a line break"),
        ({"extra": ["mem=3"]}, "'mem=3' is not of the form --option"),
        ({"extra": ["--mem=3 --wrap=x\n"]}, "--sbatch: contains a line break"),
        ({"extra": ["--signal=USR1@5"]}, "--signal is set by Lockstep"),
        ({"extra": ["--container-image=a"]}, "--container-image would run the job script itself in a container"),
        ({"extra": ["--no-requeue"]}, "--no-requeue is set by Lockstep"),
    ],
)
def test_options_that_would_break_the_script_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        SlurmOptions(**options)  # type: ignore[arg-type]


def test_a_folder_in_which_slurm_would_not_number_its_logs_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="contains a backslash"):
        script(replace(CPU, run_folder=Path("/a\\b")), SlurmOptions(), python="p", secrets_file=None)


@pytest.mark.parametrize(
    "image", ["lockstep:1", "user/lockstep:1", "registry.example#a/b:1", "/images/a b.sqsh", "me@host.example#a/b"]
)
def test_an_image_is_written_as_pyxis_reads_it(image: str) -> None:
    assert SlurmOptions(container=image).container == image


@pytest.mark.parametrize(("key", "path"), [("run_folder", "/a,b"), ("run_folder", "/a:b"), ("working_folder", "/a$b")])
def test_a_folder_that_pyxis_would_take_for_two_is_refused(key: str, path: str) -> None:
    job = replace(CPU, **{key: Path(path)})  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="which --container cannot mount"):
        script(job, SlurmOptions(container="a"), python="p", secrets_file=None)
    assert script(job, SlurmOptions(), python="p", secrets_file=None)


def test_what_the_script_sets_is_set_in_a_container_too_whatever_its_image_says(tmp_path: Path) -> None:
    """srun gets the names of all that the script has added to the environment, by pyxis's --container-env."""
    secrets = tmp_path / "secrets"
    secrets.write_text(secrets_text({"WANDB_API_KEY": "hush"}))
    job = replace(
        CPU,
        run_folder=tmp_path / "run",
        working_folder=tmp_path,
        environment={"NCCL_DEBUG": "WARN"},
        secrets=["WANDB_API_KEY"],
    )
    _, told, variables = run_by_bash(tmp_path, job, SlurmOptions(container="a", interface="ib0"), secrets)
    (names,) = [
        line.partition("=")[2].split(",") for line in told.splitlines() if line.startswith("srun: --container-env=")
    ]
    added = {line.partition("=")[0] for line in variables.splitlines()} - {
        "PATH",
        "TOLD",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
    }
    assert {*names} == {name for name in added if not name.startswith("SLURM_")}
    assert "hush" not in told
    assert f"srun: --container-mounts={tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run\n" in told


def test_the_warning_leaves_time_to_save_but_at_most_half_of_the_limit() -> None:
    assert warning_seconds(replace(CPU, grace_seconds=120, time_limit_seconds=3600)) == 150
    assert warning_seconds(replace(CPU, grace_seconds=120, time_limit_seconds=60)) == 30
    assert warning_seconds(replace(CPU, grace_seconds=300, time_limit_seconds=None)) == 330
