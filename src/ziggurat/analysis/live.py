"""The page of a running training: its curves from its log file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ziggurat.errors import ConfigError
from ziggurat.recipe.run_files import PROGRESS, RUN, UNFINISHED

from . import svg
from .page import Section, template

#: Seconds after which a browser loads the page again.
REFRESH = 5


def places_of(run: str | Path) -> tuple[Path, Path]:
    """The final folder of a run, and its working folder; `run` may be either.

    Raises ConfigError where neither exists.
    """
    path = Path(run).expanduser()
    final = path.with_name(path.name.removesuffix(UNFINISHED))
    work = final.with_name(final.name + UNFINISHED)
    if not work.is_dir() and not (final / RUN).is_file():
        raise ConfigError(f"there is no run in {final}: neither {work}, where it would train, nor {final / RUN}.")
    return final, work


def read_progress(work: Path) -> list[dict[str, Any]]:
    """The logged lines of a run; of lines that a resumed run logged again, the later one."""
    file = work / PROGRESS
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # an incomplete line, of a run that is writing it or was killed
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            key = line["step"], "loss" in line
            lines[key] = lines.get(key, {}) | line  # scores and the end of training log at the same step
    return [lines[key] for key in sorted(lines)]


def live_page(final: Path, lines: list[dict[str, Any]]) -> str:
    """The page of a running training, which reloads itself every `REFRESH` seconds."""
    last = lines[-1] if lines else {}
    state = [[name, f"{last[name]:g}"] for name in ("step", "steps", "left") if isinstance(last.get(name), int | float)]
    newest: dict[str, Any] = {}
    for line in lines:
        newest |= {name: value for name, value in line.items() if name not in ("step", "steps", "left")}
    scores = [[name, f"{value:.4g}"] for name, value in newest.items() if isinstance(value, int | float)]
    charts = [Markup(chart) for chart in _charts(lines)]  # noqa: S704  svg.py escapes every text in it
    return template().render(
        refresh=REFRESH,
        title=f"{final.name} (training)",
        scores=(["logged last", ""], scores),
        cost=(["progress", ""], state or [["step", "not begun"]]),
        curves=Section("Curves", charts) if charts else None,
        compared=None,
        runs=[],
    )


def _charts(lines: list[dict[str, Any]]) -> Iterator[str]:
    names = [name for line in lines for name in line if name == "loss" or name.startswith("eval_")]
    timing = ("runtime", "per_second", "preparation_time")
    for name in [*dict.fromkeys(names), "learning_rate"]:
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        if len(points) > 1 and not any(word in name for word in timing):
            x, y = zip(*points, strict=True)
            yield svg.line_chart(name, {name: (x, y)}, "step")
