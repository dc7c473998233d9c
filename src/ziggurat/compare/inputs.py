"""Checks of models, data and lm-eval's tasks of a table's runs before the first run."""

from collections.abc import Callable, Sequence

from ziggurat.errors import ConfigError, DataError, RecipeError
from ziggurat.recipe.schema import Recipe

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

    problems: list[str] = []
    checked = set()

    def check(key: object, where: str, read: Callable[[Recipe], object], recipe: Recipe) -> None:
        if key in checked:
            return
        checked.add(key)
        try:
            read(recipe)
        except (ConfigError, DataError, RecipeError) as error:
            problems.append(f"{where}{error}")

    with quiet():
        for run in runs:
            recipe = run.recipe
            check((recipe.model, recipe.revision, recipe.gguf_file), "model: ", _read_config, recipe)
            if run.trains:
                check((run.task, recipe.task, recipe.data.model_dump_json()), f"{run.task}: ", load_examples, recipe)
    if problems:
        raise refused(name, list(dict.fromkeys(problems)))
    check_ready([run.evaluation for run in runs if run.evaluation is not None])


def _read_config(recipe: Recipe) -> None:
    from ziggurat.training.model.meta import bare_config

    bare_config(recipe.model, revision=recipe.revision, gguf_file=recipe.gguf_file)
