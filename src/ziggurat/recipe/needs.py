"""The packages outside the core that training by a recipe imports."""

from ziggurat.extras import require

from .embedded import EMBEDDED, PACKAGE
from .methods import METHODS
from .schema import Recipe

#: Part of an optimiser's name -> its package, if not torch or transformers; the first match counts.
_OF_OPTIMIZERS = {
    **dict.fromkeys(("torch_8bit", "torch_4bit"), "torchao"),
    **dict.fromkeys(("bnb", "8bit", "paged", "lion", "ademamix"), "bitsandbytes"),
    "galore": "galore-torch",
    "lomo": "lomo-optim",
    "apollo": "apollo-torch",
    "schedule_free": "schedulefree",
    "stable_adamw": "torch-optimi",
}


def needs(recipe: Recipe) -> dict[str, str]:
    """Package -> the part of the recipe that needs it."""
    packages = {"datasets": f"data.train: {recipe.data.train}", recipe.kind.package: f"task: {recipe.task}"}
    if recipe.model == EMBEDDED:
        packages[PACKAGE] = f"model: {EMBEDDED}"
    if recipe.gguf_file is not None:
        packages["gguf"] = f"gguf_file: {recipe.gguf_file}"
    if recipe.sampling.vllm is not None:
        packages["vllm"] = f"sampling.vllm: {recipe.sampling.vllm}"
    optimizer = recipe.train.optimizer or ""
    if package := next((package for part, package in _OF_OPTIMIZERS.items() if part in optimizer), None):
        packages[package] = f"train.optimizer: {optimizer}"
    if METHODS[recipe.method["name"]].four_bits:
        packages["bitsandbytes"] = f"method {recipe.method['name']}"
    return packages


def check(recipe: Recipe, subject: str = "training") -> None:
    """Raise MissingExtraError unless all packages that `recipe` needs are installed."""
    require(subject, *needs(recipe))
