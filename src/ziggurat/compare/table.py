"""The table to fill: methods, tasks and seeds from one YAML file, as recipes that are checked before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ziggurat.errors import RecipeError
from ziggurat.training.glue import GLUE, PREFIX
from ziggurat.training.nearest import did_you_mean, missing_path
from ziggurat.training.recipe import find_recipe, make_recipe, resolved
from ziggurat.training.schema import Recipe
from ziggurat.training.source import flatten, read_yaml

from .published import PUBLISHED

_KEYS = {
    "about": "one line that says what the table is",
    "recipe": "a recipe to start from: a file, or one that ships",
    "set": "recipe keys for all runs",
    "methods": "label -> recipe keys of a method; `tasks:` in it changes keys for single tasks",
    "tasks": "label -> recipe keys of a task; a GLUE task's name alone stands for its data",
    "seeds": "the seeds, the same for every method and task",
    "baseline": "the method that differences are taken to (default: the first)",
    "confidence": "of the intervals, in per cent (default: 95)",
    "published": "published figures to print beside: " + ", ".join(PUBLISHED),
    "output": "folder of runs and results (default: ziggurat-tables/<file's name>)",
    "keep_adapters": "whether the runs' folders stay (default: true)",
}
#: What a run is called and where it lies doesn't change what it computes.
_NOT_IN_KEY = ("about", "name", "output")
#: What describes the data of a recipe; a task that names its own data starts without the recipe's.
_DATA_KEYS = ("task", "metric")


@dataclass(frozen=True)
class Run:
    """One run: its place in the table, its recipe, and the key that says whether it has been done."""

    method: str
    task: str
    seed: int
    recipe: Recipe
    key: str


@dataclass(frozen=True)
class Table:
    """A checked table; `runs` in the order they are taken: seed by seed, so that early rows are complete ones."""

    name: str
    about: str
    methods: list[str]
    tasks: list[str]
    seeds: list[int]
    baseline: str
    confidence: float
    published: str | None
    folder: Path
    keep_adapters: bool
    runs: list[Run] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, str]:
        """Task -> the metric of its column."""
        return {run.task: run.recipe.main_metric for run in self.runs}


def run_key(recipe: Recipe) -> str:
    """16 hexadecimal digits of everything in the resolved recipe that changes what a run computes."""
    values = {key: value for key, value in resolved(recipe).items() if key not in _NOT_IN_KEY}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_table(path: str | Path, output: str | Path | None = None) -> Table:
    """Read and check a table file. Raises RecipeError that lists every mistake of the table and of its recipes."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise RecipeError(f"the table {missing_path(path)}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    return make_table(values, file.stem, output)


def make_table(values: Any, name: str, output: str | Path | None = None) -> Table:
    """A table from a Python mapping; the same checks as for a file."""
    problems = list(_problems(values))
    if problems:
        raise _refused(name, problems)
    labels = [str(label) for label in values["methods"]]
    tasks = _tasks(values["tasks"])
    folder = Path(output or values.get("output") or f"ziggurat-tables/{name}").expanduser()
    table = Table(
        name=name,
        about=str(values.get("about", "")),
        methods=labels,
        tasks=list(tasks),
        seeds=list(values["seeds"]),
        baseline=str(values.get("baseline", labels[0])),
        confidence=float(values.get("confidence", 95)),
        published=values.get("published"),
        folder=folder,
        keep_adapters=bool(values.get("keep_adapters", True)),
    )
    base, problems = _base(values)
    for seed in table.seeds:
        for task, of_task in tasks.items():
            for method, of_method in values["methods"].items():
                where = f"{method} on {task}"
                try:
                    table.runs.append(_run(table, base, str(method), task, seed, of_method, of_task))
                except RecipeError as error:
                    if seed == table.seeds[0]:
                        problems += [f"{where}: {line.strip()}" for line in str(error).splitlines()[1:] or [str(error)]]
    if problems:
        raise _refused(name, list(dict.fromkeys(problems)))
    return table


def _run(
    table: Table, base: dict[str, Any], method: str, task: str, seed: int, of_method: Any, of_task: dict[str, Any]
) -> Run:
    own = dict(of_method)
    single = (own.pop("tasks", None) or {}).get(task) or {}
    start = base
    if "data.train" in of_task:
        start = {key: value for key, value in base.items() if key not in _DATA_KEYS and not key.startswith("data.")}
        kept = ("data.folder", "data.max_length", "data.max_train", "data.max_validation", "data.validation_rows")
        start |= {key: base[key] for key in kept if key in base}
    if any(key.startswith("method.") for key in flatten(own)):
        start = {key: value for key, value in start.items() if not key.startswith("method.")}
        start |= {key: value for key, value in flatten(base.get("_shared", {})).items() if key.startswith("method.")}
    start = {key: value for key, value in start.items() if key != "_shared"}
    values = {**start, **of_task, **flatten(own), **flatten(single), "seed": seed, "name": f"{method} {task} {seed}"}
    values["name"] = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in str(values["name"]))
    values = {key: value for key, value in values.items() if value is not None}
    recipe = make_recipe({**values, "output": "-"}, label=f"{method} on {task}")
    key = run_key(recipe)
    place = table.folder / "runs" / f"{values['name']}-{key[:8]}"
    return Run(method, task, seed, recipe.model_copy(update={"output": str(place)}), key)


