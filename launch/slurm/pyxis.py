"""Options of srun that run a Slurm job's ranks in containers, with NVIDIA's plugin pyxis.

The batch script runs outside the container; it reads the secrets from their file and passes them on as variables.

References: https://github.com/NVIDIA/pyxis (v0.24), README, ``args.c`` and ``pyxis_slurmstepd.c``; https://github.com/NVIDIA/enroot.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from launch.job import JobSpec
from runtime.errors import Problem

# Comma and colon end a path in --container-mounts; the others are special in the shell script that enroot generates.
_NOT_MOUNTABLE = re.compile(r'[,:"$`\\]')
_SET_BY_THE_SCRIPT = (
    *("MASTER_ADDR", "MASTER_PORT", "LOCKSTEP_WORLD_SIZE", "LOCKSTEP_LAUNCH"),
    *("OMP_NUM_THREADS", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"),
)


def step_options(job: JobSpec, image: str, mounts: Sequence[str], *, variables: Iterable[str]) -> Iterator[str]:
    """Yield srun's options, quoted for a shell.

    Args:
        mounts: ``PATH[:PATH[:ro]]``, in addition to the working folder and the run folder, which holds the YAML and the code.
        variables: names of the variables that the script sets for this job.
    """
    assert job.run_folder is not None
    folders = (f"{path}:{path}" for path in dict.fromkeys((job.working_folder, job.run_folder)))
    yield f"--container-image={shlex.quote(image)}"
    yield f"--container-mounts={shlex.quote(','.join([*folders, *mounts]))}"
    yield f"--container-workdir={shlex.quote(str(job.working_folder))}"
    # The image's entrypoint could keep Slurm's signals from the ranks.
    yield "--no-container-entrypoint"
    # Otherwise variables of the image win, and NVIDIA's hook for images with PyTorch sets MASTER_PORT.
    yield f"--container-env={','.join(dict.fromkeys([*_SET_BY_THE_SCRIPT, *variables, *job.environment, *job.secrets]))}"


def problems_of_options(image: str | None, mounts: Sequence[str]) -> Iterator[Problem]:
    """Yield the problems of an image and of mounts."""
    if image is None and mounts:
        yield Problem("command line", "--container-mount", "needs --container")
    registry = (image or "").partition("/")[0]
    if (
        image
        and image != registry
        and registry
        and re.search(r"[.:]", registry.partition("#")[0])
        and "#" not in registry
    ):
        corrected = image.replace("/", "#", 1)
        what = f"{image!r} would be pulled from Docker Hub: pyxis needs a # after the registry, as in {corrected!r}"
        yield Problem("command line", "--container", what)
    for text in mounts:
        source, _, rest = text.partition(":")
        target, colon, mode = rest.partition(":")
        paths = [source, *([target] if rest else [])]
        if not all(PurePosixPath(path).is_absolute() and not _NOT_MOUNTABLE.search(path) for path in paths):
            yield Problem("command line", "--container-mount", f"{text!r} must have absolute paths: PATH[:PATH[:ro]]")
        elif colon and mode != "ro":
            yield Problem("command line", "--container-mount", f"{text!r} ends in {mode!r}; only ro is allowed")


def problems_of_folders(job: JobSpec) -> Iterator[Problem]:
    """Yield a problem for each folder of a job that pyxis cannot mount."""
    for key, path in (("output", job.run_folder), ("working folder", job.working_folder)):
        if match := _NOT_MOUNTABLE.search(str(path)):
            yield Problem("command line", key, f"{str(path)!r} contains {match[0]!r}, which --container cannot mount")
