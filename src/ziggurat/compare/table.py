"""The table: methods, tasks and seeds from one YAML file, as recipes that are checked before anything runs."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ziggurat.errors import RecipeError
from ziggurat.nearest import missing_path
from ziggurat.recipe.glue import GLUE, PREFIX
from ziggurat.recipe.recipe import COMPUTATION, effective, find_recipe, make_recipe, resolved
from ziggurat.recipe.run_files import UNFINISHED
from ziggurat.recipe.schema import Recipe
from ziggurat.recipe.text import flatten, read_yaml
from ziggurat.training.data.content import contents

from .checks import table_problems
from .columns import Column, columns_of
from .evaluated import NONE, Evaluation, of_the_base, read_evaluation
from .published import published
from .shared import Shared

#: Keys that describe a recipe's data; a task with its own data starts without the recipe's.
_DATA_KEYS = ("task", "metric")
_KEPT = ("data.folder", "data.max_length", "data.max_train", "data.max_validation", "data.validation_rows")
#: Bytes of the label in a folder's name; file systems take 255 in all.
_MOST_LABEL = 120


@dataclass(frozen=True)
class Run:
    """One run: its place in the table, its recipe, its evaluation, and the key by which its results are found."""

    method: str
    task: str
    seed: int
    recipe: Recipe
    key: str
    evaluation: Evaluation | None = None

    @property
    def trains(self) -> bool:
        return self.recipe.method["name"] != NONE


@dataclass(frozen=True)
class Table:
    """A checked table; `runs` in their order: seed by seed, so that early rows are complete ones.

    `notes` tell of keys of `set` that a method doesn't have.
    """

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
    columns: list[Column] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, str]:
        """Column -> its metric."""
        return {column.name: column.metric for column in self.columns}

    def trains(self, method: str) -> bool:
        """Whether a method is more than the base model as it is."""
        return any(run.trains for run in self.runs if run.method == method)


def run_key(recipe: Recipe, evaluation: Evaluation | None = None) -> str:
    """16 hexadecimal digits of everything that changes the results.

    That is the resolved recipe with every field of the method, the digests of its files, the evaluation, and
    COMPUTATION.
    """
    values = effective(computed(recipe))
    values |= {key: content for key, content in contents(recipe).items() if key in values}
    values["computation"] = COMPUTATION
    if evaluation is not None:
        values["evaluate"] = {"tasks": evaluation.metrics, **evaluation.settings}
        if evaluation.retention is not None:
            values["evaluate"] |= evaluation.text_settings
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def computed(recipe: Recipe) -> dict[str, Any]:
    """The effective part of the resolved recipe: for an untrained base model, only the model's keys."""
    return of_the_base(recipe) if recipe.method["name"] == NONE else resolved(recipe)


def load_table(path: str | Path, output: str | Path | None = None) -> Table:
    """Read and check a table file. Raises RecipeError that lists every mistake of the table and of its recipes."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise RecipeError(f"the table {missing_path(path)}")
    try:
        values, problems = read_yaml(file.read_text(encoding="utf-8"), "table")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    if problems:
        raise refused(file.stem, problems)
    return make_table(values, file.stem, output)


def make_table(values: Any, name: str, output: str | Path | None = None) -> Table:
    """A table from a Python mapping; the same checks as for a file."""
    problems = list(table_problems(values))
    if problems:
        raise refused(name, problems)
    methods = {str(label): flatten(keys) for label, keys in values["methods"].items()}
    tasks = _tasks(values["tasks"])
    labels = list(methods)
    table = Table(
        name=name,
        about=values.get("about") or "",
        methods=labels,
        tasks=list(tasks),
        seeds=list(values["seeds"]),
        baseline=str(values["baseline"] if values.get("baseline") is not None else labels[0]),
        confidence=float(values.get("confidence", 95)),
        published=values.get("published"),
        folder=Path(output or values.get("output") or f"ziggurat-tables/{name}").expanduser(),
        keep_adapters=values.get("keep_adapters", True),
    )
    base, problems = _base(values)
    if table.folder.exists() and not table.folder.is_dir():
        problems.append(f"output: '{table.folder}' is a file; runs and results need a folder (--out)")
    shared, places = Shared(), Places(table.folder / "runs")
    for seed in table.seeds:
        for task, of_task in tasks.items():
            for method, of_method in methods.items():
                method_keys = _keys_on(task, of_method)
                if method_keys is None:
                    continue
                try:
                    table.runs.append(_run(table, base, shared, places, method, task, seed, method_keys, of_task))
                except RecipeError as error:
                    lines = str(error).splitlines()[1:] or [str(error)]
                    problems += [f"{method} on {task}: {line.strip()}" for line in lines]
    columns, unlike = columns_of(table.runs, table.tasks)
    problems += [*shared.problems(), *unlike]
    if problems:
        raise refused(name, list(dict.fromkeys(problems)))
    table.columns.extend(columns)
    table.notes.extend(shared.notes())
    if table.published is not None and not set(table.metrics) & set(published(table.published).columns):
        names = ", ".join(published(table.published).columns)
        table.notes.append(f"published: {table.published} has figures for {names}, no column of this table")
    return table


def _keys_on(task: str, of_method: dict[str, Any]) -> dict[str, Any] | None:
    """A method's recipe keys on one task; None if the method is for other tasks only."""
    keys = dict(of_method)
    single = keys.pop("tasks", None) or {}
    if isinstance(single, list):
        return keys if task in map(str, single) else None
    return {**keys, **flatten({str(label): keys for label, keys in single.items()}.get(task) or {})}


