"""`ziggurat train`, `predict` and `recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ziggurat.terminal import Console, say


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE KEY=VALUE",
            help="A recipe file or the name of one that ships, and values that replace its own.",
        ),
    ] = None,
) -> None:
    """Fine-tune a model. Without an argument: the embedded model on the embedded data, in a few minutes, offline."""
    from ziggurat.recipe.needs import check as check_needs
    from ziggurat.recipe.recipe import load_recipe

    given = list(words or [])
    names = [word for word in given if "=" not in word or Path(word).is_file()]
    if len(names) > 1:
        raise typer.BadParameter(f"one recipe at a time, not {' and '.join(names)}; values are written key=value")
    recipe = load_recipe(names[0] if names else "default", [word for word in given if word not in names])
    check_needs(recipe, "ziggurat train")

    from ziggurat.host.plugins import loaded
    from ziggurat.training.callbacks.interrupt import Interrupted
    from ziggurat.training.devices.processes import is_first_to_report, is_main
    from ziggurat.training.loop.report import show
    from ziggurat.training.loop.run import resume_command
    from ziggurat.training.loop.run import train as run

    plugins = [word for plugin in loaded() for word in ("--plugin", plugin)]
    console = Console(quiet=not is_main())
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {recipe.task} with {recipe.method['name']} on {escape(recipe.model)}",
        highlight=False,
    )
    try:
        result = run(recipe, console=console)
    except Interrupted as stopped:
        if is_first_to_report():
            say(f"{stopped}.")
            if stopped.checkpoint is None:
                say("There is no checkpoint to go on from; the same command starts afresh.")
            else:
                say(f"The checkpoint is in {stopped.checkpoint}")
                say(f"Go on with: {resume_command([*given, *plugins])}")
        raise typer.Exit(128 + stopped.signal) from None
    show(console, recipe, result)


def predict(
    adapter: Annotated[Path, typer.Argument(help="Folder that `ziggurat train` wrote.")],
    text: Annotated[str | None, typer.Argument(help="The text (or instruction).")] = None,
    second: Annotated[str | None, typer.Argument(help="The second text, for adapters that compare two.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A .txt file with a text a line, or a table with the columns the adapter was trained on."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer of an instruction-tuned model.")] = 256,
) -> None:
    """Ask a trained adapter."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give either a text or --file")

    from ziggurat.training.answers.load import load_adapter_model
    from ziggurat.training.answers.predict import predict as answer
    from ziggurat.training.answers.predict import read_texts

    loaded = load_adapter_model(adapter)
    if file is not None:
        firsts, seconds = read_texts(file, loaded)
    else:
        firsts, seconds = [str(text)], [second] if second is not None else None
    for prediction in answer(loaded, firsts, seconds, max_new_tokens=tokens):
        say(prediction.to_json() if json else prediction.to_line(alone=file is None))


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, to save and change it.")] = None,
) -> None:
    """List the recipes that ship, or print one."""
    from ziggurat.recipe.recipe import find_recipe, shipped
    from ziggurat.recipe.text import read_yaml

    if name is not None:
        say(find_recipe(name)[1].rstrip("\n"))
        return
    texts = shipped()
    width = max(map(len, texts))
    for shipped_name, content in texts.items():
        say(f"{shipped_name:<{width}}  {read_yaml(content)[0].get('about', '')}")
