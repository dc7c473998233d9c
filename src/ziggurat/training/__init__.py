"""Train by recipe: read it (`load_recipe`, `make_recipe`), `train` it, `load_adapter_model` and `predict`."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Recipe": "schema",
    "load_recipe": "recipe",
    "make_recipe": "recipe",
    "train": "run",
    "Result": "run",
    "Interrupted": "interrupt",
    "load_adapter_model": "load",
    "Loaded": "load",
    "predict": "answer",
    "Prediction": "answer",
    "callbacks_for": "callbacks",
    "METHODS": "methods",
}
__all__ = list(_HOMES)  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Reading a recipe must not load Trainer, nor listing recipes torch: each name is imported when first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