def _run(
    table: Table,
    base: tuple[dict[str, Any], dict[str, Any]],
    shared: Shared,
    places: "Places",
    method: str,
    task: str,
    seed: int,
    method_keys: dict[str, Any],
    of_task: dict[str, Any],
) -> Run:
    recipe_keys, for_all = base
    of_task = dict(of_task)
    evaluation = of_task.pop("evaluate", None)
    if "data.train" in of_task:
        foreign = [key for key in recipe_keys if key in _DATA_KEYS or key.startswith("data.")]
        # `data.loss` doesn't depend on the source of the texts.
        texts = evaluation is not None or {**for_all, **of_task}.get("task") == "instruct"
        kept_keys = (*_KEPT, "data.loss") if texts else _KEPT
        recipe_keys = {key: value for key, value in recipe_keys.items() if key not in foreign or key in kept_keys}
    shared_keys = shared.part(method, method_keys, {**for_all, **of_task})
    trains = method_keys["method.name"] != NONE
    if evaluation is not None:
        shared_keys.setdefault("task", recipe_keys.get("task", "instruct"))
    elif not trains:
        raise RecipeError(f"method.name: {NONE} has no trained head to score; it is for tasks with evaluate")
    # The base model's row is the same for all seeds; it is scored once.
    where = {"seed": seed, "name": f"{method} {task} {seed}"}
    if not trains:
        method_keys, where = (
            {**method_keys, "method.name": "head"},
            {"seed": table.seeds[0], "name": f"{method} {task}"},
        )
    where["name"] = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in str(where["name"]))
    values = {**recipe_keys, **shared_keys, **method_keys, **where, "output": "-"}
    # A recipe refuses a null; as a word without a value it takes the key out.
    emptied = [f"{key}=" for key, value in values.items() if value is None]
    given = {key: value for key, value in values.items() if value is not None}
    recipe = make_recipe(given, emptied, label=f"{method} on {task}")
    if evaluation is not None and recipe.task != "instruct":
        raise RecipeError(
            f"evaluate: is for task: instruct; with task: {recipe.task} the score is the task's own metric"
        )
    if not trains:
        recipe = recipe.model_copy(update={"method": {"name": NONE}})
    key = run_key(recipe, evaluation)
    recipe = recipe.model_copy(update={"output": str(places.of(recipe.name, run_key(recipe), key))})
    return Run(method, task, seed, recipe, key, evaluation)


class Places:
    """Folders of runs: `label-` and eight digits of the training's key, under `root`.

    An existing folder is found by its digits, so that a new label, or another evaluation, doesn't repeat the training.
    Runs that differ in the evaluation alone have a folder each: two processes can't fill one folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._there: dict[str, list[str]] = {}
        self._taken: dict[str, str] = {}
        if root.is_dir():
            for name in sorted({entry.name.removesuffix(UNFINISHED) for entry in root.iterdir()}):
                self._there.setdefault(name.rpartition("-")[2], []).append(name)

    def of(self, label: str, training: str, key: str) -> Path:
        """The folder of the run `key`; `training` is the key of its recipe alone."""
        short = label.encode()[:_MOST_LABEL].decode(errors="ignore")
        standard = f"{short}-{training[:8]}"
        existing = self._there.get(training[:8], [])
        free = (
            name for name in ([standard] if standard in existing else existing) if self._taken.get(name, key) == key
        )
        name = next(free, standard if self._taken.get(standard, key) == key else f"{standard}-{key[:8]}")
        self._taken[name] = key
        return self.root / name


def _base(values: dict[str, Any]) -> tuple[tuple[dict[str, Any], dict[str, Any]], list[str]]:
    """The keys of the base recipe, without its method's, and those of `set`; and mistakes in the recipe."""
    flat: dict[str, Any] = {}
    problems: list[str] = []
    if values.get("recipe") is not None:
        try:
            label, text = find_recipe(values["recipe"])
            flat, mistakes = read_yaml(text)
            problems += [f"recipe {label}: {line}" for line in mistakes]
        except RecipeError as error:
            problems.append(f"recipe: {error}")
    flat = {key: value for key, value in flat.items() if not key.startswith("method.")}
    return (flat, flatten(values.get("set") or {})), problems


def _tasks(listed: Any) -> dict[str, dict[str, Any]]:
    """Label -> recipe keys; `rte`, in a list or with keys, stands for `data.train: glue/rte`."""
    named = listed if isinstance(listed, dict) else dict.fromkeys(listed)
    tasks: dict[str, dict[str, Any]] = {}
    for label, keys in named.items():
        flat = flatten(keys or {})
        if "data.train" not in flat and label in GLUE and "evaluate" not in flat:
            flat["data.train"] = PREFIX + str(label)
        if flat.get("evaluate") is not None:
            flat["evaluate"] = read_evaluation(flat["evaluate"])
        tasks[str(label)] = flat
    return tasks


def refused(name: str, problems: list[str]) -> RecipeError:
    """The error that lists a table's mistakes."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return RecipeError(f"the table {name!r} has {count}:\n" + "\n".join(f"  {line}" for line in problems))
