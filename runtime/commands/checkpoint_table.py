"""The output of ``lockstep checkpoints``: a table of a run's checkpoints, and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from runtime.checkpoints.inspection import CheckpointInfo, CheckpointListing
from runtime.wording import in_units

_STYLES = {"whole": "green", "damaged": "red", "newer format": "red", "moved aside": "yellow"}


def print_listing(listing: CheckpointListing, console: Console) -> None:
    """Print the table, then notes: problems, and what the next start will do."""
    if not listing.checkpoints:
        console.print(f"{listing.folder} holds no checkpoints", soft_wrap=True, markup=False)
    else:
        _print_table(listing, console)
    for note in (*_remarks(listing), *listing.notes):
        console.print(note, soft_wrap=True, markup=False)


def _print_table(listing: CheckpointListing, console: Console) -> None:
    """Print one line for each checkpoint; in a narrow terminal two, the name on its own line."""
    metrics, hidden = _metrics(listing), list[str]()
    table = _table(listing, metrics, with_names=True)
    if _width(table, console) <= console.width:
        console.print(table)
        return
    table, digests = _table(listing, metrics, with_names=False), True
    while (metrics or digests) and _width(table, console) > console.width:
        hidden.insert(0, "digest" if digests else metrics.pop())
        digests = False
        table = _table(listing, metrics, with_names=False, digests=False)
    heading, rule, *rows = ([*line, Segment.line()] for line in console.render_lines(table, pad=False))
    console.print(Segments([*heading, *rule]), end="")
    for i, line in zip(listing.checkpoints, rows, strict=True):
        console.print(Text(i.name, style="" if i.in_use else "dim"), soft_wrap=True)
        console.print(Segments(line), end="")
    if hidden:
        console.print(
            f"columns not shown: {', '.join(hidden)} (use --json, or a wider terminal)", soft_wrap=True, markup=False
        )


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(width=10_000)).maximum


def _table(listing: CheckpointListing, metrics: Sequence[str], *, with_names: bool, digests: bool = True) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    attempts = any(i.attempt for i in listing.checkpoints)
    if with_names:
        table.add_column("checkpoint", no_wrap=True)
    for heading in (
        "step",
        "epoch",
        *(["attempt"] if attempts else []),
        *metrics,
        "size",
        "age",
        *(["digest"] if digests else []),
    ):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for i in listing.checkpoints:
        state = "abandoned" if i.abandoned and i.state == "whole" else i.state
        table.add_row(
            *([Text(i.name)] if with_names else []),
            str(i.step),
            str(i.epoch or ""),
            *([str(i.attempt)] if attempts else []),
            *(_result(i, metric) for metric in metrics),
            in_units(i.size_bytes),
            _age(i.age_seconds),
            *([i.digest] if digests else []),
            Text(state, style=_STYLES.get(state, "")),
            style="" if i.in_use else "dim",
        )
    return table


def _metrics(listing: CheckpointListing) -> list[str]:
    """Return the results that get a column: the loss and the metrics of ``best.json``; without that file, all."""
    numbers = {n: None for i in listing.checkpoints for n, v in i.results.items() if isinstance(v, float)}
    if listing.best:
        return [name for name in dict.fromkeys(("loss", *listing.best)) if name in numbers]
    return [name for name in numbers if name != "samples"]


def _result(inspected: CheckpointInfo, metric: str) -> Text:
    value = inspected.results.get(metric)
    if not isinstance(value, float):
        return Text("")
    place = inspected.best_of.get(metric)
    return Text(f"{value:.4g}" + (f" #{place}" if place else ""), style="bold" if place == 1 else "")


def _remarks(listing: CheckpointListing) -> Iterator[str]:
    """Yield notes below the table: what its marks mean, what is wrong, and what the next start will do."""
    if any(i.best_of for i in listing.checkpoints):
        yield "#1: the best of its metric (best.json)"
    if any(i.abandoned for i in listing.checkpoints):
        yield "abandoned: a rollback returned to an earlier checkpoint; a start never reads it, the next save removes it"
    for i in listing.checkpoints:
        if i.state == "damaged":
            yield f"{i.name} is damaged ({i.problem}); " + (
                "a rollback abandoned it" if i.abandoned else "a start that tries it moves it aside"
            )
        elif i.state == "moved aside":
            yield f"{i.name} was moved aside as damaged ({i.problem or 'all of it can be read now'})"
        elif i.state == "newer format":
            yield f"{i.name} {i.problem}"
        elif i.state == "partial":
            yield f"{i.name} is being written, or was when its writer was killed; the next start removes it"
    if listing.goes_on_from is not None:
        yield f"The next start resumes from {listing.goes_on_from.name}."
    elif listing.newest is not None and any(i.state == "newer format" for i in listing.checkpoints):
        yield "The next start is refused."
    elif not listing.sound:
        yield "No checkpoint to resume from: the next start begins at step 0."


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
