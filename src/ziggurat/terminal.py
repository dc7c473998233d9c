"""Output may contain text of untrusted files: none of it reaches a terminal or a spreadsheet as a command."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.segment import Segment

#: Control characters, line breaks and tabs apart, as JSON writes them.
_CONTROL = {code: f"\\u{code:04x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def clean(text: str) -> str:
    """`text` with every control character spelt out, among them the escape that terminals obey."""
    return text.translate(_CONTROL)


def no_formula(value: Any) -> Any:
    """`value`; a text that a spreadsheet would take for a formula gets a quote in front, which keeps it a text."""
    computed = isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@"))
    return f"'{value}" if computed else value


class Console(RichConsole):
    """A rich console that prints texts cleaned; its own colours and cursor movements stay."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **kwargs):
            yield segment if segment.control else segment._replace(text=clean(segment.text))


def is_screen(console: RichConsole) -> bool:
    """Whether `console` writes to a terminal, where lines can be drawn anew.

    FORCE_COLOR, which Jupyter sets for its commands, asks for colours: rich takes a pipe for a terminal then, and would
    fill it with every state of a progress bar.
    """
    return console.is_terminal and console.file.isatty()


def say(text: str, err: bool = False) -> None:
    """Print a line, cleaned."""
    import typer

    typer.echo(clean(text), err=err)
