"""Entry point: ``accelerate launch runtime/doctor.py CONFIG``: see worker.py, which it runs."""

from pathlib import Path
from runpy import run_path

run_path(str(Path(__file__).with_name("worker.py")), {"COMMAND": "doctor"}, run_name="__main__")
