"""Specification of a job to start: on this machine, on several by hand, by Slurm, by Kubernetes.

Options of one scheduler (a partition, an image pull secret) are in that scheduler's module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.config.file import SECRET_ENDINGS
from runtime.errors import ConfigurationError, Problem

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One run to start.

    Args:
        script: path of the entry point, such as ``runtime/train.py``.
        config: path of the YAML file, or of a run folder where the entry point takes one.
        overrides: ``key.path=value``, and the entry point's options.
        nodes: number of machines.
        processes_per_node: processes on each machine; one per GPU if GPUs are used.
        use_gpus: whether each process gets a GPU.
        name: name of the run; one line of text.
        run_folder: output folder of the run; the same path on every node. Absolute if a scheduler starts the job.
        working_folder: base of relative paths in the configuration. Default: the current folder.
        environment: variables for the processes; no secrets, since they are written to scripts and manifests.
        secrets: names of secret variables for the processes; their values are passed separately.
        time_limit_seconds: time limit of one start. Default: the scheduler's.
        grace_seconds: time from the stop request until the last save must be done.
        silence_seconds: time that the other ranks need to detect a lost rank; they must not be killed earlier.
        max_requeues: how often the scheduler may restart the job automatically.
        image: container image. Default: none, or that of the scheduler's options.

    Raises:
        ConfigurationError: values that a script or manifest cannot hold, all mistakes at once.
    """

    script: Path
    config: Path
    overrides: Sequence[str] = ()
    nodes: int = 1
    processes_per_node: int = 1
    use_gpus: bool = False
    name: str = "run"
    run_folder: Path | None = None
    working_folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    time_limit_seconds: int | None = None
    grace_seconds: float = 120.0
    silence_seconds: float = 60.0
    max_requeues: int = 20
    image: str | None = None

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigurationError(problems)

    @property
    def processes(self) -> int:
        """Number of processes on all machines."""
        return self.nodes * self.processes_per_node

    def _problems(self) -> Iterator[Problem]:
        texts = {
            "CONFIG": str(self.config),
            "name": self.name,
            "output": str(self.run_folder or ""),
            "working folder": str(self.working_folder or ""),
            "image": self.image or "",
            **{f"override {text.partition('=')[0]!r}": text for text in self.overrides},
            **{f"variable {name!r}": value for name, value in self.environment.items()},
        }
        for key, text in texts.items():
            yield from refuse_control_characters(key, text)
        for name in (*self.environment, *self.secrets):
            if not _VARIABLE.fullmatch(name):
                what = "is not a valid environment variable name (letters, digits and _, not starting with a digit)"
                yield Problem("command line", repr(name), what)
        for name in self.environment:
            if is_secret(name):
                yield Problem(
                    "command line", name, "is a secret, and secrets are never written to scripts or manifests"
                )


def is_secret(name: str) -> bool:
    """Return whether a variable or key is a secret, by the ending of its name."""
    return name.upper().endswith(SECRET_ENDINGS)


def refuse_control_characters(key: str, text: str) -> Iterator[Problem]:
    """Refuse control characters: a line break could start a line that a scheduler or shell executes."""
    if any(ord(character) < 32 or character in "\x7f\x85\u2028\u2029" for character in text):
        yield Problem("command line", key, f"contains a line break or another control character: {text!r}")
