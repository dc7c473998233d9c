"""What a shell is offered for the words of a command. No module with torch is imported: it would take seconds."""

from __future__ import annotations

import json
from glob import escape, glob
from importlib.resources import files

import typer


def recipe_words(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The next of the words `RECIPE KEY=VALUE`, with what it is: a recipe that ships or lies here, or a key.

    Where this offers nothing the shell offers files, as it shall behind `key=`, which bash takes for two words.
    """
    if "=" in incomplete or (ctx.params.get("words") or ())[-1:] == ["="]:
        return []
    shipped = (entry.name.removesuffix(".yaml") for entry in (files("ziggurat") / "recipes").iterdir())
    offered = [(name, "recipe") for name in sorted(shipped) if name.startswith(incomplete)]
    offered += [(name, "file") for name in sorted(glob(f"{escape(incomplete)}*.yaml"))]
    if not incomplete:
        return offered
    from ziggurat.recipe.schema import keys

    for key, info in keys().items():
        if key.startswith(incomplete):
            default = "" if info.is_required() else info.default
            value = default if isinstance(default, str) else json.dumps(default, default=str)
            # `key=` comes along, so that no shell ends the word by a space where one key alone fits.
            offered += [(f"{key}=", info.description or ""), (f"{key}={value}", "as without it")]
    return offered
