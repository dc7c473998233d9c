"""The summary of a table: a cell for each method and task, the average, differences, and the cost of the runs."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from ziggurat.training.loop.metrics import lower_is_better

from .columns import AVERAGE
from .statistics import Cell, Difference, averages, paired
from .table import Table


@dataclass(frozen=True)
class Cost:
    """The cost of a method's runs.

    `parameters`: task -> the method's own trainable parameters, each counted once, without the head.
    """

    parameters: dict[str, int]
    stored_bytes: float | None
    peak_mb: float | None
    step_seconds: float | None


@dataclass(frozen=True)
class Summary:
    """The contents of a report. `columns` are the table's, and the average if the metrics can be averaged.

    `second` are the cells of the second metrics; differences and plots are of the first.
    """

    table: Table
    lines: list[dict[str, Any]]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]
    differences: dict[tuple[str, str], Difference]
    costs: dict[str, Cost]
    second: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def parameters(self, method: str, column: str) -> int:
        """Trainable parameters of a method in a column: on its task; for the average, the most of any task."""
        counts = self.costs[method].parameters
        tasks = {each.name: each.task for each in self.table.columns}
        return counts[tasks[column]] if column in tasks else max(counts.values())

    def better(self, method: str, column: str) -> bool:
        """Whether the interval of the difference to the baseline lies wholly on the better side of zero."""
        gap = self.differences.get((method, column))
        if gap is None or not gap.excludes_zero():
            return False
        metric = self.table.metrics.get(column, "")
        return (gap.mean < 0) == lower_is_better(metric)


def summarise(table: Table, lines: list[dict[str, Any]]) -> Summary:
    """Gather the finished lines of a table's runs."""
    cells: dict[tuple[str, str], Cell] = {}
    second: dict[tuple[str, str], Cell] = {}
    for method in table.methods:
        for column in table.columns:
            of_cell = [line for line in lines if (line["method"], line["task"]) == (method, column.task)]
            if of_cell:
                cells[method, column.name] = Cell({line["seed"]: column.score(line) for line in of_cell})
            seconds = {line["seed"]: column.second_score(line) for line in of_cell}
            scores = {seed: score for seed, score in seconds.items() if score is not None}
            if scores:
                second[method, column.name] = Cell(scores)
    columns = [column.name for column in table.columns]
    alike = all(column.in_per_cent(line) for column in table.columns for line in lines if line["task"] == column.task)
    if len(columns) > 1 and alike and not any(lower_is_better(metric) for metric in table.metrics.values()):
        columns.append(AVERAGE)
        for method in table.methods:
            whole = averages([cells.get((method, column.name)) for column in table.columns])
            if whole is not None:
                cells[method, AVERAGE] = whole
    differences: dict[tuple[str, str], Difference] = {}
    for method in table.methods:
        for column in columns:
            cell, baseline = cells.get((method, column)), cells.get((table.baseline, column))
            if method != table.baseline and cell is not None and baseline is not None:
                gap = paired(cell.scores, baseline.scores, table.confidence)
                if gap is not None:
                    differences[method, column] = gap
    return Summary(table, lines, columns, cells, differences, _costs(table, lines), second)


def _costs(table: Table, lines: list[dict[str, Any]]) -> dict[str, Cost]:
    costs: dict[str, Cost] = {}
    for method in table.methods:
        of_method = [line for line in lines if line["method"] == method]
        if of_method:
            costs[method] = Cost(
                parameters={
                    task: max(line["parameters"]["adapter"] for line in of_method if line["task"] == task)
                    for task in dict.fromkeys(line["task"] for line in of_method)
                },
                stored_bytes=_median(of_method, "stored_bytes"),
                peak_mb=_median(of_method, "peak_mb"),
                step_seconds=_median(of_method, "step_seconds"),
            )
    return costs


def _median(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return statistics.median(values) if values else None
