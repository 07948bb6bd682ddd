"""The ranks of a Slurm job in containers: what srun is told where NVIDIA's plugin pyxis is installed.

The batch script itself runs outside. So secrets are read from their file there, and reach the ranks as variables.

References: https://github.com/NVIDIA/pyxis (v0.24), README, ``args.c`` and ``pyxis_slurmstepd.c``; https://github.com/NVIDIA/enroot.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from launch.job import JobSpec
from runtime.errors import Problem

# A comma and a colon would end a path in --container-mounts; the others mean something in the shell script made of it.
_NOT_MOUNTED = re.compile(r'[,:"$`\\]')
_SET_BY_THE_SCRIPT = (
    *("MASTER_ADDR", "MASTER_PORT", "LOCKSTEP_WORLD_SIZE", "LOCKSTEP_LAUNCH"),
    *("OMP_NUM_THREADS", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"),
)


def step_options(job: JobSpec, image: str, mounts: Sequence[str], *, variables: Iterable[str]) -> Iterator[str]:
    """Yield srun's options, quoted for a shell.

    Args:
        mounts: ``PATH[:PATH[:ro]]``, beside the working folder and the run folder, which holds the YAML and the code.
        variables: names of those that the script sets for this job.
    """
    assert job.run_folder is not None
    ours = (f"{path}:{path}" for path in dict.fromkeys((job.working_folder, job.run_folder)))
    yield f"--container-image={shlex.quote(image)}"
    yield f"--container-mounts={shlex.quote(','.join([*ours, *mounts]))}"
    yield f"--container-workdir={shlex.quote(str(job.working_folder))}"
    # An image's own first process would stand between Slurm's signals and the ranks.
    yield "--no-container-entrypoint"
    # Otherwise what the image sets wins, and NVIDIA's hook for images with PyTorch sets MASTER_PORT.
    yield f"--container-env={','.join(dict.fromkeys([*_SET_BY_THE_SCRIPT, *variables, *job.environment, *job.secrets]))}"


def problems_of_options(image: str | None, mounts: Sequence[str]) -> Iterator[Problem]:
    """Yield what is wrong with an image and with mounts."""
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
        written = image.replace("/", "#", 1)
        what = f"{image!r} would be looked for at Docker Hub: pyxis wants a # after the registry, {written!r}"
        yield Problem("command line", "--container", what)
    for text in mounts:
        source, _, rest = text.partition(":")
        target, colon, mode = rest.partition(":")
        paths = [source, *([target] if rest else [])]
        if not all(PurePosixPath(path).is_absolute() and not _NOT_MOUNTED.search(path) for path in paths):
            yield Problem("command line", "--container-mount", f"{text!r} is not of absolute paths: PATH[:PATH[:ro]]")
        elif colon and mode != "ro":
            yield Problem("command line", "--container-mount", f"{text!r} ends in {mode!r}, which is not ro")


def problems_of_folders(job: JobSpec) -> Iterator[Problem]:
    """Yield folders of a job that pyxis cannot mount."""
    for key, path in (("output", job.run_folder), ("working folder", job.working_folder)):
        if found := _NOT_MOUNTED.search(str(path)):
            yield Problem("command line", key, f"{str(path)!r} holds {found[0]!r}, which --container cannot mount")
