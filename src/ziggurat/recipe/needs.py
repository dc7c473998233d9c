"""The packages outside the core that training by a recipe imports."""

from __future__ import annotations

from ziggurat.extras import require

from .embedded import EMBEDDED, PACKAGE
from .methods import METHODS
from .schema import Recipe


def needs(recipe: Recipe) -> dict[str, str]:
    """Package -> what in the recipe asks for it."""
    found = {"datasets": f"data.train: {recipe.data.train}", recipe.kind.package: f"task: {recipe.task}"}
    if recipe.model == EMBEDDED:
        found[PACKAGE] = f"model: {EMBEDDED}"
    if recipe.gguf_file is not None:
        found["gguf"] = f"gguf_file: {recipe.gguf_file}"
    if recipe.sampling.vllm is not None:
        found["vllm"] = f"sampling.vllm: {recipe.sampling.vllm}"
    if METHODS[recipe.method["name"]].four_bits:
        found["bitsandbytes"] = f"method {recipe.method['name']}"
    return found


def check(recipe: Recipe, what: str = "training") -> None:
    """Raise MissingExtraError unless all that `recipe` needs is installed."""
    require(what, *needs(recipe))
