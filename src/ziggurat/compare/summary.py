"""The numbers of a table: a cell for each method and task, the average, differences, and what the runs cost."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from ziggurat.training.metrics import lower_is_better

from .statistics import Cell, Difference, averages, paired
from .table import Table

AVERAGE = "average"


@dataclass(frozen=True)
class Cost:
    """What a method's runs cost. `parameters` are its own trainable numbers, each counted once, without the head."""

    parameters: int
    stored_bytes: float | None
    peak_mb: float | None
    step_seconds: float | None


@dataclass(frozen=True)
class Summary:
    """All that a report needs. `columns` are the tasks, and the average where the metrics may be averaged."""

    table: Table
    lines: list[dict[str, Any]]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]
    differences: dict[tuple[str, str], Difference]
    costs: dict[str, Cost]

    def better(self, method: str, column: str) -> bool:
        """Whether the interval of the difference to the baseline lies wholly on the better side of zero."""
        gap = self.differences.get((method, column))
        if gap is None or gap.half is None:
            return False
        metric = self.table.metrics.get(column, "")
        return gap.high < 0 if lower_is_better(metric) else gap.low > 0


def summarise(table: Table, lines: list[dict[str, Any]]) -> Summary:
    """Gather the finished lines of a table's runs."""
    cells: dict[tuple[str, str], Cell] = {}
    for method in table.methods:
        for task in table.tasks:
            scores = {x["seed"]: float(x["score"]) for x in lines if (x["method"], x["task"]) == (method, task)}
            if scores:
                cells[method, task] = Cell(scores)
    columns = list(table.tasks)
    if len(columns) > 1 and not any(lower_is_better(metric) for metric in table.metrics.values()):
        columns.append(AVERAGE)
        for method in table.methods:
            whole = averages([cells.get((method, task)) for task in table.tasks])
            if whole is not None:
                cells[method, AVERAGE] = whole
    differences: dict[tuple[str, str], Difference] = {}
    for method in table.methods:
        for column in columns:
            ours, theirs = cells.get((method, column)), cells.get((table.baseline, column))
            if method != table.baseline and ours is not None and theirs is not None:
                gap = paired(ours.scores, theirs.scores, table.confidence)
                if gap is not None:
                    differences[method, column] = gap
    return Summary(table, lines, columns, cells, differences, _costs(table, lines))


def _costs(table: Table, lines: list[dict[str, Any]]) -> dict[str, Cost]:
    found: dict[str, Cost] = {}
    for method in table.methods:
        own = [line for line in lines if line["method"] == method]
        if own:
            found[method] = Cost(
                parameters=max(line["parameters"]["adapter"] for line in own),
                stored_bytes=_median(own, "stored_bytes"),
                peak_mb=_median(own, "peak_mb"),
                step_seconds=_median(own, "step_seconds"),
            )
    return found


def _median(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return statistics.median(values) if values else None
