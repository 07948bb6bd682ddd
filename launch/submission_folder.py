"""What a submission leaves in the run folder, whichever scheduler it is for: ``jobs/TIME/``.

In it are ``job.sh``, the YAML, ``code/`` (a copy), ``submission.json`` and ``changes.diff`` (what was not committed), and the
secret variables in a file for its owner alone, which goes when the job is done.
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
    """Return the folder of a submission that is made now; it is not there yet."""
    return RunFiles(run).jobs / time.strftime("%Y%m%d-%H%M%S")


def settled(loaded: LoadedConfiguration, folder: Path) -> list[str]:
    """Return overrides that say where things are which the YAML says relative to itself, since it is a copy that is read."""
    found = [f"code={json.dumps(str(folder / 'code'))}"]  # JSON's text is YAML's, whatever is in it
    if (weights := loaded.values.model.weights) is not None:
        found.append(f"model.weights.file={json.dumps(str(loaded.where.beside(weights.file).absolute()))}")
    return found


def write(loaded: LoadedConfiguration, job: JobSpec, folder: Path, *, script: str, secrets: Mapping[str, str]) -> None:
    """Put beside the run what the job needs; take it away again if that cannot be done whole.

    Args:
        folder: from :func:`new_folder`; ``job.config`` is to be in it.
        script: the job script's text.
        secrets: variables and their values.

    Raises:
        SchedulerError: it cannot be written.
    """
    assert loaded.source is not None
    try:
        folder.mkdir(parents=True)
        RunFiles(folder.parent.parent).logs.mkdir(exist_ok=True)  # Slurm makes no folder for a log
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
        raise SchedulerError(f"{folder} is there already: another submission of the same second; try again") from error
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SchedulerError(f"what is submitted cannot be written to {folder}: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def secrets_text(values: dict[str, str]) -> str:
    """Return the shell file that sets secret variables."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(values.items()))
