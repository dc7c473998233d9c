"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .complete import recipe_words

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE KEY=VALUE",
        help="A recipe file or the name of one that ships, and values that replace its own (method.r=16).",
        autocompletion=recipe_words,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON: one object, or one a line, instead of tables and texts.")]
Push = Annotated[str | None, typer.Option(metavar="REPO", help="Upload the result to this repository of the hub.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")]
Adapter = Annotated[Path, typer.Argument(help="Folder that `ziggurat train` wrote.")]
Tokens = Annotated[int, typer.Option(min=1, help="Longest answer of a model that writes.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time; above: drawn.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from so many tokens at most; 0: all.")]
Seed = Annotated[int | None, typer.Option(help="Makes the draw repeatable.")]
System = Annotated[str | None, typer.Option(help="System prompt, for adapters trained on conversations.")]


def recipe_among(words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe among the words of a command, if there is one, and the other words.

    Raises:
        BadParameter: there are several.
    """
    names = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(names) > 1:
        raise typer.BadParameter(f"one recipe at a time, not {' and '.join(names)}; values are written key=value")
    return next(iter(names), None), [word for word in words if word not in names]
