"""All mistakes in a table's file at once, before recipes are made of it."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from ziggurat.nearest import did_you_mean
from ziggurat.recipe.glue import GLUE
from ziggurat.recipe.schema import Part, entry
from ziggurat.recipe.text import flatten
from ziggurat.recipe.values import key_problems
from ziggurat.terminal import clean

from .evaluated import MAIN, NONE, evaluation_problems
from .published import PublishedName


class TableKeys(Part):
    """The keys of a table. Their contents are checked further on."""

    about: str | None = entry(None, "one line about the table")
    recipe: str | None = entry(None, "a recipe to start from: a file, or one that ships")
    set: Any = entry(None, "recipe keys for all runs")
    methods: dict[Any, Any] = Field(
        description="label -> recipe keys of a method; `tasks:` in it names its only tasks, or changes keys for single "
        "ones"
    )
    tasks: Any = Field(description="label -> recipe keys of a task; a GLUE task's name alone stands for its data")
    seeds: list[Annotated[int, Field(ge=0, strict=True)]] = Field(
        description="the seeds, the same for every method and task"
    )
    baseline: Any = entry(None, "the method that differences are taken to (default: the first)")
    confidence: Annotated[float, Field(ge=50, lt=100)] = entry(
        95, "of the intervals, in per cent from 50 up to 100 (default: 95)"
    )
    published: PublishedName | None = entry(None, "published figures to print beside")
    output: str | None = entry(None, "folder of runs and results (default: ziggurat-tables/<file's name>)")
    keep_adapters: bool = entry(True, "whether the runs' folders stay (default: true)")


#: Recipe keys that the table sets itself.
_OWNED = {
    "seed": "by seeds",
    "name": "after method, task and seed",
    "output": "inside its own output",
    "resume": "where there is a checkpoint",
    "overwrite": "where there is none",
}


def table_problems(values: Any) -> Iterator[str]:
    """Every mistake in the form of a table's values."""
    if not isinstance(values, dict):
        yield "a table is a mapping with methods, tasks and seeds"
        return
    yield from key_problems(TableKeys.model_fields, values)
    yield from _key_problems("set", values.get("set"))
    tasks = values.get("tasks") or {}
    yield from _tasks_problems(tasks, isinstance(values.get("recipe"), str))
    methods = values["methods"] if isinstance(values.get("methods"), dict) else {}
    labels = [str(task) for task in tasks] if isinstance(tasks, dict | list) else []
    for label, keys in methods.items():
        yield from _method_problems(f"methods: {label}", keys, labels)
    yield from _label_problems("methods", methods)
    yield from _without_methods(labels, list(methods.values()))
    yield from _run_problems(values, [str(label) for label in methods])


def _run_problems(values: dict[str, Any], labels: list[str]) -> Iterator[str]:
    seeds = values.get("seeds")
    if isinstance(seeds, list) and len(set(map(str, seeds))) < len(seeds):
        yield "seeds: one is given twice; the same run twice is no second sample"
    baseline = values.get("baseline")
    if baseline is not None and labels and str(baseline) not in labels:
        yield f"baseline: '{baseline}' is no method of this table{did_you_mean(str(baseline), labels)}"


def _tasks_problems(tasks: Any, has_recipe: bool) -> Iterator[str]:
    if not isinstance(tasks, dict | list) or (
        isinstance(tasks, list) and not all(isinstance(task, str) for task in tasks)
    ):
        yield f"tasks: a list of GLUE's tasks, or a mapping label -> recipe keys, is needed, got {tasks!r}"
        return
    yield from _label_problems("tasks", tasks)
    for task in tasks:
        keys = tasks[task] if isinstance(tasks, dict) else None
        yield from _key_problems(f"tasks: {task}", keys)
        if keys is not None and not isinstance(keys, dict):
            continue
        flat = flatten(keys or {})
        if flat.get("evaluate") is not None:
            yield from (f"tasks: {task}: evaluate: {line}" for line in evaluation_problems(flat["evaluate"]))
            if has_recipe:
                continue  # whose data it learns from
        if task not in GLUE and "data.train" not in flat:
            problem = f"tasks: '{task}' is not one of GLUE's ({', '.join(GLUE)}) and names no data.train of its own"
            if task in MAIN:
                problem += (
                    f"; a model trained on a task with data.train is scored on {task} by evaluate: {{tasks: [{task}]}}"
                )
            yield problem


def _method_problems(where: str, keys: Any, tasks: list[str]) -> Iterator[str]:
    yield from _key_problems(where, keys)
    if keys is not None and not isinstance(keys, dict):
        return
    flat = flatten(keys or {})
    if "method.name" not in flat:
        yield f"{where}: names no method (method.name)"
    elif flat["method.name"] == NONE and any(key.startswith("method.") and key != "method.name" for key in flat):
        yield f"{where}: method.name: {NONE} is the base model as it is; it has no fields"
    inner = flat.get("tasks")
    if inner is None:
        return
    if not isinstance(inner, list | dict):
        yield f"{where}: tasks: a list of its only tasks, or a mapping task -> recipe keys, is needed, got {inner!r}"
        return
    if not inner:
        yield f"{where}: tasks: empty; name its only tasks, or leave it out"
    for task in inner:
        if str(task) not in tasks:
            yield f"{where}: tasks: '{task}' is no task of this table"
        elif isinstance(inner, dict):
            yield from _key_problems(f"{where}: tasks: {task}", inner[task])


def _without_methods(tasks: list[str], methods: list[Any]) -> Iterator[str]:
    only = [
        keys["tasks"] if isinstance(keys, dict) and isinstance(keys.get("tasks"), list) else None for keys in methods
    ]
    for task in tasks if only and None not in only else []:
        if not any(task in map(str, names or []) for names in only):
            yield f"tasks: {task}: every method names other tasks as its only ones"


def _key_problems(where: str, keys: Any) -> Iterator[str]:
    """Mistakes in recipe keys that a table gives."""
    if keys is not None and not isinstance(keys, dict):
        yield f"{where}: recipe keys are needed, got {keys!r}"
        return
    for key in keys or {}:
        if key in _OWNED:
            yield f"{where}: {key}: is the table's to set, {_OWNED[key]}"
    if where == "set" and "method.name" in flatten(keys or {}):
        yield "set: method.name: is for each method to say"


def _label_problems(section: str, labels: Any) -> Iterator[str]:
    """Labels with control characters, and duplicates: YAML takes 1 and '1' for two labels."""
    names = [str(label) for label in labels]
    for label in names:
        if "\n" in label or clean(label) != label:
            yield f"{section}: {label!r}: a label has no line breaks and no other control characters"
    for label in dict.fromkeys(label for label in names if names.count(label) > 1):
        yield f"{section}: '{label}' is given twice"
