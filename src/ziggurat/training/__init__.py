"""Train by recipe: read it (`load_recipe`, `make_recipe`), `train` it, `load_adapter_model` and `predict`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answer import Prediction as Prediction
    from .answer import predict as predict
    from .callbacks import callbacks_for as callbacks_for
    from .interrupt import Interrupted as Interrupted
    from .load import Loaded as Loaded
    from .load import load_adapter_model as load_adapter_model
    from .methods import METHODS as METHODS
    from .recipe import load_recipe as load_recipe
    from .recipe import make_recipe as make_recipe
    from .result import Result as Result
    from .run import train as train
    from .schema import Recipe as Recipe

_HOMES = {
    "answer": ("Prediction", "predict"),
    "callbacks": ("callbacks_for",),
    "interrupt": ("Interrupted",),
    "load": ("Loaded", "load_adapter_model"),
    "methods": ("METHODS",),
    "recipe": ("load_recipe", "make_recipe"),
    "result": ("Result",),
    "run": ("train",),
    "schema": ("Recipe",),
}


def __getattr__(name: str) -> Any:
    """Reading a recipe must not load Trainer, nor listing recipes torch: each name is imported when first used."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
