"""The figures, each drawn on given or new matplotlib axes, which are returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import experts, measures
from .components import Collected, short_roles
from .style import colour_bar, heat_map, new_axes, new_row, part_colour, scale, text_colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _numbers(count: int) -> list[str]:
    return [str(n) for n in range(count)]


def role_map(
    collected: Collected,
    part: str | None = None,
    value: str = "effective_rank",
    stack: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Heat map, layers down and roles across, of one measure of `measures.row`."""
    part = part or collected.by_layer
    grid, roles = measures.by_layer_and_role(collected, part, value, stack)
    short = short_roles(roles)
    ax = ax or new_axes(2.6 + 0.8 * len(roles), 1.4 + 0.27 * max(4, len(grid)))
    words = value.replace("_", " ")
    title = f"{words[0].upper()}{words[1:]} of {_part_words(part)}"
    limits = None
    if value in ("effective_rank", "stable_rank"):
        # Neither can be below 1 or above the rank, so colours mean the same in every figure of that rank.
        most = max(c.rank for c in collected.of(part))
        limits, title = (1.0, float(max(most, 2))), f"{title}, of {most}"
    heat_map(ax, grid, _numbers(len(grid)), [short[r] for r in roles], label=words, limits=limits)
    ax.set(ylabel="layer", title=title)
    return ax


def layer_map(
    grid: np.ndarray,
    title: str,
    label: str,
    ax: Axes | None = None,
    *,
    centred: bool = False,
    diagonal: bool = True,
    least: float = 0.0,
) -> Axes:
    """Heat map of a (N, N) matrix over pairs of layers: KL divergence, its difference, cosine, overlap.

    `centred`: negative and positive in two hues. `diagonal` False: the diagonal is grey, because its 1 would take up
    the whole scale. `least`: the smallest upper end of the scale, so that noise looks like noise.
    """
    grid = np.where(np.eye(len(grid), dtype=bool) & (not diagonal), np.nan, grid)
    side = 2.2 + 0.34 * max(5, min(len(grid), 24))
    ax = ax or new_axes(side + 0.8, side)
    most = max(least, float(np.nanmax(np.abs(grid), initial=0.0))) or 1.0
    limits = (-most if centred else 0.0, most)
    heat_map(ax, grid, *[_numbers(len(grid))] * 2, centred=centred, limits=limits, label=label)
    ax.set(aspect="equal", xlabel="layer j", ylabel="layer i", title=title)
    return ax


def energy_bars(collected: Collected, stack: str | None = None, ax: Axes | None = None) -> Axes:
    """||B A||_F^2 of each part by role, averaged over layers, as bars stacked by part."""
    from matplotlib.colors import to_rgb

    energies = measures.energy(collected, stack)
    roles = list(dict.fromkeys(role for by_role in energies.values() for role in by_role))
    short = short_roles(roles)
    ax = ax or new_axes(5.2, 1.5 + 0.42 * max(2, len(roles)))
    left = np.zeros(len(roles))
    totals = np.array([sum(by_role.get(role, 0.0) for by_role in energies.values()) for role in roles])
    for part, by_role in energies.items():
        width = np.array([by_role.get(role, 0.0) for role in roles])
        colour = part_colour(part, list(energies))
        ax.barh(range(len(roles)), width, left=left, height=0.62, color=colour, label=part, edgecolor="white")
        for n, (start, length, whole) in enumerate(zip(left, width, totals, strict=True)):
            if whole and length / totals.max() > 0.08:
                ink = text_colour(to_rgb(colour))
                ax.text(start + length / 2, n, f"{length / whole:.0%}", ha="center", va="center", color=ink, fontsize=8)
        left += width
    ax.set_yticks(range(len(roles)), [short[role] for role in roles])
    ax.invert_yaxis()
    ax.set_xlabel("mean squared norm of the update, summed over parts")
    ax.set_title("Energy by part", pad=22)
    ax.legend(frameon=False, ncols=len(energies), loc="lower left", bbox_to_anchor=(-0.02, 0.97), handlelength=1)
    return ax


