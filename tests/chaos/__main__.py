"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tests.chaos
from tests.chaos.attacks import KINDS
from tests.chaos.processes import adopt_orphans
from tests.chaos.report import table
from tests.chaos.runner import Runner


def main(arguments: list[str]) -> int:
    """Run campaigns until enough attacks have struck; return 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=tests.chaos.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="attacks that have to strike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND", action="append", choices=KINDS, help=", ".join(KINDS))
    parser.add_argument("--campaign", type=int, help="only the one of this number")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 3], help="numbers of processes")
    parser.add_argument("--real", type=float, default=0.08, help="share of starts that are true launches")
    parser.add_argument("--table", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    adopt_orphans()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    runner = Runner(
        folder,
        seed=options.seed,
        real_share=options.real,
        kinds=options.only or list(KINDS),
        sizes=sorted(options.sizes),
    )
    try:
        runner.make_references()
        numbers = [options.campaign] if options.campaign is not None else itertools.count()
        for number in numbers:
            if runner.struck >= options.kills:
                break
            runner.run_campaign(number)
            so_far = f"{runner.struck} attacks, {len(runner.failures)} failures"
            print(f"{time.monotonic() - began:6.1f} s  campaign {number}: {so_far}", flush=True)
    finally:
        runner.close()
    summary = [
        table(runner.rows),
        "",
        f"{runner.struck} attacks in {time.monotonic() - began:.0f} s, seed {options.seed}; {runner.missed} more hit nothing.",
        *(f"- {text} ({count} campaigns)" for text, count in sorted(runner.remarks.items())),
    ]
    print("\n".join(summary))
    if options.table is not None:
        options.table.write_text("\n".join(summary) + "\n")
    for failure in runner.failures:
        print(f"\nFAILED: {failure}")
    if not runner.failures:
        shutil.rmtree(folder)
    return 1 if runner.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
