"""Tables per class, confusion matrices and curves of evaluations, as files in the run folder: ``figures/step-…/``. Rank 0.

They are kept for the newest evaluation and for those whose checkpoint is kept, including the best ones.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.evaluation.class_results import ClassResults
from runtime.evaluation.metrics import Result
from runtime.reporting.tracker import Tracker
from runtime.run_files import RunFiles
from runtime.state.durable_files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_STEP = re.compile(r"step-(\d{8})")
_MOST_NUMBERED = 20  # classes up to which counts are written into the matrix
_MOST_NAMED = 60  # classes up to which names fit next to it
_MOST_LABELS = 36  # labels with a matrix each
_MOST_COLOURED = 10  # curves with a distinct colour; the others are grey
_TITLES = {"roc": "ROC", "precision_recall": "Precision and recall"}
_AXES = {"roc": ("false positive rate", "true positive rate"), "precision_recall": ("recall", "precision")}


class FiguresTracker(Tracker):
    """Writes tables and pictures at each evaluation. A failure to write or draw is warned of once and ends no run.

    Args:
        folder: the run folder.
        classes: extracts tables, matrices and curves from the results.
        pictures: whether to draw; tables are always written.
        resumed_step: steps completed before this start; figures of later steps are removed.
        warn: called with a warning.
        others: receives each picture and table once it is written.
    """

    def __init__(
        self,
        folder: Path,
        classes: ClassResults,
        *,
        pictures: bool,
        resumed_step: int,
        warn: Callable[[str], None],
        others: Tracker,
    ) -> None:
        self._folder = RunFiles(folder).figures
        self._checkpoints = RunFiles(folder).checkpoints
        self._classes = classes
        self._pictures = pictures
        self._warn, self._others = warn, others
        self.rewind(resumed_step)

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """Write the figures of an evaluation, and remove those that are no longer kept."""
        if split == "train":
            return
        try:
            self._write_table(values, step=step, split=split)
            if self._pictures:
                for name, draw in self._drawings(values, f"{split}, epoch {epoch}, step {step}"):
                    self._write_picture(_file_name(name), draw, step=step, split=split)
            self._drop_old(step)
        except ImportError as error:
            self._pictures = False
            self._warn(
                f"confusion matrices and curves are not drawn: {error.name or 'matplotlib'} is not installed "
                "(pip install 'lockstep-train[plots]', or set evaluation.pictures to false)"
            )
        except OSError as error:
            self._pictures = False
            self._warn(f"figures could not be written to {self._folder}: {error.strerror or error}")

    def rewind(self, step: int) -> None:
        """Remove the figures of later steps."""
        for figures_step, path in self._folders():
            if figures_step > step:
                shutil.rmtree(path, ignore_errors=True)

    def _folder_of(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _folders(self) -> list[tuple[int, Path]]:
        paths = self._folder.glob("step-*")
        return [(int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name)) is not None]

    def _drop_old(self, newest: int) -> None:
        for step, path in self._folders():
            if step < newest and not any(self._checkpoints.glob(f"step-{step:08d}*")):
                shutil.rmtree(path, ignore_errors=True)

    def _write_table(self, results: Mapping[str, Result], *, step: int, split: str) -> None:
        table = self._classes.table(results)
        if table is None:
            return
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([table[0], *table[1]])
        path = self._folder_of(step) / f"{split}-classes.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.getvalue())
        self._others.log_artifact(f"{split}/classes", path, step=step)

    def _write_picture(self, name: str, draw: Callable[[], Figure], *, step: int, split: str) -> None:
        path = self._folder_of(step) / f"{split}-{name}.png"
        _save(draw(), path)
        self._others.log_figure(name, path, step=step, split=split)

    def _drawings(self, results: Mapping[str, Result], title: str) -> list[tuple[str, Callable[[], Figure]]]:
        names = self._classes.class_names
        drawings: list[tuple[str, Callable[[], Figure]]] = []
        for name, matrix in self._classes.confusions(results):
            labels = names(len(matrix))
            drawings.append((name, partial(confusion_figure, matrix, labels, title)))
        for name, matrices in self._classes.label_confusions(results):
            labels = names(len(matrices))
            drawings.append((name, partial(label_confusions_figure, matrices, labels, title)))
        for name, kind, lines in self._classes.curves(results):
            drawings.append((name, partial(curves_figure, kind, lines, title)))
        return drawings


def confusion_figure(matrix: Sequence[Sequence[float]], names: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix: colour is the share of the true class, so rare classes are as visible as frequent ones.

    Args:
        matrix: rows are true classes, columns predicted ones; counts, or shares.
        names: of the classes.
        title: below the heading.
    """
    from matplotlib.figure import Figure

    size = len(names)
    width = min(14.0, max(4.6, 2.2 + 0.5 * size))
    figure = Figure(figsize=(width, width * 0.9), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = _draw_cells(axes, matrix, numbered=size <= _MOST_NUMBERED)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"Confusion matrix\n{title}", fontsize=11)
    if size <= _MOST_NAMED:
        steep = max(map(len, names)) > 3 and size > 3
        axes.set_xticks(range(size), names, rotation=45 if steep else 0, ha="right" if steep else "center")
        axes.set_yticks(range(size), names)
    return figure