def _base(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    flat: dict[str, Any] = {}
    problems: list[str] = []
    if values.get("recipe") is not None:
        try:
            label, text = find_recipe(str(values["recipe"]))
            flat, found = read_yaml(text)
            problems += [f"recipe {label}: {line}" for line in found]
        except RecipeError as error:
            problems.append(f"recipe: {error}")
    shared = flatten(values.get("set") or {})
    return {**flat, **shared, "_shared": shared}, problems


def _tasks(given: Any) -> dict[str, dict[str, Any]]:
    """Label -> recipe keys; `rte`, in a list or with keys of its own, stands for `data.train: glue/rte`."""
    named = given if isinstance(given, dict) else dict.fromkeys(given)
    tasks: dict[str, dict[str, Any]] = {}
    for label, keys in named.items():
        flat = flatten(keys or {})
        if "data.train" not in flat and label in GLUE:
            flat["data.train"] = PREFIX + str(label)
        tasks[str(label)] = flat
    return tasks


def _problems(values: Any) -> Iterator[str]:
    if not isinstance(values, dict):
        yield "a table is a mapping with methods, tasks and seeds"
        return
    for key in values:
        if key not in _KEYS:
            yield f"{key}: unknown{did_you_mean(str(key), _KEYS) or ', one of ' + ', '.join(_KEYS)}"
    for key in ("methods", "tasks", "seeds"):
        if not values.get(key):
            yield f"{key}: missing: {_KEYS[key]}"
    methods, tasks = values.get("methods"), values.get("tasks")
    if methods and not isinstance(methods, dict):
        yield "methods: a mapping is needed, label -> recipe keys"
        methods = None
    yield from _entry_problems("methods", methods)
    if isinstance(tasks, dict):
        yield from _entry_problems("tasks", tasks)
    elif tasks and not isinstance(tasks, list):
        yield "tasks: a list of GLUE's tasks, or a mapping label -> recipe keys, is needed"
        tasks = None
    for task in tasks or []:
        keys = tasks[task] if isinstance(tasks, dict) else None
        if task not in GLUE and "data.train" not in flatten(keys if isinstance(keys, dict) else {}):
            yield f"tasks: '{task}' is not one of GLUE's ({', '.join(GLUE)}) and names no data.train of its own"
    for label, keys in (methods or {}).items():
        inner = keys.get("tasks") if isinstance(keys, dict) else None
        for task in inner or []:
            if task not in (tasks or []):
                yield f"methods: {label}: tasks: '{task}' is no task of this table"
    seeds = values.get("seeds")
    if seeds and (not isinstance(seeds, list) or any(type(seed) is not int or seed < 0 for seed in seeds)):
        yield f"seeds: a list of whole numbers is needed, got {seeds!r}"
    elif seeds and len(set(seeds)) < len(seeds):
        yield "seeds: one is given twice; the same run twice is no second sample"
    baseline = values.get("baseline")
    if baseline is not None and methods and baseline not in methods:
        yield f"baseline: '{baseline}' is no method of this table{did_you_mean(str(baseline), map(str, methods))}"
    confidence = values.get("confidence", 95)
    if type(confidence) not in (int, float) or not 50 <= confidence < 100:
        yield f"confidence: per cent from 50 up to, not including, 100 are needed, got {confidence!r}"
    published = values.get("published")
    if published is not None and published not in PUBLISHED:
        yield f"published: '{published}' is not one of {', '.join(PUBLISHED)}"
    if type(values.get("keep_adapters", True)) is not bool:
        yield "keep_adapters: true or false is needed"


def _entry_problems(section: str, entries: Any) -> Iterable[str]:
    for label, keys in (entries or {}).items():
        if keys is not None and not isinstance(keys, dict):
            yield f"{section}: {label}: recipe keys are needed, got {keys!r}"
        elif section == "methods" and "method.name" not in flatten(keys or {}):
            yield f"methods: {label}: names no method (method.name)"
        elif keys and "seed" in keys:
            yield f"{section}: {label}: seed: is the table's to set, by seeds"


def _refused(name: str, problems: list[str]) -> RecipeError:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return RecipeError(f"the table {name} has {count}:\n" + "\n".join(f"  {line}" for line in problems))
