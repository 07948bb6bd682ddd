"""Entry point: ``accelerate launch runtime/evaluate.py CONFIG|RUN [options] [key.path=value …]``.

Python puts this file's own folder first on ``sys.path``, where ``runtime/``'s modules could shadow others; so it is taken
off again before anything else is imported: this very file would stand for Hugging Face's library ``evaluate``.
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
    from runtime.entry import guarded, infer

    sys.exit(guarded(lambda: infer("evaluate", sys.argv[1:])))
