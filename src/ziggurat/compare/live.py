"""The live display of a table that is being filled."""

import statistics
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Grid

from ziggurat.terminal import is_screen

from .columns import Column
from .engines import Outcome
from .results import Results
from .table import Run, Table


class LiveTable:
    """Methods by tasks: mean so far, seeds done, running and failed; on a console that is no terminal, plain lines."""

    def __init__(self, table: Table, results: Results, console: Console) -> None:
        self.table, self.results, self.console = table, results, console
        self.running: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if is_screen(self.console):
            self._live = Live(self, console=self.console, refresh_per_second=1, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, run: Run) -> None:
        self.running[run.key] = time.monotonic()
        if self._live is None:
            self.say(f"{self._place(run)}: started")

    def ended(self, outcome: Outcome) -> None:
        """Record an ended run, and print the reason of a failure at once, with the path of its log."""
        begun = self.running.pop(outcome.run.key, time.monotonic())
        run, place = outcome.run, self._place(outcome.run)
        if outcome.status == "done":
            line = self.results.lines[run.key]
            if self._live is None:
                columns = [column for column in self.table.columns if column.task == run.task]
                scores = (f"{c.evaluated or ''} {c.metric} {c.score(line):.2f}".strip() for c in columns)
                self.say(f"{place}: {', '.join(scores)} ({time.monotonic() - begun:.0f} s)")
        elif outcome.status == "failed":
            self.failed[run.key] = outcome.error
            self.say(f"{place} FAILED: {outcome.error} ({outcome.log})")

    def say(self, line: str) -> None:
        """Print a line at once, a pipe or a file too."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _place(self, run: Run) -> str:
        done = sum(self.results.done(each.key) for each in self.table.runs)
        return f"[{done} of {len(self.table.runs)}] {run.method} on {run.task}, seed {run.seed}"

    def __rich__(self) -> Grid:
        done = sum(self.results.done(run.key) for run in self.table.runs)
        title = f"{self.table.name}: {done} of {len(self.table.runs)} runs done, {len(self.running)} running"
        grid = Grid(title=escape(title), title_justify="left")
        grid.add_column("method")
        for column in self.table.columns:
            grid.add_column(escape(column.heading), justify="right")
        for method in self.table.methods:
            grid.add_row(escape(method), *(self._cell(method, column) for column in self.table.columns))
        return grid

    def _cell(self, method: str, column: Column) -> str:
        runs = [run for run in self.table.runs if (run.method, run.task) == (method, column.task)]
        scores = [column.score(self.results.lines[run.key]) for run in runs if self.results.done(run.key)]
        parts = [f"{statistics.fmean(scores):.2f}"] if scores else []
        parts.append(f"[dim]{len(scores)}/{len(runs)}[/]")
        begun = [self.running[run.key] for run in runs if run.key in self.running]
        if begun:
            parts.append(f"[cyan]running {time.monotonic() - min(begun):.0f} s[/]")
        failed = sum(run.key in self.failed for run in runs)
        if failed:
            parts.append(f"[red]{failed} failed[/]")
        return " ".join(parts)
