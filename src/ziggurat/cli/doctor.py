"""The command `ziggurat doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from ziggurat.terminal import clean, say

from .complete import recipe_words
from .options import Json


def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE-OR-ADAPTER KEY=VALUE",
            help="Recipe, or adapter folder; nothing: this machine.",
            autocompletion=recipe_words,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List combinations that will not work, and why, before they fail. Exit code 1 if one is sure to fail."""
    import json as text
    from dataclasses import asdict

    from ziggurat.doctor.checks import LEVELS, adapter, environment, machine, recipe

    arguments = list(words or [])
    findings = list(environment() if arguments else machine())
    if arguments and (Path(arguments[0]) / "adapter_config.json").is_file():
        if arguments[1:]:
            raise typer.BadParameter(
                f"an adapter's folder is checked as it is; {' '.join(arguments[1:])} has no meaning there"
            )
        findings += adapter(arguments[0])
    elif arguments and Path(arguments[0]).is_dir() and not (Path(arguments[0]) / "recipe.yaml").is_file():
        from ziggurat.host.saved.folder import adapter_config

        adapter_config(arguments[0])  # raises an error that names the missing file
    elif arguments:
        from ziggurat.recipe.recipe import load_recipe

        findings += recipe(load_recipe(arguments[0], arguments[1:]))
    findings = sorted(dict.fromkeys(findings), key=lambda finding: LEVELS.index(finding.level))
    for finding in findings:
        if json:
            say(text.dumps(asdict(finding)))
            continue
        typer.secho(
            clean(f"{finding.level}: {finding.what}"),
            fg={"error": "red", "warning": "yellow"}.get(finding.level),
            bold=True,
        )
        say(f"  {finding.why}")
        if finding.do:
            say(f"  -> {finding.do}")
    if not json and all(finding.level == "note" for finding in findings):
        say("no problems found")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
