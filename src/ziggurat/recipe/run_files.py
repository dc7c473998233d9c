"""The files of a run of `ziggurat train`, and reading them once it is finished."""

from pathlib import Path
from typing import Any

from ziggurat.errors import ConfigError, RecipeError
from ziggurat.nearest import missing_path

from .recipe import find_recipe

RECIPE, RUN = "recipe.yaml", "run.json"
#: The log, one JSON object a line, for programs that follow the run.
PROGRESS = "progress.jsonl"
#: Suffix of a run's folder until the run is complete.
UNFINISHED = ".unfinished"


def is_run(folder: Path) -> bool:
    """True for a folder with the files of a run: a recipe to rebuild its model by, and its results."""
    return (folder / RUN).is_file() and (folder / RECIPE).is_file()


def read_files(folder: Path, needed: str) -> tuple[dict[str, Any], str]:
    """run.json and the recipe's text of a finished run. Raises RecipeError that names missing files.

    `needed`: a key of run.json, which an unfinished run lacks.
    """
    from ziggurat.files.untrusted import MOST_RUN, own_file, read_json

    if not folder.is_dir():
        problem = f"'{folder}' is not a folder" if folder.exists() else f"adapter folder {missing_path(folder)}"
        raise RecipeError(problem)
    for name in (RUN, RECIPE):
        if not (folder / name).is_file():
            if folder.name.endswith(UNFINISHED):
                raise RecipeError(f"'{folder}' is an unfinished run; go on with resume=true first")
            inner = sorted(entry.parent.name for entry in folder.glob(f"*/{RUN}"))
            hint = f"; its folders that are: {', '.join(inner)}" if inner else ""
            raise RecipeError(f"'{folder}' was not written by `ziggurat train` (it has no {name}){hint}")
    try:
        values = read_json(folder, RUN, MOST_RUN)
        _, text = find_recipe(own_file(folder, RECIPE))
    except ConfigError as error:
        raise RecipeError(f"'{folder}' cannot be read: {error}") from error
    if not isinstance(values, dict) or needed not in values:
        raise RecipeError(f"'{folder}' is an unfinished run; go on with resume=true first")
    return values, text
