"""`ziggurat tenants`: saving adapters that share tensors as a set."""

from pathlib import Path
from typing import Annotated

import typer

from ziggurat.terminal import say


def tenants(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder of the set; created for the first adapters.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders; NAME=FOLDER gives one another name.")
    ],
    tiers: Annotated[
        list[str] | None,
        typer.Option("--tier", help="A shared tier, or a shared tensor by its key. Default: the frozen tiers."),
    ] = None,
) -> None:
    """Save adapters that build on the same tensors as a set: these once, the others in each adapter's folder."""
    from ziggurat import add_tenants

    parts = [word.partition("=") if "=" in word else (Path(word).resolve().name, "", word) for word in adapters]
    names = [name for name, _, _ in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise typer.BadParameter(f"two adapters are called {twice[0]}: give NAME=FOLDER")
    for name, written in add_tenants(folder, {name: place for name, _, place in parts}, tiers).items():
        say(f"{folder / name}: {written:,} bytes of weights")
