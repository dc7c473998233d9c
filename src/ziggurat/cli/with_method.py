"""The commands `ziggurat with` and `ziggurat plugin-path`."""

from typing import Annotated

import typer


def with_method(
    method: Annotated[str, typer.Argument(help="A method's name, as in `ziggurat plan MODEL method.name=msplora`.")],
    words: Annotated[
        list[str],
        typer.Argument(metavar="[FIELD=VALUE]... -- PROGRAM [WORD]...", help="Fields of its config; the program."),
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


def plugin_path(
    program: Annotated[str, typer.Argument(help="The program that takes plugins by their path: swift (ms-swift).")],
) -> None:
    """Print the path of the plugin for a program that takes plugins as files.

    swift sft --external_plugins $(ziggurat plugin-path swift) --tuner_type msplora ...
    """
    from ziggurat.errors import ConfigError
    from ziggurat.integrations import PLUGIN_FILES
    from ziggurat.terminal import say

    if program not in PLUGIN_FILES:
        raise ConfigError(
            f"no plugin by path for {program!r}: there is one for {', '.join(PLUGIN_FILES)}. Axolotl and vLLM find "
            "theirs by themselves, and Lightning's callback is ziggurat.integrations.lightning.ZigguratCallback."
        )
    say(str(PLUGIN_FILES[program]))
