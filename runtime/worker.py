"""Shared body of the entry scripts ``train.py``, ``evaluate.py``, ``predict.py`` and ``doctor.py``, which set COMMAND.

Python puts the script's folder first on ``sys.path``, where modules of ``runtime/`` could shadow others; it is removed
before anything else is imported.
"""

import sys
from pathlib import Path

_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE]


def _check_package() -> None:
    try:
        import runtime
    except ImportError:
        sys.exit("Lockstep is not installed in this Python: run `make venv`, or pip install lockstep-train")
    if not (runtime.__doc__ or "").startswith("Lockstep"):
        sys.exit(
            f"another package is called 'runtime' and comes first on sys.path: {runtime.__file__}; move or rename it"
        )


if __name__ == "__main__":
    _check_package()
    from runtime.guarded import guarded
    from runtime.launched import run

    command: str = globals()["COMMAND"]
    sys.exit(guarded(lambda: run(command, sys.argv[1:])))
