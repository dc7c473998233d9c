"""A table as Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ziggurat.terminal import clean, no_formula
from ziggurat.training.loop.metrics import lower_is_better

from .columns import AVERAGE
from .published import published
from .statistics import Cell, Difference
from .summary import Cost, Summary

COLUMNS = ("method", "task", "metric", "seeds", "mean", "sd", "difference", "low", "high", "pairs")
COLUMNS += ("parameters", "stored_bytes", "peak_mb", "step_seconds", "second_metric", "second_mean", "second_sd")


def markdown(summary: Summary, failed: Sequence[dict[str, Any]] = ()) -> str:
    """Scores with published figures beside, differences to the baseline with intervals, cost, and hardware."""
    table = summary.table
    parts = [f"# {table.name}", *([table.about] if table.about else []), _how(summary), _scores(summary)]
    parts += [
        _published_note(summary),
        "\n".join(f"Note: {line}." for line in table.notes),
        _differences(summary),
        _warnings(summary),
        _cost(summary),
        _missing(summary, failed),
        _where(summary),
    ]
    return clean("\n\n".join(part for part in parts if part) + "\n")


def _how(summary: Summary) -> str:
    table = summary.table
    models = sorted({Path(run.recipe.model).name for run in table.runs})
    best = {run.recipe.train.best for run in table.runs if run.evaluation is None}
    chosen = {
        frozenset({False}): " Scores are those of the last step, on the validation data.",
        frozenset({True}): " Scores are those of the best evaluation on the same validation data, which flatters them.",
        frozenset({True, False}): " Some scores are of the last step, some of the best evaluation: see the recipes.",
    }.get(frozenset(best), "")
    seeds = ", ".join(map(str, table.seeds))
    text = f"Model: {', '.join(models)}. Seeds: {seeds}. Mean ± standard deviation over the seeds.{chosen}"
    for task, evaluation in {run.task: run.evaluation for run in table.runs if run.evaluation is not None}.items():
        text += f" Trained on {task}"
        if evaluation.lm_tasks:
            text += f", scored by lm-eval on {', '.join(evaluation.lm_tasks)}"
            if evaluation.limit is not None:
                text += f" (the first {evaluation.limit} questions of each task or subject)"
        if evaluation.retention is not None:
            text += f"; retention is the perplexity of the text {Path(evaluation.retention).name} / without the adapter"
        text += "."
    return text


def _scores(summary: Summary) -> str:
    table = summary.table
    headings = {column.name: column.heading for column in table.columns}
    names = [headings.get(column, column) for column in summary.columns]
    rows = [["method", "parameters", *names]]
    for method in table.methods:
        cost = summary.costs.get(method)
        cells = [_score(summary, method, column) for column in summary.columns]
        rows.append([method, _parameters(cost) if cost else "-", *cells])
        rows += _published_rows(summary, method)
    return _grid(rows)


def _parameters(cost: Cost) -> str:
    least, most = min(cost.parameters.values()), max(cost.parameters.values())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _score(summary: Summary, method: str, column: str) -> str:
    cell = summary.cells.get((method, column))
    if cell is None:
        return "-"
    # An untrained model has one score for all seeds; a spread of zero would be misleading.
    text = _mean(cell) if summary.table.trains(method) else f"{cell.mean:.2f}"
    if summary.better(method, column):
        text = f"**{text}**"
    second = summary.second.get((method, column))
    if second is not None:
        text += f" / {_mean(second)}"
    expected = len(summary.table.seeds)
    return text if len(cell.scores) == expected else f"{text} ({len(cell.scores)} of {expected} seeds)"


def _mean(cell: Cell) -> str:
    return f"{cell.mean:.2f}" + (f" ± {cell.spread:.2f}" if cell.spread is not None else "")


def _published_rows(summary: Summary, method: str) -> list[list[str]]:
    table = summary.table
    if table.published is None:
        return []
    name = next((run.recipe.method["name"] for run in table.runs if run.method == method), None)
    ahead = table.methods[: table.methods.index(method)]
    if name in {run.recipe.method["name"] for run in table.runs if run.method in ahead}:
        return []  # shown beside the first row of a method only
    rows = []
    for figure in published(table.published).rows:
        if figure.method == name:
            scores = [f"*{figure.scores[column]}*" if column in figure.scores else "" for column in summary.columns]
            rows.append([f"*published: {figure.label}*", f"*{figure.parameters}*", *scores])
    return rows


def _published_note(summary: Summary) -> str:
    if summary.table.published is None:
        return ""
    table = published(summary.table.published)
    return (
        f"Rows in italics are not measured here: {table.source}, {table.model}, {table.note}. They are shown for "
        "orientation; models, seeds and the choice of the epoch differ, so no difference to them is taken."
    )


def _differences(summary: Summary) -> str:
    table = summary.table
    others = [method for method in table.methods if method != table.baseline]
    if not others:
        return ""
    rows = [["method", *summary.columns]]
    for method in others:
        rows.append([method, *(_difference(summary.differences.get((method, c))) for c in summary.columns)])
    taken = [gap for gap in summary.differences.values() if gap.half is not None]
    chance = len(taken) * (100 - table.confidence) / 100
    text = (
        f"Difference to {table.baseline}, paired by seed, with the {table.confidence:g}% interval of its mean "
        "(Student's t). Bold, here and above: the interval excludes zero (above: on the better side)."
    )
    if taken:
        text += (
            f" Of {len(taken)} interval{'s' * (len(taken) > 1)} about {chance:.1f} would exclude zero by chance alone: "
            "they are not corrected for their number."
        )
    lower = [task for task, metric in table.metrics.items() if lower_is_better(metric)]
    text += f" Lower is better for {', '.join(lower)}." if lower else ""
    return f"{text}\n\n{_grid(rows)}"


def _difference(gap: Difference | None) -> str:
    if gap is None:
        return "-"
    if gap.half is None:
        return f"{gap.mean:+.2f} (1 pair)"
    text = f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
    return f"**{text}**" if gap.excludes_zero() else text


def _cost(summary: Summary) -> str:
    rows = [["method", "trainable parameters", "stored MiB", "peak MiB", "ms a step"]]
    for method, cost in summary.costs.items():
        stored = f"{cost.stored_bytes / 2**20:.2f}" if cost.stored_bytes is not None else "-"
        peak = f"{cost.peak_mb:,.0f}" if cost.peak_mb is not None else "-"
        step = f"{1000 * cost.step_seconds:,.1f}" if cost.step_seconds is not None else "-"
        rows.append([method, _parameters(cost), stored, peak, step])
    if len(rows) == 1:
        return ""
    return (
        "Cost, medians over the runs. Parameters are counted once however many layers share them, without the head "
        "that trains with every method; stored: all weights in the run's folder, head included; peak: of the GPU, or "
        f"of the process where there is none; steps next to other runs take longer.\n\n{_grid(rows)}"
    )


def _warnings(summary: Summary) -> str:
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for line in summary.lines:
        for text in line.get("warnings") or ():
            seeds.setdefault((line["method"], line["task"], text), []).append(str(line["seed"]))
    lines = [
        f"- {method} on {task}, seed{'s' * (len(of) > 1)} {', '.join(of)}: {text}"
        for (method, task, text), of in seeds.items()
    ]
    return "Runs that warned, and count in the scores:\n\n" + "\n".join(lines) if lines else ""


def _missing(summary: Summary, failed: Sequence[dict[str, Any]]) -> str:
    lines = [f"- {x['method']} on {x['task']}, seed {x['seed']}: {x['error']}" for x in failed]
    # Two cells of a table may be the same run.
    keys = {run.key for run in summary.table.runs}
    still = keys - {line["key"] for line in (*summary.lines, *failed)}
    if still:
        lines.append(f"- not run yet: {len(still)} of {len(keys)}")
    return "Missing:\n\n" + "\n".join(lines) if lines else ""


def _where(summary: Summary) -> str:
    def every(values: list[str]) -> str:
        return "; ".join(sorted(set(values)))

    if not summary.lines:
        return ""
    lines = summary.lines
    versions = [", ".join(f"{name} {v}" for name, v in line["versions"].items()) for line in lines]
    hardware = [", ".join(line["hardware"].get("gpus") or [str(line["hardware"]["processor"])]) for line in lines]
    commits = [str(line["commit"] or "an installed package") for line in lines]
    return f"Ran on {every(hardware)}; {every(versions)}; commit {every(commits)}."


def table_csv(summary: Summary) -> str:
    """One row a method and column: seeds, mean, spread, difference and its interval, cost, the second metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    seconds = {column.name: column.second for column in summary.table.columns}
    for method in summary.table.methods:
        cost = summary.costs.get(method)
        for column in summary.columns:
            cell, gap = summary.cells.get((method, column)), summary.differences.get((method, column))
            if cell is None or cost is None:
                continue
            interval = [gap.low, gap.high] if gap is not None and gap.half is not None else ["", ""]
            metric = summary.table.metrics.get(column, AVERAGE)
            spread = "" if cell.spread is None else cell.spread
            second = summary.second.get((method, column))
            also = [seconds[column], second.mean, second.spread] if second is not None else [None] * 3
            names = (no_formula(name) for name in (method, column, metric))
            writer.writerow(
                [
                    *(*names, len(cell.scores), cell.mean, spread),
                    *(gap.mean if gap else "", *interval, gap.pairs if gap else ""),
                    *(summary.parameters(method, column), cost.stored_bytes, cost.peak_mb, cost.step_seconds, *also),
                ]
            )
    return out.getvalue()


def _grid(rows: list[list[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *("--:" for _ in rows[0][1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])
