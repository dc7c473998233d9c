"""The style of all figures: one palette, named layers and roles, values in cells if they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ziggurat.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Coarse to fine; also the order in which further parts take their colour.
COLOURS = ("#1b4965", "#2a9d8f", "#e9a23b", "#c8553d", "#6d597a", "#5c6b73")
MISSING = "#e3e3e3"
#: Of heat maps, from nothing to much: one hue that darkens, so that it reads the same in grey and on paper.
SCALE = ("#f3f8f7", "#cbe5df", "#86c7c0", "#3a97a8", "#1f6391", "#14345f")

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#3d4855",
    "xtick.color": "#3d4855",
    "ytick.color": "#3d4855",
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
}


@contextmanager
def styled() -> Iterator[None]:
    """This package's style, for the length of the block.

    Raises:
        MissingExtraError: matplotlib isn't installed.
    """
    require("drawing figures", "matplotlib")
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_axes(width: float, height: float) -> Axes:
    """Axes on a new figure, in inches; no window, no global state. Show or save `ax.figure`."""
    return new_row(width, height, [1.0])[0]


def new_row(width: float, height: float, widths: Sequence[float]) -> list[Axes]:
    """Axes side by side on one figure, their widths in these proportions."""
    with styled():
        from matplotlib.figure import Figure

        grid = {"width_ratios": list(widths)}
        layout = "constrained" if len(widths) > 1 else None  # room for each one's colour bar
        axes = Figure(figsize=(width, height), layout=layout).subplots(1, len(widths), squeeze=False, gridspec_kw=grid)
        return list(axes[0])


def part_colour(part: str, parts: Sequence[str]) -> str:
    """The colour of one of `parts`."""
    return COLOURS[list(parts).index(part) % len(COLOURS)]


def text_colour(background: Sequence[float]) -> str:
    """White or near black, whichever is readable on an RGB(A) colour."""
    red, green, blue = background[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#1d2733"


def scale() -> Any:
    """The colour map of `SCALE`."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ziggurat", SCALE)


def digits_for(values: np.ndarray) -> int:
    """The number of decimals in a small cell: none from 100 on, three below 0.1."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 1.0
    return 0 if largest >= 100 else 1 if largest >= 10 else 2 if largest >= 0.1 else 3


def heat_map(
    ax: Axes,
    grid: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    centred: bool = False,
    limits: tuple[float, float] | None = None,
    label: str = "",
    digits: int | None = None,
    bar: bool = True,
) -> Axes:
    """A matrix as coloured cells with named rows and columns; numbers in the cells where there are few.

    `centred`: two hues that meet at 0, on a symmetric scale. Cells that are NaN are grey. `bar`: with a colour bar.
    """
    import matplotlib

    shown = np.ma.masked_invalid(np.asarray(grid, dtype=float))
    finite = shown.compressed()
    if limits is None:
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if centred:
            high = max(abs(low), abs(high))
            low = -high
        limits = (low, high if high > low else low + 1)
    map_ = (matplotlib.colormaps["RdBu_r"] if centred else scale()).with_extremes(bad=MISSING)
    image = ax.imshow(shown, cmap=map_, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    _ticks(ax.set_yticks, rows, most=32)
    _ticks(ax.set_xticks, columns, most=32)
    ax.set_xticks(np.arange(0.5, shown.shape[1] - 1), minor=True)
    ax.set_yticks(np.arange(0.5, shown.shape[0] - 1), minor=True)
    if max(shown.shape) <= 48:
        ax.grid(which="minor", color="white", linewidth=1.2)
    ax.spines[:].set_visible(False)
    ax.tick_params(which="both", length=0)
    if max(len(name) for name in columns) > 3 and sum(map(len, columns)) > 40:
        ax.tick_params(axis="x", labelrotation=40)
        for tick in ax.get_xticklabels():
            tick.set_horizontalalignment("right")
            tick.set_rotation_mode("anchor")
    if shown.shape[1] <= 14 and shown.shape[0] <= 26:
        _numbers(ax, shown, image, digits if digits is not None else digits_for(finite))
    if bar:
        colour_bar(image, [ax], label)
    return ax


def colour_bar(image: Any, axes: Sequence[Axes], label: str) -> None:
    """One colour bar for axes that share their scale."""
    from matplotlib.ticker import MaxNLocator

    bar = axes[0].figure.colorbar(image, ax=list(axes), fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.set_label(label)


def _ticks(place: Any, names: Sequence[str], most: int) -> None:
    step = -(-len(names) // most)
    place(range(0, len(names), step), [names[n] for n in range(0, len(names), step)])


def _numbers(ax: Axes, shown: Any, image: Any, digits: int) -> None:
    for (i, j), value in np.ndenumerate(shown.filled(np.nan)):
        if np.isfinite(value):
            text = f"{value:.{digits}f}"
            text = text.lstrip("-") if not float(text) else text  # no "-0.00"
            colour = text_colour(image.cmap(image.norm(value)))
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
