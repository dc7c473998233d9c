"""`ziggurat report`: one HTML page about one or several runs that works offline."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ziggurat.errors import ConfigError

from . import experts, measures, svg, trace
from .components import Collected, short_roles
from .runs import Run, read_run

TEMPLATE = "page.html.jinja"
ACROSS = "layer j across, i down"
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Section:
    """A part of the page: charts in a grid, with notes and texts in front."""

    title: str
    charts: Iterable[Markup]
    texts: Sequence[str] = ()
    notes: Sequence[str] = ()


def report(folders: Sequence[str | Path]) -> str:
    """The page, as HTML.

    Raises:
        ConfigError: no folder, or one that holds no finished run.
    """
    if not folders:
        raise ConfigError("name one run folder or more.")
    runs = [replace(read_run(folder), name=name) for folder, name in zip(folders, names_of(folders), strict=True)]
    return template().render(
        refresh=None,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        scores=_scores(runs),
        cost=_cost(runs),
        curves=_section("Curves", _curves(runs)),
        compared=_against(runs),
        runs=[
            {
                "name": run.name,
                "inside": _inside(run),
                "events": [[str(event.get(key, "")) for key in ("step", "kind", "reason")] for event in run.events],
                "pruned": _pruned(run),
                "answers": list(_answered(run.values)),
                "recipe": run.recipe,
                "versions": ", ".join(f"{name} {v}" for name, v in run.values.get("versions", {}).items()),
            }
            for run in runs
        ],
    )


def template() -> Template:
    """The page, to be filled in; every text is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(autoescape=True, undefined=StrictUndefined, loader=loader).get_template(TEMPLATE)


def names_of(folders: Sequence[str | Path]) -> list[str]:
    """Each folder's name, with as many parent folders as make it unique.

    Raises:
        ConfigError: a folder is named twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path} is named twice: name each run once.")
    names = []
    for path in paths:
        depth = 1
        while any(other != path and other.parts[-depth:] == path.parts[-depth:] for other in paths):
            depth += 1
        names.append("/".join(path.parts[-depth:]))
    return names


def _by_run(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """One row per run, its name first; up to three runs are columns instead, which fits on a phone."""
    if len(rows) <= 3:
        head, *rows = zip(*[head, *rows], strict=True)
    return head, rows


def _scores(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        values, metric = run.values, run.values["metric"]
        others = {n: v for n, v in values["after"].items() if n not in (metric, "loss", "entropy")}
        also = ", ".join(f"{name} {_number(value)}" for name, value in others.items())
        cells = [_number(values[when].get(metric)) for when in ("before", "after", "guess")]
        rows.append([run.name, metric, *cells, also or "-"])
    return _by_run(["run", "metric", "before", "after", "baseline", "other metrics"], rows)


def _cost(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        counts, settings = run.values.get("parameters", {}), run.settings
        parameters = [counts.get(name) for name in ("adapter", "lora", "head")]
        peak, stored = run.values.get("peak_mb"), run.values.get("stored_bytes")
        cells = [
            str(settings.get("model", "-")),
            str(settings.get("method.name", "-")),
            *(f"{n:,}" if isinstance(n, int) else "-" for n in parameters),
            f"{stored / 1024:,.0f} KiB" if stored is not None else "-",
            f"{run.values.get('seconds', 0):,.0f}",
            f"{run.values.get('steps', 0):,}",
            f"{peak:,.0f} MiB" if peak is not None else "-",
        ]
        rows.append([run.name, *cells])
    names = ["run", "model", "method", "adapter's parameters", "LoRA of that rank", "head", "stored"]
    return _by_run([*names, "seconds", "steps", "peak memory"], rows)


#: TRL's logged values of steps that draw completions -> titles.
_OF_REWARDS = {
    "reward": "Reward",
    "reward_std": "Standard deviation of the reward",
    "frac_reward_zero_std": "Share of groups without signal",
    "completions/mean_length": "Tokens of a completion",
    "kl": "KL from the start",
}


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    names = ["loss", *dict.fromkeys(f"eval_{run.values['metric']}" for run in runs), "eval_loss", "learning_rate"]
    titles = {"loss": "Training loss", "eval_loss": "Validation loss", "learning_rate": "Learning rate"} | _OF_REWARDS
    names += _OF_REWARDS
    for name in names:
        series = {}
        for run in runs:
            points = [(line["epoch"], line[name]) for line in run.history if name in line and "epoch" in line]
            if points:
                x, y = zip(*points, strict=True)
                series[run.name] = (x, y)
        # One point per run isn't a curve; the tables have it.
        if any(len(x) > 1 for x, _ in series.values()):
            title = titles.get(name, f"Validation {name.removeprefix('eval_')}")
            yield svg.line_chart(title, series, "epoch")


def _answered(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tables of scores by class, of the most confident mistakes, and of answers before training and after."""
    by_class = values.get("by_class") or {}
    classes = by_class.get("classes") or []
    if classes:
        head = ["class", "rows", "precision", "recall", "F1", *(f"answered {row['name']}" for row in classes)]
        rows = [
            [row["name"], str(row["rows"]), *(_number(row[key]) for key in ("precision", "recall", "f1")), *map(str, n)]
            for row, n in zip(classes, by_class["confusion"], strict=True)
        ]
        yield {"title": "by class (%), and its rows by answer", "head": head, "rows": rows}
    if mistakes := by_class.get("mistakes"):
        rows = [[_number(m["probability"]), m["answer"], m["label"], m["text"]] for m in mistakes]
        head = ["probability", "answer", "label", "text"]
        yield {"title": "most confident mistakes on the validation rows", "head": head, "rows": rows}
    if answers := values.get("answers"):
        keys = ("question", "expected", "before", "after")
        rows = [[row.get(key, "-") for key in keys] for row in answers]
        yield {"title": "answers to validation questions", "head": keys, "rows": rows}


