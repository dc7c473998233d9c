"""Counts before training: adapted modules, shared and trained parameters, bytes and memory; ranks for a budget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ziggurat.training.model.meta import bare_model

    from .planner import Plan as Plan
    from .planner import plan as plan
    from .planner import plan_recipe as plan_recipe

__all__ = ["Plan", "bare_model", "plan", "plan_recipe"]


def __getattr__(name: str) -> Any:
    """Import each name at its first use, so that light parts of the package don't load torch."""
    from importlib import import_module

    if name in __all__:
        where = "ziggurat.training.model.meta" if name == "bare_model" else f"{__name__}.planner"
        return getattr(import_module(where), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
