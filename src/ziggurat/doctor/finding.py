"""One thing that `ziggurat doctor` says, and how it reads off the table of combinations."""

from __future__ import annotations

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


def cell(key: str, method: str, what: str = "") -> Iterator[Finding]:
    """What the row `key` says of a method, unless it simply works."""
    row = fact(key)
    status = row.cells.get(method)
    if status in (None, "yes"):
        return
    levels = {"no": "error", "limited": "note", "untested": "warning"}
    words = {"no": "doesn't work", "limited": "works with limits", "untested": "untested"}
    why, instead = row.reason(method)
    yield Finding(levels[status], f"{METHODS[method]} with {what or row.what}: {words[status]}", why, instead)
