"""The command `ziggurat init`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ziggurat.errors import ExportError
from ziggurat.files.staging import write_whole
from ziggurat.terminal import say


def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Your data: csv, tsv, json, jsonl, txt, parquet, xlsx.")],
    out: Annotated[Path | None, typer.Option(help="Recipe to write (default: FILE's name with .yaml).")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the model to start from.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="The task, instead of the one that FILE suggests: classification, tokens, instruct, ..."),
    ] = None,
) -> None:
    """Look at a file's columns and rows, and write a commented recipe for it."""
    from ziggurat.plan.start import start
    from ziggurat.recipe.defaults import STARTS

    if task is not None and task not in STARTS:
        raise typer.BadParameter(f"--task {task}: one of {', '.join(STARTS)}")
    place = (
        out.expanduser() if out else Path(f"{Path(file).name.removesuffix('.gz').rpartition('.')[0] or 'recipe'}.yaml")
    )
    if place.exists():
        raise ExportError(f"'{place}' exists already; name another file by --out")
    text, inferred = start(file, task=task, model=model)
    write_whole(place, text)
    say(f"{file}: {inferred.why}")
    for key, (value, why) in inferred.keys.items():
        say(f"  {key}: {value}" + (f"  ({why})" if why else ""))
    say(f"written: {place}; read it, then: ziggurat train {shlex.quote(str(place))}")
