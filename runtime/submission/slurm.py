"""``lockstep submit slurm``: a job script, what it needs beside the run, and sbatch."""

from __future__ import annotations

import argparse

from runtime.submission.options import add_job_options, described, variables


def add(schedulers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lockstep submit slurm``."""
    parser = schedulers.add_parser("slurm", help="submit to Slurm")
    add_job_options(parser)
    parser.add_argument("--partition", help="where Slurm's default is not wanted")
    parser.add_argument("--account", help="whom the job is charged to")
    parser.add_argument("--qos", help="quality of service")
    parser.add_argument("--constraint", help="features that the nodes must have")
    parser.set_defaults(run=_submit)


def _submit(options: argparse.Namespace) -> int:
    from runtime.config.file import load

    loaded = load(options.config, options.overrides)
    described(loaded, options, variables(options.env))
    return 0