def _inside(run: Run) -> Section | None:
    title = f"{run.name}: inside the adapter"
    if run.collected is None:
        return _section(title, [], [run.why])
    return _section(title, [*_adapter(run.collected), *_spectra(run)], notes=run.collected.notes)


def _adapter(collected: Collected) -> Iterator[str]:
    part = collected.by_layer
    short = short_roles(collected.roles)
    for stack, depth in collected.layers.items():
        if not any(c.stack == stack and c.layers for c in collected.components):
            continue
        yield svg.pyramid(collected, stack)
        energy = {
            name: {short[role]: value for role, value in by_role.items()}
            for name, by_role in measures.energy(collected, stack).items()
        }
        if len(energy) > 1:
            yield svg.bars("Energy by part, share of its role", energy, "mean ‖B A‖²")
        if collected.adds_up:
            grid, parts = measures.tier_overlap(collected, stack)
            yield svg.heat_map("Overlap of the tiers' input subspaces", grid, parts, parts)
        layers = [str(n) for n in range(depth)]
        rows, most = [f"layer {n}" for n in layers], float(max(2, *(c.rank for c in collected.of(part))))
        # An effective rank lies between 1 and the rank, so its colours are comparable between runs of that rank.
        for value, words, limits in (("effective_rank", "Effective rank", (1.0, most)), ("norm", "Norm", None)):
            grid, roles = measures.by_layer_and_role(collected, part, value, stack)
            names = [short[r] for r in roles]
            yield svg.heat_map(f"{words} of part {part}", grid, rows, names, limits=limits)
        for role, by_value in experts.maps(collected, stack).items():
            for value, grid in by_value.items():
                if np.isfinite(grid).any():
                    columns = [str(n) for n in range(grid.shape[1])]
                    title = f"{role.rpartition('.')[2]}: {experts.VALUES[value]}"
                    yield svg.heat_map(title, grid, rows, columns, "expert")
        if depth > 1:
            grid = measures.kl_matrix(collected, stack=stack)
            yield svg.heat_map("KL between layers' spectra", grid, layers, layers, ACROSS)


def _spectra(run: Run) -> Iterator[str]:
    top = {name: spectra for name, spectra in trace.top_values(run.history).items() if len(spectra[0]) > 1}
    limit = max((float(np.nanmax(values, initial=0.0)) for _, values in top.values()), default=0.0)
    for name, (epochs, values) in top.items():
        rows = [f"s{n + 1}" for n in range(len(values))]
        columns = [f"{epoch:g}" for epoch in np.round(epochs, 2)]
        title = f"Singular values of part {name}"
        yield svg.heat_map(title, values, rows, columns, "epoch", limits=(0.0, limit))
    ranks = {name: (list(x), list(y)) for name, (x, y) in trace.series(run.history, "effective_rank").items()}
    if any(len(x) > 1 for x, _ in ranks.values()):
        yield svg.line_chart("Effective rank while training", ranks, "epoch")


def _against(runs: Sequence[Run]) -> Section | None:
    """The paper's Fig. 4 of the first run against each other one that has the same layers."""
    first, charts = runs[0].collected, []
    for run in runs[1:]:
        if first is None or run.collected is None:
            continue
        try:
            grid = measures.kl_difference(first, run.collected)
        except ConfigError:
            continue
        if len(grid) > 1:
            layers = [str(n) for n in range(len(grid))]
            charts.append(svg.heat_map(f"minus that of {run.name}", grid, layers, layers, ACROSS, centred=True))
    if not charts:
        return None
    name = runs[0].name
    text = f"KL between layers' spectra of {name}; positive: {name} is less redundant there."
    return _section("Compared", charts, [text])


def _pruned(run: Run) -> Section | None:
    if not run.remaining:
        return None
    total, most = sum(run.remaining.values()), run.most * len(run.remaining)
    text = f"{total:,} of {most:,} directions remain, {most - total:,} were pruned."
    charts = [] if run.collected is None else _remaining(run, run.collected)
    return _section(f"{run.name}: pruned", charts, [text])


def _remaining(run: Run, collected: Collected) -> Iterator[str]:
    part, limits = collected.stored_parts[-1], (0.0, float(run.most))
    for stack in collected.layers:
        grid, roles = measures.by_layer_and_role(collected, part, "rank", stack)
        short = short_roles(collected.roles)
        rows = [f"layer {n}" for n in range(len(grid))]
        # A linear layer that lost all its directions has no component.
        grid = np.nan_to_num(grid)
        yield svg.heat_map(
            f"Remaining directions, of {run.most}", grid, rows, [short[r] for r in roles], digits=0, limits=limits
        )


def _section(title: str, charts: Iterable[str], texts: Sequence[str] = (), notes: Sequence[str] = ()) -> Section | None:
    """A section of the non-empty charts; None if there is no content."""
    drawn = [Markup(chart) for chart in charts if chart]  # noqa: S704  svg.py escapes every text in it
    return Section(title, drawn, texts, notes) if drawn or texts or notes else None


def _number(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, int | float) else "-"