def label_confusions_figure(matrices: Sequence[Sequence[Sequence[float]]], names: Sequence[str], title: str) -> Figure:
    """Draw the 2×2 confusion matrix of each label (absent, present), for the first labels if there are many.

    Args:
        matrices: (labels, 2, 2); rows are true values, columns predicted ones; counts, or shares.
        names: of the labels.
        title: below the heading.
    """
    from matplotlib.figure import Figure

    shown = min(len(matrices), _MOST_LABELS)
    columns = min(shown, 6)
    rows = -(-shown // columns)
    figure = Figure(figsize=(max(4.6, 1.7 * columns + 0.6), 1.9 * rows + 1.1), dpi=110, layout="constrained")
    left_out = f" (the first {shown} of {len(matrices)} labels)" if shown < len(matrices) else ""
    figure.suptitle(f"Confusion matrices{left_out}\n{title}", fontsize=11)
    figure.supxlabel("predicted", fontsize=10)
    figure.supylabel("true", fontsize=10)
    for index, (matrix, name) in enumerate(zip(matrices[:shown], names, strict=False)):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_cells(axes, matrix)
        axes.set_title(name, fontsize=9)
        axes.set_xticks((0, 1), ("no", "yes"), fontsize=8)
        axes.set_yticks((0, 1), ("no", "yes") if index % columns == 0 else ("", ""), fontsize=8)
    return figure


def _draw_cells(axes: Axes, matrix: Sequence[Sequence[float]], *, numbered: bool = True) -> AxesImage:
    """Draw a matrix: colour is the share of a row, text the value."""
    shares = [[value / (sum(row) or 1) for value in row] for row in matrix]
    counts = all(float(value).is_integer() for row in matrix for value in row)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, values in enumerate(matrix if numbered else ()):
        for column, value in enumerate(values):
            if value:
                text, dark = f"{value:.0f}" if counts else f"{value:.2f}", shares[row][column] > 0.5
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image


def curves_figure(kind: str, lines: Sequence[tuple[str, list[float], list[float]]], title: str) -> Figure:
    """Draw ROC or precision-recall curves.

    Args:
        kind: ``roc`` or ``precision_recall``.
        lines: for each class its name, x and y.
        title: below the heading.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if len(lines) > 1 else 5.2, 4.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for _, x, y in lines[_MOST_COLOURED:]:
        axes.plot(x, y, color="0.75", linewidth=0.8, zorder=1, drawstyle=_style(kind))
    for number, (name, x, y) in enumerate(lines[:_MOST_COLOURED]):
        axes.plot(x, y, color=f"C{number}", linewidth=1.6, label=name, drawstyle=_style(kind), clip_on=False)
    if kind == "roc":
        axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="chance" if len(lines) == 1 else None)
    x_label, y_label = _AXES[kind]
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.grid(alpha=0.3)
    axes.set_title(f"{_TITLES[kind]}\n{title}", fontsize=11)
    if len(lines) > 1:
        others = f"\n(grey: {len(lines) - _MOST_COLOURED} others)" if len(lines) > _MOST_COLOURED else ""
        axes.legend(title=f"class{others}", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    return figure


def _style(kind: str) -> Any:
    return "default" if kind == "roc" else "steps-pre"  # between points precision is not a straight line


def _save(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data.getvalue())


def _file_name(metric: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", metric)
