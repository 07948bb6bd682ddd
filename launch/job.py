"""What is to be started, wherever that is: on this machine, on several by hand, by Slurm, by Kubernetes.

Nothing here belongs to one scheduler; what does (a partition, an image pull secret) is in that scheduler's own module.
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
        nodes: machines.
        processes_per_node: as many on each; one per GPU where there are any.
        use_gpus: whether each process gets a GPU.
        name: of the run; any text of one line.
        run_folder: where the run leaves what it makes; the same path on every node. Absolute where a scheduler starts it.
        working_folder: the folder that relative paths in the configuration are relative to. Default: the starter's own.
        environment: variables that the processes get; nothing secret, since they are written to scripts and manifests.
        secrets: names of secret variables that the processes get; their values go another way.
        time_limit_seconds: how long one start may take. Default: what the scheduler gives.
        grace_seconds: from being asked to stop until the last save is done.
        silence_seconds: how long the other ranks take to name one that is lost; do not end them before.
        max_requeues: how often the scheduler may start the job again by itself.
        image: of the container that it runs in. Default: none, or what the scheduler's own options say.

    Raises:
        ConfigurationError: what no script or manifest could hold, all mistakes at once.
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
        """Processes in all."""
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
                what = "is no name of an environment variable (letters, digits and _, no digit first)"
                yield Problem("command line", repr(name), what)
        for name in self.environment:
            if is_secret(name):
                yield Problem("command line", name, "is a secret, which is never written to a script or manifest")


def is_secret(name: str) -> bool:
    """Tell whether a variable or key is a secret, by how its name ends."""
    return name.upper().endswith(SECRET_ENDINGS)


def refuse_control_characters(key: str, text: str) -> Iterator[Problem]:
    """A line break in a value could end the line it stands in, and begin one that a scheduler or shell obeys."""
    if any(ord(character) < 32 or character in "\x7f\x85\u2028\u2029" for character in text):
        yield Problem("command line", key, f"holds a line break or another control character: {text!r}")
