"""The columns of a table: a task's score on its validation data, or its adapters' on a task of lm-eval."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ziggurat.recipe.glue import GLUE, glue_name

from .evaluated import RETENTION

if TYPE_CHECKING:
    from .table import Run


#: The column of the mean over the tasks.
AVERAGE = "average"


@dataclass(frozen=True)
class Column:
    """One column. `second` is shown after a slash; `evaluated` is lm-eval's task of the column, if it is one."""

    name: str
    task: str
    metric: str
    second: str | None = None
    evaluated: str | None = None

    @property
    def heading(self) -> str:
        return f"{self.name} ({self.metric}{f' / {self.second}' if self.second else ''})"

    def score(self, line: dict[str, Any]) -> float:
        """The column's score in a finished line of the results."""
        if self.evaluated is not None:
            return float(line["evaluated"][self.evaluated]["scores"][self.metric])
        return float(line["score"])

    def in_per_cent(self, line: dict[str, Any]) -> bool:
        """True if `score` is a percentage, or of a trained task; some metrics of lm-eval have another scale."""
        return self.evaluated is None or self.metric in line["evaluated"][self.evaluated]["per_cent"]

    def second_score(self, line: dict[str, Any]) -> float | None:
        """The second metric's score in a finished line; None where there is none."""
        scores = line["evaluated"][self.evaluated]["scores"] if self.evaluated is not None else line.get("after", {})
        value = scores.get(self.second)
        return None if value is None else float(value)


def columns_of(runs: list[Run], tasks: list[str]) -> tuple[list[Column], list[str]]:
    """The columns of a table's tasks, and conflicts between its methods' metrics."""
    columns: list[Column] = []
    problems = []
    for task in tasks:
        by_method = {run.method: run for run in runs if run.task == task}
        for run in list(by_method.values())[:1]:
            if run.evaluation is not None:
                columns += [
                    Column(name, task, metric, "before" if name == RETENTION else None, name)
                    for name, metric in run.evaluation.metrics.items()
                ]
            else:
                columns.append(Column(task, task, run.recipe.main_metric, _second(run)))
        metrics = {run.recipe.main_metric for run in by_method.values()}
        if len(metrics) > 1 and all(run.evaluation is None for run in by_method.values()):
            different = ", ".join(f"{run.recipe.main_metric} in {method}" for method, run in by_method.items())
            problems.append(f"tasks: {task}: a column holds one metric; set it for the task ({different})")
    count = Counter(column.name for column in columns)
    for place, column in enumerate(columns):
        if count[column.name] > 1:
            columns[place] = replace(column, name=f"{column.task} {column.name}")
    if AVERAGE in (column.name for column in columns):
        problems.append(
            f"tasks: {AVERAGE}: is the table's name for the mean over the tasks; give this task another one"
        )
    return columns, problems


def _second(run: Run) -> str | None:
    """The second metric of a GLUE task that is reported by two; None for other runs."""
    task = GLUE.get(glue_name(run.recipe.data.train, run.recipe.data.subset) or "")
    both = (task.metric, task.second) if task is not None else ()
    return both[1 - both.index(run.recipe.main_metric)] if run.recipe.main_metric in both else None
