"""Checks of a model's name that is really a recipe, the folder of a run, or an adapter."""

from pathlib import Path
from shlex import quote

from ziggurat.errors import ConfigError, RecipeError


def check_model_word(model: str) -> None:
    """Raises ConfigError with the right command, if `model` is surely something else."""
    from ziggurat.recipe.recipe import load_recipe, shipped

    path = Path(model).expanduser()
    if (path / "config.json").is_file() or path.suffix in (".json", ".gguf"):
        return
    is_recipe = path.suffix in (".yaml", ".yml") or (model in shipped() and not path.exists())
    if is_recipe or (path / "recipe.yaml").is_file():
        kind = "a recipe" if is_recipe else "the folder of a run"
        try:
            named = load_recipe(model).model
        except RecipeError:
            named = "MODEL"
        raise ConfigError(
            f"{model} is {kind}, and plan takes the model first: ziggurat plan {quote(named)} {quote(model)}"
        )
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{model} is an adapter's folder, and plan counts before there is one: ziggurat plan MODEL method.r=...; "
            f"to inspect the adapter: ziggurat analyze {quote(model)}"
        )
