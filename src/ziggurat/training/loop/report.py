"""The summary of a run on the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ziggurat.host.plugins import loaded
from ziggurat.recipe.methods import BUDGET, METHODS, method_config, method_fields, shown
from ziggurat.recipe.schema import Recipe

from .metrics import lower_is_better
from .result import Result

#: What TRL's scores of preferences are measured in.
_UNITS = {"rewards/accuracies": "share of pairs", "rewards/margins": "higher is better"}


def report(recipe: Recipe, result: Result) -> Group:
    """The table of a run (scores, parameters, cost) and the next commands to try."""
    method = shown(result.method)
    rank, last = _ranks(recipe)
    named = method if rank is None else f"{method} r {rank}" + (f" to {last}" if last is not None else "")
    table = Table(title=f"{named}: {recipe.name} on {recipe.model}", title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    metric = result.metric
    unit = "lower is better" if lower_is_better(metric) else _UNITS.get(metric, "%")
    if result.before:
        table.add_row(f"{metric} before ({unit})", _number(result.before.get(metric)))
    table.add_row(Text(f"{metric} after ({unit})", style="bold"), Text(_number(result.after.get(metric)), style="bold"))
    if metric in result.guess:
        baseline = "mean baseline" if recipe.task == "regression" else "majority-class baseline"
        table.add_row(baseline, _number(result.guess[metric]))
    rest = [name for name in result.after if name not in (metric, "loss", "entropy")]
    if rest:
        table.add_row("other metrics", ", ".join(f"{name} {_number(result.after[name])}" for name in rest))
    table.add_section()
    counts = result.counts
    table.add_row(f"trainable parameters, {named}", f"{counts.adapter:,}")
    if "active" in result.left:
        table.add_row("of these active at the end", f"{result.left['active']:,}")
    if counts.lora is not None and result.method != "lora":
        share = f" ({method} trains {counts.adapter / counts.lora:.0%} of that)" if counts.lora else ""
        same = f"r {rank}" if rank is not None else "of the same rank"
        table.add_row(f"LoRA {same}, same layers", f"{counts.lora:,}{share}")
    if counts.head:
        table.add_row("head, trained by every method", f"{counts.head:,}")
    table.add_section()
    table.add_row("seconds", f"{result.seconds:,.0f} for {result.steps} steps")
    if result.peak_mb is not None:
        table.add_row("peak memory", f"{result.peak_mb:,.0f} MiB")
    table.add_row("adapter", _short(result.folder))
    return Group(
        table,
        Text("Next:", style="bold"),
        *(Text(f"  {line}", overflow="fold") for line in _next(recipe, result)),
    )


def _ranks(recipe: Recipe) -> tuple[int | None, int | None]:
    """The rank that the recipe names, and what it comes to at the end where the method lowers it."""
    choice = recipe.method
    if BUDGET in choice or "init_r" not in method_fields(choice["name"]):
        return choice.get("r"), None
    config = method_config(choice)
    assert config is not None
    return config.init_r, config.target_r


def _next(recipe: Recipe, result: Result) -> list[str]:
    folder = shlex.quote(_short(result.folder))
    plugins = "".join(f" --plugin {shlex.quote(plugin)}" for plugin in loaded())
    if recipe.writes:
        texts = '"Give three tips for staying healthy."'
    elif recipe.data.text_pair is not None:
        texts = '"A man plays a guitar." "Someone makes music."'
    else:
        texts = '"A film that stays with you for days."'
    lines = [f"ziggurat predict {folder} {texts}"]
    if METHODS[result.method].exports:
        lines.append(f"ziggurat export {folder} {shlex.quote(_short(result.folder) + '-lora')}")
    if METHODS[result.method].merges:
        lines.append(f"ziggurat merge {folder} {shlex.quote(_short(result.folder) + '-merged')}")
    return [line + plugins for line in lines]


def show(console: Console, recipe: Recipe, result: Result) -> None:
    console.print(report(recipe, result))


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
