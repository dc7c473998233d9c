"""Completion of a command's words in a shell. It imports no module that loads torch, which takes seconds."""

from __future__ import annotations

import json
from glob import escape, glob
from importlib.resources import files

import typer


def recipe_words(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The words `RECIPE KEY=VALUE` that begin with `incomplete`, each with a description.

    They are the recipes that ship, recipe files in this folder, and keys. For a value, which bash passes as a separate
    word after `=`, the list is empty: the shell then completes file names.
    """
    if "=" in incomplete or [*(ctx.params.get("words") or ())][-1:] == ["="]:
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
            # With two candidates for one key, a shell appends no space after `key=`.
            offered += [(f"{key}=", info.description or ""), (f"{key}={value}", "the default")]
    return offered
