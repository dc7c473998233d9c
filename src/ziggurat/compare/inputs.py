"""Checks of models, data and lm-eval's tasks of a table's runs before the first run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ziggurat.errors import ConfigError, DataError, RecipeError

from .evaluated import check_ready
from .table import Run, refused


def check_inputs(name: str, runs: Sequence[Run]) -> None:
    """Read the inputs of the runs of the table `name`: each model's config, each task's rows, lm-eval's tasks.

    Raises:
        RecipeError: models, files or columns that don't exist, all at once and each one once; or lm-eval knows no such
            task.
        DataError: lm-eval's data can't be read.
    """
    from ziggurat.training.data.examples import load_examples
    from ziggurat.training.loop.trainers import quiet
    from ziggurat.training.model.meta import bare_config

    problems: list[str] = []
    checked = set()

    def check(key: object, where: str, read: Callable[[], object]) -> None:
        if key in checked:
            return
        checked.add(key)
        try:
            read()
        except (ConfigError, DataError, RecipeError) as error:
            problems.append(f"{where}{error}")

    with quiet():
        for run in runs:
            recipe = run.recipe
            where: dict[str, Any] = {"revision": recipe.revision, "gguf_file": recipe.gguf_file}
            check((recipe.model, *where.values()), "model: ", partial(bare_config, recipe.model, **where))
            if run.trains:
                key = run.task, recipe.task, recipe.data.model_dump_json()
                check(key, f"{run.task}: ", partial(load_examples, recipe))
    if problems:
        raise refused(name, list(dict.fromkeys(problems)))
    check_ready([run.evaluation for run in runs if run.evaluation is not None])
