"""What users may import, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lockstep
from runtime import errors

NAMES = [
    *("InferenceResult", "Loss", "Objective", "RunResult", "StepReport", "StopReason", "TrackedRun", "Tracker"),
    *("errors", "evaluate", "predict", "train"),
]


def test_the_package_exports_these_names() -> None:
    assert sorted(lockstep.__all__) == dir(lockstep) == NAMES
    for name in NAMES:
        assert getattr(lockstep, name) is not None


def test_every_error_is_exported() -> None:
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert {*raised, "Problem"} == set(lockstep.errors.__all__)
    assert all(getattr(lockstep.errors, name) is getattr(errors, name) for name in lockstep.errors.__all__)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        lockstep.fit  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = "import lockstep, lockstep.errors, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
