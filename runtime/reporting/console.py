"""Console output: a summary, a progress bar on a terminal or plain lines elsewhere, and a final table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from runtime.evaluation.class_results import ClassResults
from runtime.evaluation.metrics import Result
from runtime.messages import print_run_messages_by
from runtime.reporting.tracker import Tracker

_RATES = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s"}
_HIDDEN = {*_RATES, "peak_memory_bytes", "data_share", "slowest_rank", "slowest_rank_excess"}  # metrics.jsonl has them
_RECORD_KEYS = {"event", "split", "step", "epoch", "time"}  # of a record, in addition to its figures
_CLASSES = 40  # most rows of a table per class
_ROWS = 12  # most rows of the final table; the whole history is in metrics.jsonl


class ConsoleTracker(Tracker):
    """Shows a run on the terminal.

    Args:
        progress: whether to draw a progress bar, if the output is a terminal.
        classes: extracts the results per class.
        earlier: records of the run's earlier starts, for the table.
    """

    def __init__(self, *, progress: bool, classes: ClassResults, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        self._classes = classes
        self._console = Console(highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._wants_bar = progress and self._console.is_terminal
        self._rows: list[tuple[str, int, int, str, Mapping[str, Result]]] = []
        self._train_loss: tuple[int, float] | None = None  # after which step
        for record in earlier:
            self._add_earlier(record)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Print a summary of the run, and start the progress bar."""
        self._console.print(f"[bold]{values['name']}[/]  {values['where']}")
        for label in ("data", "batch", "model", "update", "memory", "folder", "resumed"):
            if values.get(label):
                self._console.print(f"  {label:<8}{values[label]}", soft_wrap=True)
        if self._wants_bar:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=values["total_steps"], completed=values["step"], figures=""
            )
            print_run_messages_by(self._print_above_bar)

    def log(self, values: Mapping[str, Result], *, step: int, epoch: int, split: str) -> None:
        """Show a training report; or print the results of an evaluation, and keep them for the table."""
        if split == "train":
            self._show_training(values, step, epoch)
            return
        self._add_row(split, step, epoch, values)
        figures = _figures(values, list(values))
        self._console.print(f"epoch {epoch}  step {step}  [bold]{split}[/]  {figures}", soft_wrap=True)

    def _show_training(self, values: Mapping[str, Result], step: int, epoch: int) -> None:
        """Update the progress bar, or print a line."""
        loss = values.get("loss")
        self._train_loss = (step, loss) if isinstance(loss, float) else None
        shown = [name for name in values if name not in _HIDDEN and not name.startswith("learning_rate/")]
        figures = _figures(values, shown)
        rate = next((f"{values[key]:,.0f} {unit}" for key, unit in reversed(_RATES.items()) if key in values), "")
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=step,
                description=f"epoch {epoch}",
                figures=f"loss {loss:.4g}  {rate}" if isinstance(loss, float) else rate,
            )
        else:
            # Not through rich, which takes a millisecond per line: reports may be as frequent as every step.
            print(f"epoch {epoch}  step {step}  {figures}  {rate}", flush=True)

    def _add_row(self, split: str, step: int, epoch: int, results: Mapping[str, Result]) -> None:
        self._rows = [row for row in self._rows if row[:2] != (split, step)]  # a resumed run repeats an evaluation
        self._rows.append((split, step, epoch, self._training_loss(step), results))

    def _training_loss(self, step: int) -> str:
        """Return the last reported training loss, with its step if that is another one."""
        if self._train_loss is None:
            return ""
        loss_step, loss = self._train_loss
        return f"{loss:.4f}" if loss_step == step else f"{loss:.4f} (step {loss_step})"

    def _add_earlier(self, record: Mapping[str, Any]) -> None:
        values = {name: value for name, value in record.items() if name not in _RECORD_KEYS}
        if record["event"] == "evaluation":
            self._add_row(record["split"], record["step"], record["epoch"], values)
        else:
            self._train_loss = (record["step"], values["loss"]) if "loss" in values else None

    def rewind(self, step: int) -> None:
        """Drop the results of later steps; the next report moves the progress bar back."""
        self._rows = [row for row in self._rows if row[1] <= step]
        if self._train_loss is not None and self._train_loss[0] > step:
            self._train_loss = None

    def _print_above_bar(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)

    def finish(self, outcome: str) -> None:
        """Remove the progress bar and print the table."""
        if self._bar is not None:
            print_run_messages_by(None)
            self._bar.stop()
            self._bar = None
        if self._rows and outcome != "failed":
            self._console.print(self._table())
            for split, results in {
                split: results for split, *_, results in self._rows
            }.items():  # the last of each split
                table = self._class_table(split, results)
                if table is not None:
                    self._console.print(table)
        self._rows = []

    def _class_table(self, split: str, results: Mapping[str, Result]) -> Table | None:
        class_table = self._classes.table(results)
        if class_table is None:
            return None
        headings, rows = class_table
        left_out = max(0, len(rows) - _CLASSES)
        caption = f"and {left_out} more; the run folder's figures have all of them" if left_out else None
        table = Table(title=f"{split}, per class", title_justify="left", caption=caption, caption_justify="left")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "class" else "right")
        for name, *values in rows[:_CLASSES]:
            table.add_row(escape(name), *(_number(float(value)) for value in values))
        return table

    def _table(self) -> Table:
        table = Table()
        names = list(dict.fromkeys(n for *_, results in self._rows for n, v in results.items() if isinstance(v, float)))
        names = [name for name in names if name != "samples"]
        for heading in ("split", "epoch", "step", "training loss", *names):
            table.add_column(heading, justify="left" if heading == "split" else "right")
        shown = self._rows if len(self._rows) <= _ROWS else [*self._rows[:2], *self._rows[2 - _ROWS :]]
        for number, (split, step, epoch, loss, results) in enumerate(shown):
            if number == 2 and shown is not self._rows:
                table.add_row(*["…"] * (4 + len(names)))
            table.add_row(
                split,
                str(epoch),
                str(step),
                loss,
                *(_number(results.get(n)) for n in names),
            )
        return table


def _figures(values: Mapping[str, Result], names: list[str]) -> str:
    shown = [f"{name} {_number(values[name])}" for name in names if isinstance(values[name], float)]
    return "  ".join(shown)


def _number(value: Result | None) -> str:
    if not isinstance(value, float):
        return ""
    if value.is_integer() and abs(value) < 1e9 and value > 1:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"
