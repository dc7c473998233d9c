"""`ziggurat with`: what the command takes."""

from __future__ import annotations

from typing import Annotated

import typer


def with_method(
    method: Annotated[str, typer.Argument(help="A method's name, as in `ziggurat plan MODEL method.name=msplora`.")],
    words: Annotated[
        list[str],
        typer.Argument(metavar="[FIELD=VALUE]... -- PROGRAM [WORD]...", help="Fields of its config; what to run."),
    ],
) -> None:
    """Run a program that trains LoRA by PEFT, with another method in LoRA's place.

    ziggurat with msplora even_scales=true -- trl sft --use_peft --lora_r 8 ...
    """
    from ziggurat.errors import ConfigError
    from ziggurat.integrations.with_method import run_with
    from ziggurat.recipe.text import read_overrides

    begin = words.index("--") if "--" in words else len(words)
    program = words[begin + 1 :]
    if not program:
        raise ConfigError("no program to run: ziggurat with METHOD [FIELD=VALUE]... -- PROGRAM [WORD]...")
    fields, problems = read_overrides(words[:begin])
    if problems:
        raise ConfigError("; ".join(problems))
    raise typer.Exit(run_with(method, fields, program))
