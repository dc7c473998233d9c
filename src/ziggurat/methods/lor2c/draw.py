"""A picture of a run's structure over the steps: the layers that each path covers, and the layers with plain LoRA."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

ROW, LEFT, TOP, WIDTH, GAP = 18, 150, 46, 560, 34
PATH_COLOURS = ("#3b6ea5", "#7ba6cf")
INJECTED_COLOUR = "#e08e45"


def draw_events(log: Sequence[dict[str, Any]]) -> str:
    """The events in `log` as SVG: steps to the right, layers upwards, a bar for each path, a line at each event.

    `log` has one event or more. The time of the events is drawn to scale, the time after them as one last column;
    stacks are drawn below each other.
    """
    steps = [0, *(record["step"] for record in log)]
    states = [log[0]["before"], *(record["after"] for record in log)]
    end = max(1, steps[-1]) * 1.15
    edges = [*(LEFT + WIDTH * step / end for step in steps), LEFT + WIDTH]
    parts: list[str] = []
    y = TOP
    for stack in states[0]:
        depth = 1 + max(_layers(state[stack]) for state in states)
        parts.append(_text(8, y - 8, escape(stack), "bold"))
        for layer in range(depth):
            parts.append(_text(LEFT - 10, y + (depth - layer - 0.3) * ROW, f"layer {layer}", anchor="end"))
        for state, (x0, x1) in zip(states, pairwise(edges), strict=True):
            if x1 > x0:
                parts += _column(state[stack], x0, x1, y, depth)
        y += depth * ROW + GAP
    bottom = y - GAP
    for step, kind in {record["step"]: record["kind"] for record in log}.items():
        x = LEFT + WIDTH * step / end
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{bottom}" stroke="#222" stroke-width="0.6"/>')
        parts.append(_text(x, bottom + 12, f"{step}", anchor="middle"))
        parts.append(_text(x, TOP - 20, kind, anchor="middle"))
    parts.append(_text(LEFT + WIDTH, bottom + 12, f"to {log[-1]['of']}", anchor="end"))
    parts.append(_text(LEFT, bottom + 28, "steps; blue: a path over these layers, orange: LoRA on query and value"))
    size = f'width="{LEFT + WIDTH + 20}" height="{bottom + 40}"'
    style = 'font-family="sans-serif" font-size="11"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{ground}{"".join(parts)}</svg>\n'


def _layers(state: dict[str, Any]) -> int:
    return max([last for _, last in state["spans"]] + state["injected"], default=0)


def _column(state: dict[str, Any], x0: float, x1: float, y: float, depth: int) -> list[str]:
    bars = [(first, last, PATH_COLOURS[last > first]) for first, last in state["spans"]]
    bars += [(layer, layer, INJECTED_COLOUR) for layer in state["injected"]]
    return [
        f'<rect x="{x0:.1f}" y="{y + (depth - 1 - last) * ROW + 2}" width="{x1 - x0:.1f}" '
        f'height="{(last - first + 1) * ROW - 4}" fill="{colour}" stroke="white"/>'
        for first, last, colour in bars
    ]


def _text(x: float, y: float, words: str, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}" text-anchor="{anchor}">{words}</text>'
