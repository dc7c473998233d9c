"""Counts before training: adapted modules, shared and trained parameters, bytes and memory; ranks for a budget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ziggurat.training.model.meta import bare_model

    from .of_recipe import plan_recipe as plan_recipe
    from .planner import Plan as Plan
    from .planner import plan as plan

__all__ = ["Plan", "bare_model", "plan", "plan_recipe"]


def __getattr__(name: str) -> Any:
    """Import each name at its first use, so that light parts of the package don't load torch."""
    from importlib import import_module

    if name in __all__:
        elsewhere = {"bare_model": "ziggurat.training.model.meta", "plan_recipe": f"{__name__}.of_recipe"}
        return getattr(import_module(elsewhere.get(name, f"{__name__}.planner")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
