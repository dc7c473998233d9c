"""`ziggurat train`, `predict` and `recipes`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ziggurat.errors import StorageError
from ziggurat.files.staging import check_writable
from ziggurat.terminal import Console, say

from . import options
from .folder import check_hub, push

if TYPE_CHECKING:
    from ziggurat.training.callbacks.interrupt import Interrupted


def train(
    words: options.Words = None,
    push_to_hub: options.Push = None,
    private: options.Private = False,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE:NAME", help="A reward function of your own, for grpo and rloo. Runs its code."),
    ] = None,
) -> None:
    """Fine-tune a model. Without an argument: the embedded model on the embedded data, in a few minutes, offline."""
    from ziggurat.recipe.needs import check as check_needs
    from ziggurat.recipe.recipe import load_recipe

    arguments = list(words or [])
    name, values = options.recipe_among(arguments)
    recipe = load_recipe("default" if name is None else name, values)
    check_needs(recipe, "ziggurat train")
    check_hub(push_to_hub)

    from ziggurat.host.plugins import loaded
    from ziggurat.training.callbacks.interrupt import Interrupted
    from ziggurat.training.devices.processes import is_first_to_report, is_main
    from ziggurat.training.loop.report import show
    from ziggurat.training.loop.run import resume_command
    from ziggurat.training.loop.run import train as run

    flags = [word for plugin in loaded() for word in ("--plugin", plugin)]
    flags += [word for function in reward or () for word in ("--reward", function)]
    rewards = []
    if reward:
        from ziggurat.training.loop.rewards import from_words

        rewards = from_words(reward)
    console = Console(quiet=not is_main())
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {recipe.task} with {recipe.method['name']} on {escape(recipe.model)}",
        highlight=False,
    )
    try:
        result = run(recipe, console=console, rewards=rewards)
    except Interrupted as stopped:
        if is_first_to_report():
            _tell(stopped, resume_command([*arguments, *flags]))
        raise typer.Exit(128 + stopped.signal) from None
    show(console, recipe, result)
    if is_main():
        push(result.folder, push_to_hub, private)


def predict(
    adapter: options.Adapter,
    text: Annotated[str | None, typer.Argument(help="The text (or instruction); -: a text a line from stdin.")] = None,
    second: Annotated[str | None, typer.Argument(help="The second text, for adapters that compare two.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A .txt file with a text a line, or a table with the columns the adapter was trained on: "
            "texts, prompts, or conversations with their system prompt and earlier turns."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="csv, json, jsonl or parquet file to write, a row each.")] = None,
    json: options.Json = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Texts at a time (32 to score, 8 to write).")] = None,
    tokens: options.Tokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    system: options.System = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image that the text asks about; several in their order.")
    ] = None,
) -> None:
    """Ask a trained adapter."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give either a text or --file")
    if image and (text is None or text == "-"):
        raise typer.BadParameter("--image goes with one text; --file reads the images that its rows name")

    from ziggurat.training.answers.load import load_adapter_model
    from ziggurat.training.answers.predict import predict_each, read_texts, seen_with
    from ziggurat.training.answers.write import check_place, write_answers
    from ziggurat.training.model.generate import Sampling

    out = out and out.expanduser()
    if out is not None:
        check_writable(out)
        read = [place.expanduser().resolve() for place in (file, adapter) if place is not None]
        if out.exists() and any(out.resolve().is_relative_to(place) for place in read):
            raise StorageError(
                f"'{out}' is the file that is read, or lies in the adapter's folder; name another by --out"
            )
        check_place(out)
    loaded = load_adapter_model(adapter)
    seconds = [second] if second is not None else None
    firsts: Any = [text] if not image else [seen_with(str(text), image)]
    if file is not None:
        firsts, seconds = read_texts(file, loaded)
    elif text == "-":
        firsts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    sampling = Sampling(tokens, temperature, top_p, top_k, seed)
    predictions = []
    for prediction in predict_each(loaded, firsts, seconds, batch=batch, sampling=sampling, system=system):
        predictions.append(prediction)
        if out is None:
            say(prediction.to_json() if json else prediction.to_line(alone=file is None and text != "-"))
    if out is not None:
        write_answers(out, predictions, seconds)
        say(f"{len(predictions):,} answers written to {out}")


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, to save and change it.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Print every key of a recipe with its meaning.")] = False,
) -> None:
    """List the recipes that ship, or print one; or print every key that a recipe may have."""
    if keys:
        from ziggurat.recipe.schema import keys as all_keys

        for key, info in all_keys().items():
            default = info.get_default(call_default_factory=True)
            value = "needed" if info.is_required() else "-" if default is None or default == "" else default
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            say(f"{key:<26} {shown:<15} {info.description or ''}")
        say(f"{'method.name':<26} {'needed':<15} its own fields are method.*")
        return
    from ziggurat.recipe.recipe import find_recipe, shipped
    from ziggurat.recipe.text import read_yaml

    if name is not None:
        say(find_recipe(name)[1].rstrip("\n"))
        return
    texts = shipped()
    width = max(map(len, texts))
    for shipped_name, content in texts.items():
        say(f"{shipped_name:<{width}}  {read_yaml(content)[0].get('about', '')}")


def _tell(stopped: Interrupted, again: str) -> None:
    say(f"{stopped}.")
    if stopped.checkpoint is None:
        say("There is no checkpoint to go on from; the same command starts afresh.")
    else:
        say(f"The checkpoint is in {stopped.checkpoint}")
        say(f"Go on with: {again}")
