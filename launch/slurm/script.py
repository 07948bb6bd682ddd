"""Generate the job script for Slurm, from a job's description and ``launch/templates/slurm.sh``.

Every value is quoted for the shell, in ``#SBATCH`` lines too, where Slurm parses quotes as a shell does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from launch.job import JobSpec, refuse_control_characters
from launch.slurm import pyxis
from runtime.errors import ConfigurationError, Problem

COMMENT = "lockstep:"  # followed by the run folder: marks Lockstep's jobs in the queue
_RESERVED = (
    "array", "comment", "error", "export", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue",
    "no-requeue", "signal", "wait", "wrap",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options of Slurm.

    Args:
        cpus_per_process: cores per process. Default: the partition's.
        interface: network interface for the ranks. Default: the one that leads to the first node's address.
        container: image that the ranks run in, with srun's plugin pyxis.
        mounts: additional mounts of the container, as ``PATH[:PATH[:ro]]``.
        extra: further options of sbatch, such as ``--mem=64G``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_process: int | None = None
    interface: str | None = None
    container: str | None = None
    mounts: Sequence[str] = ()
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigurationError(problems)

    def _problems(self) -> Iterator[Problem]:
        for name in ("partition", "account", "qos", "constraint", "interface", "container"):
            value = getattr(self, name)
            if value is not None:
                yield from refuse_control_characters(f"--{name}", value)
                if not value:
                    yield Problem("command line", f"--{name}", "is empty")
        for text in self.mounts:
            yield from refuse_control_characters("--container-mount", text)
        yield from pyxis.problems_of_options(self.container, self.mounts)
        for text in self.extra:
            yield from refuse_control_characters("--sbatch", text)
            name = text.removeprefix("--").partition("=")[0]
            if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.+)?", text, re.DOTALL):
                yield Problem("command line", "--sbatch", f"{text!r} is not of the form --option or --option=value")
            elif name.startswith("container"):
                what = f"--{name} would run the job script itself in a container; use --container for its processes"
                yield Problem("command line", "--sbatch", what)
            elif name in _RESERVED:
                yield Problem("command line", "--sbatch", f"--{name} is set by Lockstep and cannot be changed")


_PLACEHOLDER = re.compile(r"@\{([a-z_]+)\}")


def script(
    job: JobSpec, options: SlurmOptions, *, python: str, secrets_file: Path | None, module: str | None = None
) -> str:
    """Return the job script.

    Args:
        job: with an absolute run folder and working folder.
        python: the interpreter on the nodes.
        secrets_file: shell file that sets the secret variables; readable only by its owner.
        module: the entry point as a module, if the script's path does not exist on the nodes, as in a container.

    Raises:
        ConfigurationError: Slurm cannot write a log to the run folder, or a container cannot mount a folder.
    """
    assert job.run_folder is not None
    assert job.working_folder is not None
    folder = str(job.run_folder)
    if "\\" in folder:
        what = f"{folder!r} contains a backslash, which keeps Slurm from filling in the job id in the names of logs"
        raise ConfigurationError([Problem("command line", "output", what)])
    if options.container is not None and (problems := list(pyxis.problems_of_folders(job))):
        raise ConfigurationError(problems)
    log = f"{folder.replace('%', '%%')}/logs/slurm-%j.log"  # Slurm fills in %j; other % are escaped
    entry = ["-m", module] if module is not None else [str(job.script)]
    line = ["python3" if options.container else python, *entry, str(job.config), *job.overrides]
    template = files("launch").joinpath("templates", "slurm.sh").read_text()
    values = {
        "nodes": job.nodes,
        "processes": job.processes,
        "processes_per_node": job.processes_per_node,
        "job_name": shlex.quote(job.name),
        "comment": shlex.quote(f"{COMMENT}{folder}"),
        "log": shlex.quote(log),
        "warning_seconds": warning_seconds(job),
        "directives": "".join(f"#SBATCH {line}\n" for line in _directives(job, options)),
        "python": shlex.quote(python),
        "run_folder": shlex.quote(folder),
        "working_folder": shlex.quote(str(job.working_folder)),
        "secrets_file": shlex.quote(str(secrets_file)) if secrets_file is not None else "",
        "environment": "\n".join(_exports(job, options)),
        "wait_seconds": round(job.silence_seconds + 10),
        "step_options": "".join(f"{option} " for option in _step_options(job, options)),
        "command": shlex.join(line),
        "max_requeues": job.max_requeues,
    }
    return _PLACEHOLDER.sub(
        lambda match: str(values[match[1]]), template
    )  # one pass: a value may look like a placeholder


def warning_seconds(job: JobSpec) -> int:
    """Return how long before the time limit the run is asked to stop: grace time plus margin, at most half the limit."""
    wanted = round(job.grace_seconds) + 30
    return wanted if job.time_limit_seconds is None else min(wanted, job.time_limit_seconds // 2)


def _directives(job: JobSpec, options: SlurmOptions) -> Iterator[str]:
    if job.time_limit_seconds is not None:
        yield f"--time={_time(job.time_limit_seconds)}"
    if job.use_gpus:
        yield f"--gpus-per-node={job.processes_per_node}"
    if options.cpus_per_process is not None:
        yield f"--cpus-per-task={options.cpus_per_process}"
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(options, name)) is not None:
            yield f"--{name}={shlex.quote(value)}"
    for text in options.extra:
        name, equals, value = text.partition("=")
        yield f"{name}{equals}{shlex.quote(value) if equals else ''}"


def _time(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"


def _exports(job: JobSpec, options: SlurmOptions) -> Iterator[str]:
    if not job.use_gpus:
        yield "export ACCELERATE_USE_CPU=true  # without it, processes on CPUs form no group"
    if options.interface is not None:
        # By default gloo uses the interface that the host name resolves to, which is loopback on many clusters; NCCL the
        # first one that looks fast.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            yield f"export {name}={shlex.quote(options.interface)}"
    if options.container is not None:
        yield "export PYTHONNOUSERSITE=1  # the home folder, if mounted, may hold packages for another Python"
    for name, value in job.environment.items():
        yield f"export {name}={shlex.quote(value)}"


def _step_options(job: JobSpec, options: SlurmOptions) -> Iterator[str]:
    if options.container is not None:
        names = [line.removeprefix("export ").partition("=")[0] for line in _exports(job, options)]
        yield from pyxis.step_options(job, options.container, options.mounts, variables=names)
