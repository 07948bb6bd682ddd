"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import queue
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import tests.mutants
from tests.mutants.mutant import Mutant
from tests.mutants.workplace import ROOT, Verdict, Workplace
from tests.mutants.zoo import MUTANTS


def main(arguments: list[str]) -> int:
    """Let the tests look for every mutant; return 1 if one survived or cannot be judged."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=tests.mutants.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", metavar="WORDS", action="append", help="mutants with this in their name or file")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    parser.add_argument("--workers", type=int, default=1, help="how many run at the same time, each in its own copy")
    parser.add_argument("--limit-seconds", type=float, default=600.0, help="in which a mutant's tests have to end")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass without a mutant")
    parser.add_argument("--table", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or any(word in f"{m.name} {m.file}" for word in options.only)]
    if options.list:
        print("\n".join(f"{mutant.file}  {mutant.name}" for mutant in chosen))
        return 0
    problems = [problem for mutant in chosen if (problem := mutant.problem(ROOT)) is not None]
    if problems or not chosen:
        print("\n".join(problems) or "no mutant has such a name", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        return _judge(chosen, folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judge(chosen: list[Mutant], folder: Path, options: argparse.Namespace) -> int:
    began = time.monotonic()
    places = [Workplace(folder / str(n), limit_seconds=options.limit_seconds) for n in range(options.workers)]
    if not options.no_baseline:
        every_test = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        without = places[0].run(every_test, limited=False)
        if without.failed:
            print(f"{without.by} fails without any mutant:\n{without.output[-4000:]}", file=sys.stderr)
            return 1
        print(f"{without.seconds:6.0f} s  all tests pass without a mutant", flush=True)
    verdicts = _verdicts(chosen, places)
    summary = table(chosen, verdicts)
    survivors = [mutant.name for mutant in chosen if not verdicts[mutant.name].failed]
    killed = len(chosen) - len(survivors)
    print(f"\n{summary}\n\n{killed} of {len(chosen)} mutants killed in {time.monotonic() - began:.0f} s.")
    if options.table is not None:
        options.table.write_text(f"{heading(len(chosen), killed)}\n{summary}\n")
    for name in survivors:
        print(f"SURVIVED: {name}")
    return 1 if survivors else 0


def _verdicts(chosen: list[Mutant], places: list[Workplace]) -> dict[str, Verdict]:
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in chosen:
        waiting.put(mutant)
    verdicts: dict[str, Verdict] = {}
    failures: list[BaseException] = []

    def work(place: Workplace) -> None:
        try:
            while not failures:
                mutant = waiting.get_nowait()
                verdict = verdicts[mutant.name] = place.run_with(mutant)
                told = f"killed by {verdict.by}" if verdict.failed else "SURVIVED"
                print(f"{verdict.seconds:6.0f} s  {mutant.name}: {told}", flush=True)
        except queue.Empty:
            return
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return verdicts


def heading(total: int, killed: int) -> str:
    """Return what stands above the table in the note."""
    return (
        "# Mutants: who notices\n\n"
        "`make mutants` puts one error at a time into a copy of the tree and runs the tests that should notice; the first\n"
        f"that fails is named. {killed} of {total} were killed. A survivor means that a test is missing.\n"
    )


def table(chosen: list[Mutant], verdicts: dict[str, Verdict]) -> str:
    """Return who killed which mutant, in Markdown."""
    lines = ["| file | mutant | killed by | seconds |", "|---|---|---|---|"]
    for mutant in chosen:
        verdict = verdicts[mutant.name]
        by = f"`{verdict.by.removeprefix('tests/')}`" if verdict.failed else "**survived**"
        lines.append(f"| `{mutant.file.removeprefix('runtime/')}` | {mutant.name} | {by} | {verdict.seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
