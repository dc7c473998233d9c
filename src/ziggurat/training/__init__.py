"""Train by recipe: read it (`load_recipe`, `make_recipe`), `train` it, `load_adapter_model` and `predict`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ziggurat.recipe.methods import METHODS as METHODS
    from ziggurat.recipe.recipe import load_recipe as load_recipe
    from ziggurat.recipe.recipe import make_recipe as make_recipe
    from ziggurat.recipe.schema import Recipe as Recipe

    from .answers.load import Loaded as Loaded
    from .answers.load import load_adapter_model as load_adapter_model
    from .answers.predict import Prediction as Prediction
    from .answers.predict import predict as predict
    from .callbacks.allocation import callbacks_for as callbacks_for
    from .callbacks.interrupt import Interrupted as Interrupted
    from .loop.result import Result as Result
    from .loop.run import train as train

_HOMES = {
    "ziggurat.recipe.methods": ("METHODS",),
    "ziggurat.recipe.recipe": ("load_recipe", "make_recipe"),
    "ziggurat.recipe.schema": ("Recipe",),
    "ziggurat.training.answers.load": ("Loaded", "load_adapter_model"),
    "ziggurat.training.answers.predict": ("Prediction", "predict"),
    "ziggurat.training.callbacks.allocation": ("callbacks_for",),
    "ziggurat.training.callbacks.interrupt": ("Interrupted",),
    "ziggurat.training.loop.result": ("Result",),
    "ziggurat.training.loop.run": ("train",),
}


def __getattr__(name: str) -> Any:
    """Import each name at its first use: reading a recipe must not load Trainer, nor listing recipes torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
