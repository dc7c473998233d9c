"""Charts as SVG text with the colours of the surrounding page, light or dark."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from . import measures
from .components import Collected

#: All charts are as wide as a phone; a page with more room puts several in a row.
WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 30, 34


def line_chart(title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_name: str) -> str:
    """Lines over a common axis, at most eight colours; points that aren't finite are left out."""
    height = 220
    curves = {name: _finite(x, y) for name, (x, y) in series.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    across_at, up_at = ticks(min(xs), max(xs), 4), ticks(min(ys), max(ys), 4)
    x0, x1 = min(min(xs), across_at[0]), max(max(xs), across_at[-1])
    y0, y1 = min(min(ys), up_at[0]), max(max(ys), up_at[-1])
    x0, x1 = (x0, x1) if x1 > x0 else (x0 - 0.5, x1 + 0.5)
    y0, y1 = (y0, y1) if y1 > y0 else (y0 - 0.5, y1 + 0.5)
    legend = 16 * len(curves) if len(curves) > 1 else 0
    total = height + legend

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)
        return across, height - _BOTTOM - (y - y0) / (y1 - y0) * (height - _TOP - _BOTTOM)

    parts: list[str] = []
    for value in up_at:
        _, y = at(x0, value)
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, _short(value), "n e"))
    for value in across_at:
        place = at(value, y0)[0]
        parts.append(_text(place, height - _BOTTOM + 14, _short(value), "n e" if place > WIDTH - 30 else "n m"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, height - 4, x_name, "n m"))
    for number, (name, points) in enumerate(curves.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        parts.append(f'<polyline class="l c{number % 8}" points="{path}"/>')
        if len(points) < 30:
            parts += [
                f'<circle class="p c{number % 8}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
                for x, y in (at(*p) for p in points)
            ]
        if legend:
            y = height + 12 + 16 * number
            parts.append(_rect(f"b c{number % 8}", _LEFT, y - 9, 12, 9))
            parts.append(_text(_LEFT + 18, y, _cut(name, 44), "n"))
    return _svg(total, title, parts)


def bars(title: str, lengths: Mapping[str, Mapping[str, float]], x_name: str) -> str:
    """Stacked horizontal bars: part -> row -> length. The share of its row stands in each piece that has room."""
    rows = list(dict.fromkeys(row for by_row in lengths.values() for row in by_row))
    totals = {row: sum(by_row.get(row, 0.0) for by_row in lengths.values()) for row in rows}
    longest = max(totals.values(), default=0.0)
    if not rows or not np.isfinite(longest) or longest <= 0:
        return ""
    left = min(120, 18 + int(6.2 * max(len(_cut(row, 17)) for row in rows)))
    room = WIDTH - left - _RIGHT
    parts: list[str] = []
    x, y = left, 26
    for number, part in enumerate(lengths):
        wide = 20 + 6.4 * len(_cut(part, 16))
        if x + wide > WIDTH - _RIGHT:
            x, y = left, y + 16
        parts.append(_rect(f"b c{number % 8}", x, y, 10, 9))
        parts.append(_text(x + 14, y + 9, _cut(part, 16), "n"))
        x += wide
    top = y + 18
    for line, row in enumerate(rows):
        start, y = float(left), top + 30 * line
        parts.append(_text(left - 6, y + 15, _cut(row, 17), "n e"))
        for number, by_row in enumerate(lengths.values()):
            wide = by_row.get(row, 0.0) / longest * room
            parts.append(_rect(f"b c{number % 8}", start, y, max(wide - 1, 0), 22, ' rx="2"'))
            if wide > 34:
                parts.append(_text(start + wide / 2, y + 15, f"{by_row.get(row, 0.0) / totals[row]:.0%}", "n m w"))
            start += wide
    bottom = top + 30 * len(rows)
    parts.append(_text(left + room, bottom + 10, f"{x_name}; longest {_short(longest)}", "n e"))
    return _svg(bottom + 20, title, parts)


def heat_map(
    title: str,
    grid: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    x_name: str = "",
    digits: int = 2,
    limits: tuple[float, float] | None = None,
    centred: bool = False,
) -> str:
    """A matrix as cells, with its numbers if they fit; NaN has its own colour.

    `limits`: the ends of the colours, where several maps share them. `centred`: two hues that meet at 0.
    """
    count = max(1, len(columns))
    left = min(120, 14 + int(6.2 * max(len(_cut(name, 17)) for name in rows)))
    side = (WIDTH - left - _RIGHT) / count
    tall = min(max(side, 15.0), 26.0)
    slanted = max(len(name) for name in columns) * 6.2 > side
    foot = (10 + 4.6 * max(len(_cut(name, 14)) for name in columns) if slanted else 18) + (16 if x_name else 0)
    finite = grid[np.isfinite(grid)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centred:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    top = 44
    parts = _legend(low, high, centred)
    for (i, j), value in np.ndenumerate(grid):
        x, y = left + j * side, top + i * tall
        kind, share = _shade(value, low, high, centred)
        parts.append(_rect(kind, x, y, side, tall, f' style="--v:{100 * share:.0f}%"' if kind != "x" else ""))
        words = f"{value:.{digits}f}"
        words = words if float(words) else words.lstrip("-")
        if np.isfinite(value) and 5.6 * len(words) < side - 2:
            shade = "n m w" if kind == "i" or share > 0.85 else "n m k"
            parts.append(_text(x + side / 2, y + tall / 2 + 3.5, words, shade))
    every = max(1, -(-len(rows) * 12 // max(1, int(tall * len(rows)))))
    for i in range(0, len(rows), every):
        parts.append(_text(left - 5, top + (i + 0.5) * tall + 4, _cut(rows[i], 17), "n e"))
    bottom = top + tall * len(rows)
    step = 1 if slanted and side > 12 else max(1, -(-22 // max(1, int(side))))
    for j in range(0, count, step):
        x = left + (j + 0.5) * side
        name = _cut(columns[j], 14)
        turn = f' transform="rotate(-40 {x:.1f} {bottom + 12:.1f})"' if slanted and len(name) > 3 else ""
        parts.append(_text(x + (4 if turn else 0), bottom + 12, name, "n e" if turn else "n m", turn))
    if x_name:
        parts.append(_text(left + (WIDTH - left - _RIGHT) / 2, bottom + foot - 4, x_name, "n m"))
    return _svg(bottom + foot + 4, title, parts)


def pyramid(collected: Collected, stack: str | None = None) -> str:
    """The parts as rows of boxes over their layers; number and shade: effective rank of the allocated rank."""
    stack = measures.stack_of(collected, stack)
    depth, left, tall = collected.layers[stack], 66, 34
    side = (WIDTH - left - _RIGHT) / depth
    parts: list[str] = []
    for level, part in enumerate(collected.stored_parts):
        y = 30 + level * (tall + 6)
        ranks = sorted({c.rank for c in collected.of(part)})
        parts.append(_text(left - 8, y + 15, _cut(part, 9), "n e"))
        parts.append(_text(left - 8, y + 28, f"rank {ranks[-1]}", "n e"))
        for layers, (erank, rank) in measures.rank_use(collected, part, stack).items():
            share = erank / rank if np.isfinite(erank) and rank else 0.0
            x, wide = left + layers[0] * side, (layers[-1] - layers[0] + 1) * side - 1.5
            kind, depth_of = _shade(share, 0.0, 1.0)
            parts.append(_rect(kind, x, y, wide, tall, f' style="--v:{100 * depth_of:.0f}%" rx="3"'))
            if wide > 17.4:
                shade = "n m w" if kind == "i" else "n m k"
                parts.append(_text(x + wide / 2, y + tall / 2 + 4, f"{erank:.1f}", shade))
    bottom = 30 + len(collected.stored_parts) * (tall + 6)
    step = max(1, -(-22 // max(1, int(side))))
    parts += [_text(left + (n + 0.5) * side, bottom + 8, str(n), "n m") for n in range(0, depth, step)]
    parts.append(_text((left + WIDTH) / 2, bottom + 24, "layer", "n m"))
    return _svg(bottom + 30, "Effective rank by part, mean over roles", parts)


def ticks(low: float, high: float, most: int) -> list[float]:
    """About `most` round numbers from low to high, with a step of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(float(power * n) for n in (1, 2, 5, 10) if power * n >= rough * 0.999)
    first, last = int(np.floor(low / step + 1e-6)), int(np.ceil(high / step - 1e-6))
    return [round(n * step, 12) for n in range(first, last + 1)]


def _shade(value: float, low: float, high: float, centred: bool = False) -> tuple[str, float]:
    """The class of a cell and the strength of its colour, 0 to 1: h up to the middle, i beyond, y below 0, x for
    NaN."""
    if not np.isfinite(value):
        return "x", 0.0
    if centred and value < 0:
        return "y", min(value / low, 1.0)
    low = 0.0 if centred else low
    share = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5
    return ("h", 2 * share) if share <= 0.5 else ("i", 2 * share - 1)


def _legend(low: float, high: float, centred: bool) -> list[str]:
    """The scale of a heat map: its ends, and the colours between them."""
    cells = 16
    wide = 7.0
    start = WIDTH - _RIGHT - 40 - cells * wide
    parts = [_text(start - 4, 33, _short(low), "n e"), _text(start + cells * wide + 4, 33, _short(high), "n")]
    for n in range(cells):
        kind, share = _shade(low + (high - low) * n / (cells - 1), low, high, centred)
        parts.append(_rect(f"{kind} q", start + n * wide, 25, wide + 0.5, 8, f' style="--v:{100 * share:.0f}%"'))
    return parts


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
    return "".join([head, _text(12, 16, _cut(title, 44), "t"), *parts, "</svg>"])


def _rect(kind: str, x: float, y: float, width: float, height: float, attributes: str = "") -> str:
    return (
        f'<rect class="{kind}"{attributes} x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{round(height, 1):g}"/>'
    )


def _text(x: float, y: float, words: str, kind: str, attributes: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(words)}</text>'


def _finite(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True) if np.isfinite(a) and np.isfinite(b)]


def _short(value: float) -> str:
    size = abs(value)
    if size and not 1e-2 <= size < 1e5:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-(most - 1) :]
