"""The summary of a run on the terminal."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ziggurat.host.method import rank_of
from ziggurat.host.plugins import loaded
from ziggurat.recipe.methods import BUDGET, METHODS, method_config, method_fields, shown
from ziggurat.recipe.schema import Recipe
from ziggurat.terminal import clean

from ..callbacks.progress import rewards_of
from .metrics import lower_is_better
from .result import Result

#: The units of TRL's scores of preferences and rewards.
_UNITS = {
    "rewards/accuracies": "share of pairs",
    "rewards/margins": "higher is better",
    "reward": "of the likeliest completions",
}


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
    others = [name for name in result.after if name not in (metric, "loss", "entropy")]
    if others:
        table.add_row("other metrics", ", ".join(f"{name} {_number(result.after[name])}" for name in others))
    steps = [words for line in result.history if (words := rewards_of(line))]
    if steps:
        table.add_row("first step", steps[0])
        table.add_row("last step", steps[-1])
    table.add_section()
    counts = result.counts
    table.add_row(f"trainable parameters, {named}", f"{counts.adapter:,}")
    if "active" in result.left:
        table.add_row("of these active at the end", f"{result.left['active']:,}")
    if counts.lora is not None and result.method != "lora":
        trained = counts.adapter / counts.lora if counts.lora else 0.0
        per_cent = f"{100 * trained:.0f}" if trained >= 0.1 else f"{100 * trained:.2g}"
        share = f" ({method} trains {per_cent}% of that)" if trained else ""
        table.add_row(f"LoRA r {counts.lora_rank}, same layers", f"{counts.lora:,}{share}")
    if counts.head:
        table.add_row("head, trained by every method", f"{counts.head:,}")
    table.add_section()
    table.add_row("seconds", f"{result.seconds:,.0f} for {result.steps} steps")
    if result.peak_mb is not None:
        table.add_row("peak memory", f"{result.peak_mb:,.0f} MiB")
    table.add_row("adapter", _short(result.folder))
    # Commands are pasted into a shell: line breaks at the terminal's width would break them.
    commands = [Text(f"  {line}", no_wrap=True, overflow="ignore") for line in _next(recipe, result)]
    classes = [class_table(result.by_class)] if result.by_class else []
    return Group(table, *classes, *_answers(result), Text("Next:", style="bold"), *commands)


def _answers(result: Result) -> Iterator[Text]:
    for row in result.answers:
        yield Text(f"asked: {one_line(row['question'])}", style="bold")
        for name, when in (("expected", "expected"), ("before", "before training"), ("after", "after training")):
            if name in row:
                yield Text(f"  {when}: {one_line(row[name])}")


#: The most classes, and mistakes, in a table in the terminal.
_CLASSES, _MISTAKES = 12, 3


def class_table(by_class: dict[str, Any]) -> Group:
    """Rows, precision, recall and F1 of each class with the confusion matrix, and the most confident mistakes.

    `by_class` is the result of `classes.by_class`. If there are many classes, the worst are shown.
    """
    classes, confusion = by_class["classes"], by_class["confusion"]
    worst = sorted(range(len(classes)), key=lambda place: classes[place]["f1"])[:_CLASSES]
    places = sorted(worst)
    shows_all = len(places) == len(classes)
    title = "by class; on the right, its rows by answer"
    if not shows_all:
        title = f"the {len(places)} of {len(classes)} classes with the lowest F1"
    table = Table(title=title, title_justify="left")
    table.add_column("class", overflow="fold")
    for name in ("rows", "precision", "recall", "F1", *([classes[place]["name"] for place in places] * shows_all)):
        table.add_column(Text(name), justify="right")
    for place in places:
        row = classes[place]
        scores = (f"{row[key]:.1f}" for key in ("precision", "recall", "f1"))
        counts = [f"{count:,}" for count in confusion[place]] if shows_all else []
        table.add_row(Text(row["name"]), f"{row['rows']:,}", *scores, *counts)
    mistakes = [
        Text(f"  {wrong['answer']} {wrong['probability']:.2f}, is {wrong['label']}: {one_line(wrong['text'])}")
        for wrong in by_class["mistakes"][:_MISTAKES]
    ]
    return Group(table, *([Text("most confident mistakes:"), *mistakes] if mistakes else []))


def one_line(text: str, most: int = 90) -> str:
    """The beginning of a text, without its line breaks."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _ranks(recipe: Recipe) -> tuple[int | None, int | None]:
    """The recipe's rank, and the final rank if the method lowers it."""
    choice = recipe.method
    if BUDGET in choice:
        return choice.get("r"), None
    config = method_config(choice)
    if "init_r" in method_fields(choice["name"]):
        assert config is not None
        return config.init_r, config.target_r
    return rank_of(config) if "r" in choice else None, None


def _next(recipe: Recipe, result: Result) -> list[str]:
    folder = shlex.quote(_short(result.folder))
    plugins = "".join(f" --plugin {shlex.quote(plugin)}" for plugin in loaded())
    # A text that begins with a hyphen would be taken for an option.
    marked = ["--"] * any(text.startswith("-") for text in result.example)
    images = "".join(f" --image {shlex.quote(_short(Path(image)))}" for image in result.example_images)
    lines = [f"ziggurat predict {folder}{images} {shlex.join([*marked, *map(clean, result.example)])}"]
    if recipe.writes:
        lines.append(f"ziggurat chat {folder}")
    if METHODS[result.method].exports:
        lines.append(f"ziggurat export {folder} {shlex.quote(_short(result.folder) + '-lora')}")
    if METHODS[result.method].merges:
        lines.append(f"ziggurat merge {folder} {shlex.quote(_short(result.folder) + '-merged')}")
    return [line + plugins for line in lines]


def show(console: Console, recipe: Recipe, result: Result) -> None:
    console.print(report(recipe, result), crop=False)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
