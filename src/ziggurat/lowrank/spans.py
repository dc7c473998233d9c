"""Spans of layers and groups of the depth. Layers count from 0; both ends of a span are included."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ziggurat.errors import ConfigError


class Span(NamedTuple):
    """The layers from ``first`` to ``last``, both included."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """The number of layers of the span."""
        return self.last - self.first + 1

    @property
    def layers(self) -> range:
        """The layers of the span, ascending."""
        return range(self.first, self.last + 1)

    def joined(self, other: "Span") -> "Span":
        """The span over both; ConfigError unless ``other`` starts right after this one ends."""
        if other.first != self.last + 1:
            raise ConfigError(f"join spans {tuple(self)} and {tuple(other)}: the second must start at {self.last + 1}.")
        return Span(self.first, other.last)


def check_spans(spans: Iterable[Sequence[int]], num_layers: int, *, max_length: int | None = None) -> list[Span]:
    """The spans as `Span` values if they are ordered, disjoint and inside 0..num_layers-1.

    Layers between spans may stay uncovered. Raises ConfigError naming the first span at fault.
    """
    checked: list[Span] = []
    for position, value in enumerate(spans):
        span = _as_span(value, position)
        where = f"spans[{position}]={tuple(span)}"
        if not 0 <= span.first <= span.last < num_layers:
            raise ConfigError(
                f"{where}: needs 0 <= first <= last <= {num_layers - 1}, the stack has {num_layers} layers."
            )
        if checked and span.first <= checked[-1].last:
            raise ConfigError(f"{where} comes after {tuple(checked[-1])}: order spans by depth, without overlap.")
        if max_length is not None and span.length > max_length:
            raise ConfigError(f"{where} covers {span.length} layers: at most {max_length}. Split it.")
        checked.append(span)
    return checked


def _as_span(value: Sequence[int], position: int) -> Span:
    pair = list(value) if isinstance(value, Iterable) else [value]
    if len(pair) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in pair):
        raise ConfigError(f"spans[{position}]={value!r}: a span is two layer numbers (first, last), counted from 0.")
    return Span(*pair)
