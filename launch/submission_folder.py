"""The folder of a submission within the run folder, for every scheduler: ``jobs/TIME/``.

It holds ``job.sh``, the YAML, ``code/`` (a copy), ``submission.json``, ``changes.diff`` (uncommitted changes), and the secret
variables in a file that only its owner can read, which is deleted when the job is done.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from launch.code_copy import revision, snapshot
from launch.job import JobSpec
from runtime.config.file import LoadedConfiguration
from runtime.errors import SchedulerError
from runtime.run_files import RunFiles

SCRIPT = "job.sh"
SECRETS = "secrets"


def new_folder(run: Path) -> Path:
    """Return the path of a new submission's folder, which does not exist yet."""
    return RunFiles(run).jobs / time.strftime("%Y%m%d-%H%M%S")


def absolute_paths(loaded: LoadedConfiguration, folder: Path) -> list[str]:
    """Return overrides with absolute paths for keys relative to the YAML file, since the job reads a copy of it."""
    overrides = [f"code={json.dumps(str(folder / 'code'))}"]  # a JSON string is a YAML string, whatever it holds
    if (weights := loaded.values.model.weights) is not None:
        overrides.append(f"model.weights.file={json.dumps(str(loaded.where.beside(weights.file).absolute()))}")
    return overrides


def write(loaded: LoadedConfiguration, job: JobSpec, folder: Path, *, script: str, secrets: Mapping[str, str]) -> None:
    """Write the submission's folder; remove it again if anything fails.

    Args:
        folder: from :func:`new_folder`; ``job.config`` must be inside it.
        script: text of the job script.
        secrets: values of the secret variables.

    Raises:
        SchedulerError: the folder cannot be written.
    """
    assert loaded.source is not None
    try:
        folder.mkdir(parents=True)
        RunFiles(folder.parent.parent).logs.mkdir(exist_ok=True)  # Slurm does not create the folder of a log
        snapshot(loaded.code, folder / "code", loaded.where)
        shutil.copyfile(loaded.source, job.config)
        state = revision(loaded.code)
        if state.changes:
            (folder / "changes.diff").write_bytes(state.changes)
        if secrets:
            with os.fdopen(os.open(folder / SECRETS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets_text(dict(secrets)))
        (folder / SCRIPT).write_text(script)
        record = {
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config": str(loaded.source.resolve()),
            "overrides": list(job.overrides),
            "nodes": job.nodes,
            "processes": job.processes,
            "commit": state.commit,
            "changes": "cut" if state.cut else "whole" if state.changes else "none",
        }
        (folder / "submission.json").write_text(json.dumps(record, indent=2) + "\n")
    except FileExistsError as error:
        raise SchedulerError(
            f"{folder} already exists: another submission was made in the same second; try again"
        ) from error
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SchedulerError(f"the submission cannot be written to {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def secrets_text(values: dict[str, str]) -> str:
    """Return the shell file that sets secret variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(values.items()))
