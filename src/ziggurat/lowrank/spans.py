"""Spans of layers and groups of the depth. Layers count from 0; both ends of a span are included."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from ziggurat.errors import ConfigError


class Span(NamedTuple):
    """The layers from ``first`` to ``last``, both included."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """How many layers the span covers."""
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


def single_spans(num_layers: int) -> list[Span]:
    """One span per layer: where every path starts."""
    return [Span(n, n) for n in range(num_layers)]


def check_spans(spans: Iterable[Sequence[int]], num_layers: int, *, max_length: int | None = None) -> list[Span]:
    """The spans as `Span` values if they are ordered, disjoint and inside 0..num_layers-1.

    Layers between spans may stay uncovered. Raises ConfigError naming the first span at fault.
    """
    checked: list[Span] = []
    for position, given in enumerate(spans):
        span = _as_span(given, position)
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


def groups_of_depth(num_layers: int, num_groups: int) -> list[int]:
    """The group of every layer: layer n of N is in group ``floor(n * G / N)``.

    12 layers in 3 groups: 4 + 4 + 4; 32 layers: 11 + 11 + 10. Raises ConfigError unless 1 <= G <= N.
    """
    if num_groups < 1 or num_groups > num_layers:
        raise ConfigError(
            f"num_groups={num_groups}, but the stack has {num_layers} layers: 1 to {num_layers} groups."
            " Change num_groups or give groups=[...] explicitly."
        )
    return [n * num_groups // num_layers for n in range(num_layers)]


def groups_from_starts(starts: Sequence[int], num_layers: int) -> list[int]:
    """The group of every layer from the first layers of the groups, e.g. ``[0, 4, 8]`` with 12 layers.

    Raises ConfigError unless the starts ascend strictly from 0 and stay below num_layers.
    """
    starts = list(starts)
    ascending = all(a < b for a, b in pairwise(starts))
    if not starts or starts[0] != 0 or not ascending or starts[-1] >= num_layers:
        raise ConfigError(f"groups={starts}: give the groups' first layers, ascending from 0 and below {num_layers}.")
    return [sum(start <= n for start in starts) - 1 for n in range(num_layers)]


def _as_span(given: Sequence[int], position: int) -> Span:
    pair = list(given) if isinstance(given, Iterable) else [given]
    if len(pair) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in pair):
        raise ConfigError(f"spans[{position}]={given!r}: a span is two layer numbers (first, last), counted from 0.")
    return Span(*pair)
