"""The commands `ziggurat plan` and `ziggurat suggest`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ziggurat.files.staging import write_whole
from ziggurat.terminal import Console, say

from .complete import recipe_words
from .options import Json, Words, recipe_among


def plan(
    model: Annotated[str, typer.Argument(help="Model folder, config.json, hub name in the cache, or embedded.")],
    words: Words = None,
    budget: Annotated[
        str | None, typer.Option(help="Find the largest rank for a share of the model (0.1%) or a number (300k).")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples a step, for the memory.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens a sample, for the memory.")] = None,
    memory: Annotated[bool, typer.Option(help="Estimate the training memory; traces the model once.")] = True,
    tenants: Annotated[
        int | None, typer.Option(min=1, help="Also count a set of so many adapters that share tensors.")
    ] = None,
    json: Json = False,
) -> None:
    """Count before training what a method adapts, shares, trains, stores and needs, from the model's config alone."""
    from ziggurat.plan.of_recipe import plan_recipe
    from ziggurat.plan.show import show, to_json
    from ziggurat.plan.words import check_model_word
    from ziggurat.recipe.recipe import load_recipe
    from ziggurat.recipe.text import read_overrides

    check_model_word(model)
    name, values = recipe_among(list(words or []))
    given = [word for word in values if word.startswith("method.r=") and word != "method.r="]
    if budget is not None and given:
        raise typer.BadParameter(f"--budget finds the rank, and {given[0]} names it; leave one of them out")
    recipe = load_recipe(name, values) if name is not None else None
    planned = plan_recipe(
        model,
        recipe,
        None if recipe is not None else _choice(*read_overrides(values)),
        budget=budget,
        batch=batch,
        length=length,
        measure_memory=memory,
        tenants=tenants,
    )
    if json:
        say(to_json(planned))
        return

    Console().print(show(planned), highlight=False)


def _choice(values: dict[str, object], problems: list[str]) -> dict[str, object]:
    """`method.*` words without a recipe, checked like those of a recipe."""
    from ziggurat.errors import RecipeError
    from ziggurat.recipe.methods import BUDGET, METHODS, method_problems

    problems = problems + [
        f"{key}: without a recipe only method.* can be given" for key in values if not key.startswith("method.")
    ]
    choice = {"name": "msplora"} | {k.removeprefix("method."): v for k, v in values.items() if v is not None}
    row = METHODS.get(str(choice["name"]))
    if row is not None and row.ranks is not None and "r" in row.ranks(8) and BUDGET not in choice:
        choice = {"r": 8, **choice}
    problems += [] if problems else method_problems(choice)
    if problems:
        raise RecipeError("\n".join(problems))
    return choice


def suggest(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE KEY=VALUE", help="A recipe with method msplora.", autocompletion=recipe_words),
    ],
    budget: Annotated[
        str | None, typer.Option(help="A share of the model (0.1%) or a number (300k); without it the recipe's own.")
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="energy, sensitivity, effective_rank, stable_rank; gradients needs no probe run.")
    ] = "energy",
    probe_rank: Annotated[int | None, typer.Option(min=2, help="Rank of every tier in the probe (16).")] = None,
    probe_steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of the probe (200).")] = None,
    by_role: Annotated[bool, typer.Option("--by-role", help="Ranks of their own for queries, values, ...")] = False,
    out: Annotated[Path, typer.Option(help="Recipe file to write.")] = Path("suggested.yaml"),
) -> None:
    """Find a pyramid's ranks and groups for a budget by a short probe run, and write them as a recipe."""

    from ziggurat.plan.suggest import suggest as run
    from ziggurat.training.callbacks.interrupt import Interrupted

    if out.exists():
        raise typer.BadParameter(f"{out} exists already; name another file by --out")
    probe = {"--probe-rank": probe_rank, "--probe-steps": probe_steps}
    if criterion == "gradients" and (named := [option for option, value in probe.items() if value is not None]):
        raise typer.BadParameter(f"{' and '.join(named)}: --criterion gradients runs no probe to take it")
    try:
        suggested, text = run(
            words[0],
            words[1:],
            budget=budget,
            criterion=criterion,
            probe_rank=probe_rank or 16,
            probe_steps=probe_steps or 200,
            by_role=by_role,
            console=Console(),
        )
    except Interrupted as stopped:
        say(f"The probe was {stopped}; no recipe is written.")
        raise typer.Exit(128 + stopped.signal) from None
    write_whole(out, text)
    ranks = ", ".join(f"{tier} {rank}" for tier, rank in suggested.ranks.items())
    say(f"ranks by {suggested.criterion}: {ranks}; {suggested.spent:,} of {suggested.budget:,} parameters")
    if suggested.group_starts is not None:
        say(f"mid groups begin at layers {', '.join(map(str, suggested.group_starts))}")
    for note in suggested.notes:
        say(f"note: {note}")
    say(f"train it with: ziggurat train {shlex.quote(str(out))}")
