"""Recipes: finding, reading, complete checks before anything is loaded, and writing beside the adapter."""

import shlex
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ziggurat.errors import RecipeError
from ziggurat.nearest import did_you_mean, missing_path, nearest

from .conflicts import conflicts, tasks_of, unmerged_with_vllm, unread_spectra
from .glue import fill_in, glue_name
from .methods import BUDGET, METHODS, SYNONYMS, method_config, method_fields, method_problems, no_such_field
from .schema import Recipe, keys
from .tasks import task_called
from .text import MOST_TEXT, SECTIONS, flatten, read_overrides, read_yaml
from .values import fault_of

#: Incremented whenever the same recipe, on the same data, gives other results than before.
COMPUTATION = 2
#: Endings of data files, which may be given as a recipe by mistake.
_DATA = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt", ".xlsx")
#: A run's names, folder, trackers and data loading, which don't change its results.
_WITHOUT_EFFECT = (
    *("about", "name", "output", "train.answers"),
    *("train.eval_batch", "train.keep", "train.report_to", "train.workers"),
)
#: Key -> other programs' spellings of its values.
SPELLINGS = {
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"},
    "train.precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
}
#: Unknown key -> the key that it may stand for, besides other programs' names (`names.yaml`).
_SYNONYMS = {
    **SYNONYMS,
    "accumulation": "train.accumulate",
    "description": "about",
    "epoch": "train.epochs",
    "eval": "data.validation",
    "image_folder": "data.image_folder",
    "labels": "data.label",
    "logging": "train.report_to",
    "max_len": "data.max_length",
    "pooling": "head.pooling",
    "rlhf": "task",
    "rlhf_type": "task",
    "sentence": "data.text",
    "steps": "train.max_steps",
    "teacher_model": "teacher.model",
    "teacher_model_name_or_path": "teacher.model",
    "teacher_model_revision": "teacher.revision",
    "test": "data.validation",
    "wd": "train.weight_decay",
}


def shipped() -> dict[str, str]:
    """Name -> text of the recipes that come with the package, the default first."""
    folder = files("ziggurat") / "recipes"
    recipes = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    return dict(sorted(recipes.items(), key=lambda item: (item[0] != "default", item[0])))


def find_recipe(source: str | Path) -> tuple[str, str]:
    """The label and the text of a recipe, given as a file or by the name of a shipped one.

    Raises RecipeError with the nearest names if there is neither.
    """
    path = Path(source).expanduser()
    if path.name.lower().removesuffix(".gz").endswith(_DATA) or _is_list(path):
        raise RecipeError(
            f"'{source}' holds data, and a recipe is needed: `ziggurat init {shlex.quote(str(source))}` writes one"
        )
    if path.is_file():
        try:
            if path.stat().st_size > MOST_TEXT:
                raise RecipeError(f"{source} has {path.stat().st_size:,} bytes; a recipe has at most {MOST_TEXT:,}")
            return path.name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{source} cannot be read: {error}") from error
    names = shipped()
    if str(source) in names:
        return f"{source}.yaml", names[str(source)]
    if path.is_dir():
        if (path / "recipe.yaml").is_file():
            return find_recipe(path / "recipe.yaml")
        raise RecipeError(f"'{source}' is a folder without a recipe.yaml; name a recipe file")
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        stem = nearest(path.stem, names)
        hint = f" The recipe '{stem}' ships with ziggurat." if stem else ""
        raise RecipeError(f"the recipe {missing_path(source)}.{hint}")
    hint = did_you_mean(str(source), names)
    raise RecipeError(
        f"'{source}' is neither a file nor a recipe that ships with ziggurat{hint}; `ziggurat recipes` lists them"
    )


def _is_list(path: Path) -> bool:
    """True for a .json file that holds a list, as data do: a recipe in JSON is an object."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def load_recipe(source: str | Path = "default", overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe file or a shipped recipe, with `key=value` words on top.

    Raises RecipeError that lists every mistake of file and words at once.
    """
    label, text = find_recipe(source)
    return recipe_of(text, overrides, label=label, source=source)


def recipe_of(text: str, overrides: Iterable[str] = (), *, label: str, source: str | Path = "recipe") -> Recipe:
    """Check the text of a recipe with `key=value` overrides; `label` names it in errors, `source` is its path.

    Raises RecipeError that lists every mistake of text and words at once.
    """
    flat, problems = read_yaml(text)
    if problems and not flat:
        raise _refused(label, problems)
    extra, word_problems = read_overrides(overrides)
    flat.setdefault("name", Path(label).stem)
    if label == "recipe.yaml" and flat["name"] == "recipe":
        flat["name"] = Path(source).resolve().parent.name
    return _checked(label, flat, extra, problems + word_problems)


def make_recipe(values: Mapping[str, Any], overrides: Iterable[str] = (), label: str = "the recipe") -> Recipe:
    """A recipe from a Python mapping, nested or dotted; the same checks as for a file."""
    extra, problems = read_overrides(overrides)
    return _checked(label, flatten(dict(values)), extra, problems)


def _refused(label: str, problems: list[str]) -> RecipeError:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return RecipeError(f"{label} has {count}:\n" + "\n".join(f"  {line}" for line in problems))


