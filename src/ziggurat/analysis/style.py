"""How every figure looks: one palette, named layers and roles, numbers in cells where they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Coarse to fine; also the order in which further parts take their colour.
COLOURS = ("#1b4965", "#2a9d8f", "#e9a23b", "#c8553d", "#6d597a", "#5c6b73")
MISSING = "#d9d9d9"


_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
}


@contextmanager
def styled() -> Iterator[None]:
    """This package's style, for the length of the block.

    Raises:
        ConfigError: matplotlib isn't installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("figures need matplotlib: pip install 'ziggurat[plots]'") from error
    with matplotlib.rc_context(_STYLE):
        yield


def new_axes(width: float, height: float) -> Axes:
    """Axes on a figure of their own, in inches; no window, no global state. Show or save `ax.figure`."""
    with styled():
        from matplotlib.figure import Figure

        return Figure(figsize=(width, height)).subplots()


def part_colour(part: str, parts: Sequence[str]) -> str:
    """The colour of one of `parts`."""
    return COLOURS[list(parts).index(part) % len(COLOURS)]


def heat_map(
    ax: Axes,
    grid: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    colours: str = "viridis",
    centred: bool = False,
    limits: tuple[float, float] | None = None,
    label: str = "",
    digits: int = 1,
) -> Axes:
    """A matrix as coloured cells with named rows and columns; numbers in the cells where there are few.

    `centred`: the scale is symmetric around 0. Cells that are NaN are grey.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    shown = np.ma.masked_invalid(np.asarray(grid, dtype=float))
    known = shown.compressed()
    if limits is None:
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        if centred:
            high = max(abs(low), abs(high))
            low = -high
        limits = (low, high if high > low else low + 1)
    map_ = matplotlib.colormaps[colours].with_extremes(bad=MISSING)
    image = ax.imshow(shown, cmap=map_, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    _ticks(ax.set_yticks, rows, most=32)
    _ticks(ax.set_xticks, columns, most=32)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if max(len(name) for name in columns) > 3 and sum(map(len, columns)) > 40:
        ax.tick_params(axis="x", labelrotation=40)
        for tick in ax.get_xticklabels():
            tick.set_horizontalalignment("right")
            tick.set_rotation_mode("anchor")
    if shown.shape[1] <= 14 and shown.shape[0] <= 26:
        _numbers(ax, shown, image, digits)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.set_label(label)
    return ax


def _ticks(place: Any, names: Sequence[str], most: int) -> None:
    step = -(-len(names) // most)
    place(range(0, len(names), step), [names[n] for n in range(0, len(names), step)])


def _numbers(ax: Axes, shown: Any, image: Any, digits: int) -> None:
    for (i, j), value in np.ndenumerate(shown.filled(np.nan)):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            text = f"{value:.{digits}f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "#222222")