def pyramid(collected: Collected, stack: str | None = None, role: str | None = None, ax: Axes | None = None) -> Axes:
    """The parts as rows of boxes over their layers; colour and number: effective rank of the allocated rank.

    A box is averaged over the roles, or of `role` alone. Widest on top: for MSPLoRA that is the pyramid itself.
    """
    from matplotlib.patches import FancyBboxPatch

    stack = measures.stack_of(collected, stack)
    parts = collected.stored_parts
    depth = collected.layers[stack]
    ax = ax or new_axes(2.0 + 0.55 * max(8, min(depth, 32)), 1.0 + 0.8 * len(parts))
    colours = scale()
    for level, part in enumerate(parts):
        for layers, (erank, rank) in measures.rank_use(collected, part, stack, role).items():
            share = erank / rank if np.isfinite(erank) and rank else 0.0
            width, fill = layers[-1] - layers[0] + 1, colours(0.08 + 0.8 * share)
            ax.add_patch(
                FancyBboxPatch(
                    (layers[0] - 0.44, level - 0.36),
                    width - 0.12,
                    0.72,
                    boxstyle="round,pad=0,rounding_size=0.08",
                    facecolor=fill,
                    edgecolor="none",
                )
            )
            words = f"{erank:.1f} of {rank:g}" if width > 2 else f"{erank:.1f}"
            if depth <= 40 or width > 1:
                middle = (layers[0] + layers[-1]) / 2
                ink = text_colour(fill)
                ax.text(middle, level, words, ha="center", va="center", fontsize=9 if width > 1 else 8, color=ink)
    ax.set(xlim=(-0.6, depth - 0.4), ylim=(len(parts) - 0.5, -0.5), xlabel="layer")
    step = -(-depth // 32)
    ax.set_xticks(range(0, depth, step))
    ax.set_yticks(range(len(parts)), [_rank_words(collected, part) for part in parts])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title(f"Effective rank, {'mean over roles' if role is None else role}; darker: more of the rank is used")
    return ax


def spectrum_lines(collected: Collected, ax: Axes | None = None) -> Axes:
    """Mean singular values of each part, largest to smallest, in shares of their sum."""
    from matplotlib.ticker import MaxNLocator

    ax = ax or new_axes(4.6, 3.0)
    for part in collected.stored_parts:
        values = measures.spectra(collected, part)
        values = values[np.isfinite(values).all(axis=1) & (values.sum(axis=1) > 0)]
        if len(values):
            shares = (values / values.sum(axis=1, keepdims=True)).mean(axis=0)
            colour = part_colour(part, collected.stored_parts)
            ax.plot(range(1, len(shares) + 1), shares, marker="o", markersize=3.5, color=colour, label=part)
    ax.set_ylim(bottom=0)
    ax.set(xlabel="singular value, from the largest", ylabel="share of the sum", title="Spectra")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.lines:
        ax.legend(frameon=False)
    return ax


def spectra_over_epochs(
    top: np.ndarray,
    epochs: Sequence[float],
    part: str,
    ax: Axes | None = None,
    limit: float | None = None,
    bar: bool = True,
) -> Axes:
    """One tier of the paper's Fig. 3: the largest singular values (rows) of a part over the epochs (columns).

    `top`: (values, epochs), from `trace.top_values`. `limit`: the upper end of the colours, where tiers share it.
    """
    ax = ax or new_axes(2.4 + 0.42 * max(5, min(len(epochs), 24)), 1.3 + 0.3 * len(top))
    names = [f"{epoch:g}" for epoch in epochs]
    high = limit if limit is not None else float(np.nanmax(top, initial=0.0))
    rows = [str(n + 1) for n in range(len(top))]
    heat_map(ax, top, rows, names, limits=(0.0, high or 1.0), label="singular value", bar=bar)
    title = _part_words(part)[0].upper() + _part_words(part)[1:]
    ax.set(xlabel="epoch", ylabel="singular value, from the largest", title=title)
    return ax


def figure_3(
    spectra: Mapping[str, tuple[np.ndarray, np.ndarray]], axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """The paper's Fig. 3 whole: `spectra_over_epochs` of every part side by side, on one scale with one colour bar.

    `spectra`: part -> (epochs, values), from `trace.top_values`.
    """
    limit = max((float(np.nanmax(values, initial=0.0)) for _, values in spectra.values()), default=0.0)
    tall = max(len(values) for _, values in spectra.values())
    if axes is None:
        wide = [max(3, min(len(epochs), 24)) for epochs, _ in spectra.values()]
        axes = new_row(1.6 + 0.42 * sum(wide) + 0.5 * len(wide), 1.4 + 0.3 * tall, [float(w) for w in wide])
    for ax, (part, (epochs, values)) in zip(axes, spectra.items(), strict=True):
        spectra_over_epochs(values, [round(float(e), 2) for e in epochs], part, ax, limit, bar=False)
        ax.set_ylim(tall - 0.5, -0.5)  # cells of one height, where a tier has fewer values
        if ax is not axes[0]:
            ax.set_ylabel("")
    colour_bar(axes[0].images[0], axes, "singular value, mean over the tier's pairs")
    return axes


def tier_map(collected: Collected, stack: str | None = None, side: str = "input", ax: Axes | None = None) -> Axes:
    """Heat map of `measures.tier_overlap`; the diagonal, which is 1, is grey."""
    grid, parts = measures.tier_overlap(collected, stack, side)
    np.fill_diagonal(grid, np.nan)
    ax = ax or new_axes(2.4 + 0.7 * len(parts), 1.6 + 0.6 * len(parts))
    high = max(0.1, float(np.nanmax(grid, initial=0.0)))
    heat_map(ax, grid, parts, parts, limits=(0.0, high), label=f"mean cos² of the angles, {side}s")
    ax.set_title("Overlap between parts")
    return ax


def expert_maps(
    collected: Collected, role: str, stack: str | None = None, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """Heat maps, layers down and experts across, of `experts.maps` of one role: the norm of the updates, and the
    part of their energy that experts share.

    The second one is left out where no parts add up to the update.
    """
    by_value = experts.maps(collected, stack)[role]
    drawn = [name for name, grid in by_value.items() if np.isfinite(grid).any()] or ["norm"]
    layers, number = by_value["norm"].shape
    if axes is None:
        wide = min(max(3.2, 0.42 * number), 9.0)
        axes = new_row(len(drawn) * (wide + 1.5), 1.4 + 0.27 * max(4, min(layers, 40)), [1.0] * len(drawn))
    for ax, name in zip(axes, drawn, strict=True):
        limits = (0.0, 1.0) if name == "shared" else (0.0, float(np.nanmax(by_value[name], initial=0.0)) or 1.0)
        heat_map(ax, by_value[name], _numbers(layers), _numbers(number), limits=limits, label=experts.VALUES[name])
        words = f"{experts.VALUES[name][0].upper()}{experts.VALUES[name][1:]}"
        title = words if ax is not axes[0] else f"{role.rpartition('.')[2]}: {experts.VALUES[name]}"
        ax.set(xlabel="expert", ylabel="layer", title=title)
    return axes


def _part_words(part: str) -> str:
    words: Mapping[str, str] = {"update": "the whole update", "path": "the paths", "injected": "the injected pairs"}
    return words.get(part, f"the {part} tier" if part in ("global", "mid", "layer") else f"part {part}")


def _rank_words(collected: Collected, part: str) -> str:
    ranks = sorted({c.rank for c in collected.of(part)})
    return f"{part}\nrank {ranks[0]}" + (f"-{ranks[-1]}" if len(ranks) > 1 else "")