def _checked(label: str, flat: dict[str, Any], extra: dict[str, Any], problems: list[str]) -> Recipe:
    # An override without a value resets the key to its default: the only way to drop a method's field.
    emptied = [key for key, value in extra.items() if value is None and key not in flat]
    flat = {key: value for key, value in {**flat, **extra}.items() if key not in extra or value is not None}
    several = flat.get("data.train")
    if isinstance(several, list) and several:
        flat["data.train"] = several[0]
        if len(several) > 1:
            flat["data.more"] = several[1:]
    problems += fill_in(flat)
    schema = keys()
    choice = {key.removeprefix("method."): value for key, value in flat.items() if key.startswith("method.")}
    known = [*schema, "method.name"]
    good: dict[str, Any] = {}
    for key, value in flat.items():
        if key.startswith("method."):
            continue
        if key in schema:
            value = SPELLINGS.get(key, {}).get(str(value), value)
            fault = fault_of(schema[key], value)
            if fault is None:
                good[key] = value
            elif key == "task" and task_called(value):
                problems.append(f"task: {value} is called {task_called(value)} here")
            else:
                problems.append(f"{key}: {fault}")
        else:
            problems.append(f"{key}: {_unknown(key, known, choice, value)}")
    problems += [
        f"{key}: {_unknown(key, known, choice, None)}"
        for key in emptied
        if key not in known and not _fits_a_method(key)
    ]
    problems += [
        f"{key}: missing: {info.description}" for key, info in schema.items() if info.is_required() and key not in flat
    ]
    problems += conflicts(good)
    problems += method_problems(choice) or [*unmerged_with_vllm(good, choice), *unread_spectra(good, choice)]
    if problems:
        raise _refused(label, problems)
    nested: dict[str, Any] = {"method": choice}
    for key, value in good.items():
        *path, name = key.split(".")
        part = nested
        for section in path:
            part = part.setdefault(section, {})
        part[name] = value
    return Recipe.model_validate(nested)


def _unknown(key: str, names: list[str], choice: dict[str, Any], value: Any) -> str:
    """The fault of an unknown key, with a hint: by our synonyms, by other programs' names, or by its spelling."""
    from .names import answer

    if key in SECTIONS:
        return f"needs its own keys, {_example(key)}"
    hint = answer(key) if key.rpartition(".")[2] not in _SYNONYMS else None
    if hint is None:
        fields = [f"method.{name}" for name in _fields_of(choice)]
        hint = did_you_mean(key, [*names, *fields], _SYNONYMS) or "; docs/recipes.md lists the keys"
    if hint == ", did you mean task?" and task_called(value):
        hint = f", did you mean task: {task_called(value)}?"
    _, of_the_method, field = hint.rstrip("?").partition(", did you mean method.")
    fields = ["name", BUDGET, *_fields_of(choice)]
    if of_the_method and choice.get("name") in METHODS and field not in fields:
        return f"unknown; {no_such_field(choice['name'], field, fields)}"
    return f"unknown{hint}"


def _fields_of(choice: dict[str, Any]) -> list[str]:
    from .methods import method_fields

    name = choice.get("name")
    try:
        return list(method_fields(name)) if isinstance(name, str) and name in METHODS else []
    except RecipeError:  # the installed PEFT doesn't have it
        return []


def _fits_a_method(key: str) -> bool:
    """Whether `key` is a field of some method, so that words which drop it suit recipes of all methods."""
    section, _, name = key.partition(".")
    return section == "method" and (name == BUDGET or any(name in _fields_of({"name": method}) for method in METHODS))


def _example(section: str) -> str:
    return {
        "data": "for example data.train: reviews.csv",
        "data.columns": "for example data.columns.prompt: question",
        "data.roles": "for example data.roles.user: [customer]",
        "head": "for example head.pooling: mean",
        "rewards": "for example rewards.functions: [last_number]",
        "sampling": "for example sampling.completions: 8",
        "teacher": "for example teacher.model: HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "train": "for example train.lr: 1.0e-3",
        "method": "for example method.name: msplora",
    }[section]


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as one flat mapping with defaults, except the method's; local paths are made absolute."""
    sections = ("rewards", "sampling", "teacher")
    elsewhere = {section for section in sections if recipe.task not in tasks_of(f"{section}.")}
    flat = flatten(recipe.model_dump(exclude={"resume", "overwrite", *elsewhere}))
    paths = ("model", "adapter", "teacher.model", "data.train", "data.validation", "data.folder", "data.image_folder")
    for key in paths:
        value = flat.get(key)
        named = value in ("embedded", "demo") or glue_name(value) is not None
        if value is not None and not named and Path(value).expanduser().exists():
            flat[key] = str(Path(value).expanduser().resolve())
    if flat.get("data.more"):
        paths = [Path(source).expanduser() for source in flat["data.more"]]
        flat["data.more"] = [str(path.resolve()) if path.exists() else str(path) for path in paths]
    if isinstance(source := flat.get("method.from_adapter"), str):
        flat["method.from_adapter"] = str(Path(source).expanduser().resolve())
    return {key: value for key, value in flat.items() if value is not None}


def effective(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved recipe that decides the results, in one spelling: 0.0 is 0, and targets are sorted.

    Every field of the method is included, with its default if the recipe doesn't set it.
    """
    plain = {key: _one_spelling(value) for key, value in flat.items() if key not in _WITHOUT_EFFECT}
    choice = {key.removeprefix("method."): value for key, value in flat.items() if key.startswith("method.")}
    try:
        config = method_config(choice)
        fields = (*method_fields(choice["name"]), *METHODS[choice["name"]].fixed)
        return plain | {f"method.{name}": _one_spelling(getattr(config, name)) for name in fields}
    except (KeyError, ValueError, TypeError, RecipeError):  # no method of this version, or none that trains
        return plain


def _one_spelling(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return sorted(map(str, value)) if isinstance(value, set) else value


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True, width=10_000)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys that differ between two resolved recipes, as `key: old -> new`."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed]
