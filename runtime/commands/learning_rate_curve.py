"""Plots of a run's learning rates: as text for a terminal, or as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.errors import ConfigurationError, MissingDependencyError, Problem
from runtime.optimization.planned_rates import PlannedRates

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column
_BRAILLE = 0x2800
_SUFFIXES = (".png", ".svg", ".pdf")


def drawn(curve: PlannedRates, *, width: int = 44, height: int = 9) -> Iterator[str]:
    """Draw the curve of each group in braille dots, one line at a time, with axes.

    Args:
        width: of the drawing, in characters; with labels, the default fits into 80 columns.
        height: in lines; odd, so that one line is in the middle.
    """
    highest = max(max(rates) for rates in curve.rates)
    lowest = min(min(rates) for rates in curve.rates)
    bottom = 0.0 if lowest <= highest / 2 or lowest == highest else lowest
    cells = [[0] * width for _ in range(height)]
    for rates in curve.rates:
        _dot(cells, rates, bottom=bottom, top=highest)
    labels = {0: highest, height // 2: (highest + bottom) / 2, height - 1: bottom}
    texts = {row: f"{value:.3g}" for row, value in labels.items()}
    margin = max(map(len, texts.values()))
    for row, line in enumerate(cells):
        drawing = "".join(chr(_BRAILLE + dots) if dots else " " for dots in line).rstrip()
        yield f"{texts.get(row, ''):>{margin}} {'┤' if row in texts else '│'}{drawing}"
    yield f"{'':>{margin}} └{_axis(curve, width)}"
    yield f"{'':>{margin}}  {_step_labels(curve, width)}"


def _dot(cells: list[list[int]], rates: Sequence[float], *, bottom: float, top: float) -> None:
    """Set the dots of a curve; neighbouring columns are joined by a vertical line."""
    columns, rows = 2 * len(cells[0]), 4 * len(cells)
    last: tuple[int, int] | None = None
    for column in range(columns):
        here = rates[_span(column, columns, len(rates))]
        heights = [_row(rate, bottom, top, rows) for rate in (here or [rates[-1]])]
        low, high = min(heights), max(heights)
        if last is not None:  # join with the previous column
            low, high = min(low, last[1] + 1), max(high, last[0] - 1)
        for row in range(low, high + 1):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        last = (min(heights), max(heights))


def _span(column: int, columns: int, length: int) -> slice:
    start = column * length // columns
    return slice(start, max(start + 1, (column + 1) * length // columns))


def _row(rate: float, bottom: float, top: float, rows: int) -> int:
    share = (rate - bottom) / (top - bottom) if top > bottom else 1.0
    return min(rows - 1, max(0, round((1.0 - share) * (rows - 1))))


def _axis(curve: PlannedRates, width: int) -> str:
    ticks = {round(mark * (width - 1) / 4) for mark in range(5)}
    return "".join("┬" if column in ticks else "─" for column in range(width))


def _step_labels(curve: PlannedRates, width: int) -> str:
    line, shown, before = [" "] * width, len(curve.rates[0]), ""
    for mark in range(5):
        text = f"{max(1, round(shown * mark / 4)):,}"
        centre = round(mark * (width - 1) / 4)
        start = max(0, min(centre - len(text) // 2, width - len(text)))
        if text != before:
            line[start : start + len(text)] = text
        before = text
    return "".join(line).rstrip() + " steps"


def save_picture(curve: PlannedRates, path: Path, *, title: str) -> None:
    """Draw the curve with matplotlib.

    Args:
        path: ends in ``.png``, ``.svg`` or ``.pdf``.
        title: title of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigurationError: the file cannot be written.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigurationError([Problem("command line", "--curve", f"{path} must end in {', '.join(_SUFFIXES)}")])
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "--curve", "plots") from error
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (rates, groups) in enumerate(zip(curve.rates, curve.groups, strict=True), start=1):
        steps = [0.5 + step for step in range(len(rates))]
        label = f"{groups} groups" if groups > 1 else f"group {number}"
        thinned = _thinned(rates)
        axes.plot([steps[i] for i in thinned], [rates[i] for i in thinned], linewidth=1.8, label=label)
    for step, what in curve.marks.items():
        axes.axvline(step, color="0.6", linewidth=0.8, linestyle="--")
        axes.annotate(what, (step, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="top", fontsize=8, color="0.35")  # fmt: skip
    axes.set(xlabel="step", ylabel="learning rate", title=title, xlim=(0, max(1, len(curve.rates[0]))))
    axes.set_ylim(bottom=0, top=1.08 * max(max(rates) for rates in curve.rates))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curve.rates) > 1:
        axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigurationError(
            [Problem("command line", "--curve", f"{path} cannot be written: {error.strerror}")]
        ) from error


def _thinned(rates: Sequence[float], most: int = 4000) -> list[int]:
    """Return the steps to draw: all, or the lowest and the highest of each stretch."""
    if len(rates) <= most:
        return list(range(len(rates)))
    kept = {0, len(rates) - 1}
    for column in range(most // 2):
        span = range(*_span(column, most // 2, len(rates)).indices(len(rates)))
        kept |= {min(span, key=rates.__getitem__), max(span, key=rates.__getitem__)}
    return sorted(kept)
