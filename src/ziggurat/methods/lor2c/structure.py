"""The structure of an adapter's paths: their spans stack by stack, and the layers that have plain LoRA instead."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ziggurat.errors import ConfigError
from ziggurat.host.values import is_whole, shown
from ziggurat.lowrank.spans import Span, check_spans


class StackState(NamedTuple):
    """The paths of one stack: the spans they cover, in order of depth, and the layers that have plain LoRA instead."""

    spans: tuple[Span, ...]
    injected: tuple[int, ...] = ()


Structure = Mapping[str, StackState]
"""Stack -> its state."""


class Path(NamedTuple):
    """A path by its place: the stack and the span that it covers."""

    stack: str
    span: Span

    def __str__(self) -> str:
        first, last = self.span
        layers = f"{first}" if first == last else f"{first}-{last}"
        return f"{self.stack}[{layers}]"


def to_json(structure: Structure, done: int) -> dict[str, Any]:
    """A structure and the number of events done as plain lists and dicts."""
    stacks = {
        stack: {"spans": [list(span) for span in state.spans], "injected": list(state.injected)}
        for stack, state in structure.items()
    }
    return {"stacks": stacks, "done": done}


def from_json(plain: Any) -> tuple[dict[str, StackState], int]:
    """The inverse of `to_json`.

    Raises:
        ConfigError: it isn't of that form, or its spans overlap.
    """
    try:
        structure = {
            stack: StackState(
                tuple(check_spans(state["spans"], 1 + max((s[1] for s in state["spans"]), default=0))),
                tuple(_count(layer) for layer in state["injected"]),
            )
            for stack, state in plain["stacks"].items()
        }
        return structure, _count(plain["done"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"structure={shown(plain)} isn't one that LoR2C has written ({error}). Leave "
            "structure out, and say where paths lie by spans and injected_layers."
        ) from error


def _count(value: Any) -> int:
    if not is_whole(value, 0):
        raise ValueError(f"{shown(value)} is no number of layers or events")
    return value


def paths(structure: Structure) -> list[Path]:
    """Every path, stack by stack, in order of depth."""
    return [Path(stack, span) for stack, state in structure.items() for span in state.spans]
