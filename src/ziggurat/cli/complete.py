"""Completion of a command's words in a shell. It imports no module that loads torch, which takes seconds."""

from __future__ import annotations

import json
from glob import escape, glob
from importlib.resources import files
from os.path import isdir

import typer


def recipe_words(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The words `RECIPE KEY=VALUE` that begin with `incomplete`, each with a description.

    They are the recipes that ship, recipe files in this folder, and keys; after `KEY=` files. Bash passes a value as a
    separate word: for it the list is empty, and bash completes file names itself.
    """
    key, equals, value = incomplete.partition("=")
    if equals:
        return [(f"{key}={path}", "file") for path in _paths(value)]
    if [*(ctx.params.get("words") or ())][-1:] == ["="]:
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


def _paths(beginning: str) -> list[str]:
    """The paths that begin so; with a single folder its files, since a shell appends a space to a single candidate."""
    paths = sorted(f"{path}/" if isdir(path) else path for path in glob(f"{escape(beginning)}*"))
    alone = len(paths) == 1 and paths[0].endswith("/")
    return [*paths, *_paths(paths[0])] if alone else paths
