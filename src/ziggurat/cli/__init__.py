"""The `ziggurat` command; its subcommands are in the modules of this package."""

import contextlib
import io
import itertools
import os
import signal
import sys
from collections.abc import Iterable
from typing import Annotated, NoReturn

import typer

from ziggurat._distribution import VERSION
from ziggurat.errors import ConfigError, ZigguratError, first_line
from ziggurat.terminal import say

from .analyze import analyze, report
from .chat import chat
from .compare import compare
from .doctor import doctor
from .evaluate import evaluate
from .init import init
from .launch import launch_config
from .plan import plan, suggest
from .tenants import tenants
from .train import predict, recipes, train
from .with_method import plugin_path, with_method
from .write import export, merge

app = typer.Typer(
    name="ziggurat",
    help="Multi-scale low-rank fine-tuning: train by a recipe, predict, export, merge.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_DEBUG, _PLUGIN = "--debug", "--plugin"


def _version(show: bool) -> None:
    if show:
        say(f"ziggurat {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the whole traceback of an error.")] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option(_PLUGIN, help="A Python file, or a module, that registers methods of your own. Runs its code."),
    ] = None,
) -> None:
    if plugin:
        from ziggurat.host.plugins import load

        load(plugin)


for command in (train, predict, recipes, export, merge, analyze, report, doctor, plan, suggest):
    app.command()(command)
app.command()(tenants)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(init)
app.command()(chat)
app.command(name="launch-config")(launch_config)
app.command(name="plugin-path")(plugin_path)
# Words after the program's name belong to the program.
app.command(name="with", context_settings={"allow_interspersed_args": False})(with_method)


def main() -> NoReturn:
    """Entry point: the user's mistakes end in one clean line and exit code 2, other errors in exit code 1."""
    words = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        # A label, or a file's name, can hold signs that the terminal's encoding lacks: they are spelt out.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    debug = _DEBUG in itertools.takewhile(lambda word: word != "--", words)
    if not debug:
        import warnings

        # The libraries' deprecations don't concern somebody who trains a model.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        app(args=_options_first(words), prog_name="ziggurat")
    except ZigguratError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {first_line(error)} (--debug shows where)", 1)
    raise SystemExit(0)


def _options_first(words: Iterable[str]) -> list[str]:
    """`words` with each `--plugin FILE` before the command, wherever it stood, and without --debug.

    Words after `--` aren't touched: they belong to another program, or are a text.

    Raises:
        ConfigError: a `--plugin` has no value.
    """
    plugins, others, remaining = [], [], iter(words)
    for word in remaining:
        if word == "--":
            others += [word, *remaining]
        elif word == _DEBUG:
            continue
        elif word == _PLUGIN:
            value = next(remaining, "")
            if not value or value.startswith("-"):
                raise ConfigError(f"{_PLUGIN} needs a value: a Python file, or a module, as in {_PLUGIN} mine.py")
            plugins += [word, value]
        elif word.startswith(f"{_PLUGIN}="):
            plugins.append(word)
        else:
            others.append(word)
    return [*plugins, *others]


def _fail(message: str, code: int) -> NoReturn:
    where, size = "", os.environ.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        # Where one process has ended, the launcher ends the others by SIGTERM: one of them gives the reason first.
        with contextlib.suppress(ValueError):  # in another thread than the main one
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        from ziggurat.training.devices.processes import is_first_to_report

        if not is_first_to_report():
            raise SystemExit(code)
        where = f" in process {os.environ.get('RANK', '?')} of {size}"
    say(f"error{where}: {message}", err=True)
    raise SystemExit(code)
