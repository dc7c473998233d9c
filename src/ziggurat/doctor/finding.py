"""A finding of `ziggurat doctor`, and findings from the table of combinations."""

from collections.abc import Iterator
from dataclasses import dataclass

from .facts import METHODS, fact

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """`level`: "error" (will fail), "warning" (works with a limit, or was never tried) or "note"."""

    level: str
    what: str
    why: str
    do: str = ""


def cell(key: str, method: str, subject: str = "") -> Iterator[Finding]:
    """The finding of the row `key` about a method; none where it works without limits."""
    row = fact(key)
    status = row.cells.get(method)
    if status in (None, "yes"):
        return
    levels = {"no": "error", "limited": "note", "untested": "warning"}
    words = {"no": "doesn't work", "limited": "works with limits", "untested": "untested"}
    why, instead = row.reason(method)
    yield Finding(levels[status], f"{METHODS[method]} with {subject or row.what}: {words[status]}", why, instead)
