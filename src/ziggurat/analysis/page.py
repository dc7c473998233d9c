"""`ziggurat report`: one HTML page of one run or several that needs nothing from the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ziggurat.errors import ConfigError

from . import measures, svg, trace
from .collect import collect
from .components import Collected, short_roles

RUN, RECIPE = "run.json", "recipe.yaml"


@dataclass(frozen=True, eq=False)
class Run:
    """What a finished run's folder says. `collected` is None where there is no adapter to read; `why` says so."""

    name: str
    values: dict[str, Any]
    recipe: str
    collected: Collected | None
    why: str
    events: list[dict[str, Any]]

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.values.get("history") or []


def read_run(folder: str | Path) -> Run:
    """The run in `folder`.

    Raises:
        ConfigError: there is no finished run of `ziggurat train` in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    for name in (RUN, RECIPE):
        if not (folder / name).is_file():
            inside = sorted(str(path.parent) for path in folder.glob(f"*/{RUN}"))
            hint = f" Runs lie in {', '.join(inside)}." if inside else ""
            raise ConfigError(f"{folder} holds no run of `ziggurat train`: it has no {name}.{hint}")
    try:
        values = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / RUN} is no JSON: {error}.") from error
    if "after" not in values:
        raise ConfigError(f"{folder} is an unfinished run: go on with resume=true first.")
    try:
        collected, why = collect(folder), ""
    except ConfigError as error:
        collected, why = None, str(error)
    events_file = folder / "lor2c_events.json"
    events = json.loads(events_file.read_text(encoding="utf-8")) if events_file.is_file() else []
    recipe = (folder / RECIPE).read_text(encoding="utf-8")
    return Run(folder.resolve().name, values, recipe, collected, why, events)


def report(folders: Sequence[str | Path]) -> str:
    """The page, as HTML.

    Raises:
        ConfigError: no folder, or one that holds no finished run.
    """
    if not folders:
        raise ConfigError("name one run folder or more.")
    runs = [read_run(folder) for folder in folders]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [f"<h1>{escape(title)}</h1>", _scores(runs), _cost(runs), _section("Curves", _curves(runs))]
    for run in runs:
        body += [_section(f"{run.name}: inside the adapter", _inside(run)), _decisions(run), _recipe(run)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>'
        + "".join(body)
        + "</main></body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="s"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _scores(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        values, metric = run.values, run.values["metric"]
        others = {n: v for n, v in values["after"].items() if n not in (metric, "loss", "entropy")}
        also = ", ".join(f"{name} {_number(value)}" for name, value in others.items())
        cells = [_number(values[when].get(metric)) for when in ("before", "after", "guess")]
        rows.append([run.name, metric, *cells, also])
    return "<h2>Scores</h2>" + _table(["run", "metric", "before", "after", "by guessing", "after, also"], rows)


def _cost(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        counts = run.values.get("parameters", {})
        numbers = [counts.get(name) for name in ("adapter", "lora", "head")]
        cells = [f"{n:,}" if isinstance(n, int) else "-" for n in numbers]
        peak = run.values.get("peak_mb")
        rows.append(
            [
                run.name,
                *cells,
                f"{run.values.get('seconds', 0):,.0f}",
                f"{run.values.get('steps', 0):,}",
                f"{peak:,.0f}" if peak is not None else "-",
            ]
        )
    names = ["run", "adapter's parameters", "LoRA of that rank", "head", "seconds", "steps", "peak memory, MiB"]
    return "<h2>Parameters and memory</h2>" + _table(names, rows)


def _curves(runs: Sequence[Run]) -> list[str]:
    wanted = ["loss", *dict.fromkeys(f"eval_{run.values['metric']}" for run in runs), "eval_loss", "learning_rate"]
    titles = {"loss": "Training loss", "eval_loss": "Validation loss", "learning_rate": "Learning rate"}
    charts = []
    for name in wanted:
        series = {}
        for run in runs:
            points = [(line["epoch"], line[name]) for line in run.history if name in line and "epoch" in line]
            if points:
                x, y = zip(*points, strict=True)
                series[run.name] = (x, y)
        title = titles.get(name, f"Validation {name.removeprefix('eval_')}")
        charts.append(svg.line_chart(title, series, "epoch") if series else "")
    return [chart for chart in charts if chart]


def _inside(run: Run) -> list[str]:
    collected = run.collected
    if collected is None:
        return [f"<p>{escape(run.why)}</p>"]
    charts = [f'<p class="note">{escape(note)}</p>' for note in collected.notes]
    for stack, depth in collected.layers.items():
        if not any(c.stack == stack and c.layers for c in collected.components):
            continue
        charts.append(svg.pyramid(collected, stack))
        numbers = [str(n) for n in range(depth)]
        for value in ("effective_rank", "norm"):
            grid, roles = measures.by_layer_and_role(collected, collected.by_layer, value, stack)
            short = short_roles(roles)
            words = value.replace("_", " ").capitalize()
            part = collected.by_layer
            charts.append(
                svg.heat_map(f"{words}, {part}: layers x roles", grid, numbers, [short[r] for r in roles], digits=1)
            )
        if depth > 1:
            grid = measures.kl_matrix(collected, stack=stack)
            charts.append(svg.heat_map("KL between layers' spectra", grid, numbers, numbers, "layer"))
    top = trace.top_values(run.history)
    for part, (epochs, values) in top.items():
        rows = [str(n + 1) for n in range(len(values))]
        names = [f"{epoch:g}" for epoch in np.round(epochs, 2)]
        charts.append(svg.heat_map(f"Singular values of part {part}", values, rows, names, "epoch"))
    ranks = {part: (list(x), list(y)) for part, (x, y) in trace.series(run.history, "effective_rank").items()}
    if ranks:
        charts.append(svg.line_chart("Effective rank while training", ranks, "epoch"))
    return charts


def _decisions(run: Run) -> str:
    if not run.events:
        return ""
    rows = [
        [
            str(event.get("step", "")),
            str(event.get("kind", "")),
            str(event.get("reason", "")),
        ]
        for event in run.events
    ]
    return f"<h2>{escape(run.name)}: decisions</h2>" + _table(["step", "what", "why"], rows)


def _recipe(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.values.get("versions", {}).items())
    return (
        f"<details><summary>{escape(run.name)}: the resolved recipe</summary><pre>{escape(run.recipe)}</pre>"
        f"<p>{escape(versions)}</p></details>"
    )


def _section(title: str, charts: Sequence[str]) -> str:
    if not charts:
        return ""
    cells = "".join(f"<figure>{chart}</figure>" if chart.startswith("<svg") else chart for chart in charts)
    return f'<h2>{escape(title)}</h2><div class="grid">{cells}</div>'


def _number(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, int | float) else "-"


_STYLE = """
:root{--ink:#1d2733;--soft:#5b6775;--paper:#fff;--card:#f6f7f9;--line:#dde1e6;--hot:#12456b;--cold:#d8ecec;
--none:#cfcfcf;--c0:#1b6ca8;--c1:#d1495b;--c2:#2a9d8f;--c3:#b7791f;--c4:#7b5ea7;--c5:#5c6b73;--c6:#0b7a4b;--c7:#a33b8f;
color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e7ebf0;--soft:#a3adb9;--paper:#12161b;--card:#1b2128;--line:#323b45;
--hot:#7fd1e8;--cold:#1d3540;--none:#3b3f45;--c0:#6db7ee;--c1:#f28a97;--c2:#5fd3c4;--c3:#e8b45a;--c4:#b79fe0;
--c5:#a9b7bf;--c6:#58cf98;--c7:#e58ad4}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:16px}h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:1.6em 0 .5em;overflow-wrap:anywhere}.s{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{text-align:left;padding:5px 14px 5px 0;
border-bottom:1px solid var(--line);vertical-align:top}th{color:var(--soft);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px;align-items:start}
.grid p{grid-column:1/-1;margin:0;overflow-wrap:anywhere}.note{color:var(--c1)}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:6px}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}text{fill:var(--ink)}
.t{font-weight:700;font-size:12.5px}
.n{fill:var(--soft)}.e{text-anchor:end}.m{text-anchor:middle}.w{fill:var(--paper)}.k{fill:var(--ink)}
.g{stroke:var(--line)}.l{fill:none;stroke:var(--c);stroke-width:2}.p,.b{fill:var(--c)}
.h{fill:color-mix(in oklab,var(--hot) var(--v),var(--cold));stroke:var(--card);stroke-width:.6}.x{fill:var(--none)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}.c7{--c:var(--c7)}details{margin:1.2em 0}summary{cursor:pointer}
pre{overflow-x:auto;background:var(--card);padding:10px;border-radius:8px}
details p{color:var(--soft);overflow-wrap:anywhere}
""".replace("\n", "")
