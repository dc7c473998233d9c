"""The remaining ranks as a table and as a heat map, layers by roles."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ziggurat.extras import require
from ziggurat.host.base.anatomy import Anatomy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Picture of the ranks after pruning, beside the adapter.
RANKS_PICTURE = "ranks.png"
#: Role -> layer -> rank, of one stack.
Grid = dict[str, dict[int, int]]


def grids(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, Grid]:
    """`ranks` (path -> rank, as `LoRA2Model.ranks` gives it) by stack, role and layer.

    Layers outside every stack come last, in a grid without a name, with their path as the role and layer 0.
    """
    anatomy = Anatomy(model)
    by_stack: dict[str, Grid] = {}
    for path, rank in ranks.items():
        place = anatomy.find(path)
        stack, role, layer = ("", path, 0) if place is None else (place.stack, place.role, place.layer)
        by_stack.setdefault(stack, {}).setdefault(role, {})[layer] = rank
    return dict(sorted(by_stack.items(), key=lambda item: item[0] == ""))


def table(model: nn.Module, ranks: Mapping[str, int]) -> str:
    """The ranks as a Markdown table a stack: one row a layer, one column a role, with the sums."""
    parts = []
    for stack, grid in grids(model, ranks).items():
        layers = sorted({layer for by_layer in grid.values() for layer in by_layer})
        rows = [f"| {stack or 'outside'} | {' | '.join(grid)} | sum |", "|---|" + "--:|" * (len(grid) + 1)]
        for layer in layers:
            row = {role: by_layer[layer] for role, by_layer in grid.items() if layer in by_layer}
            cells = " | ".join(str(row.get(role, "")) for role in grid)
            rows.append(f"| {layer} | {cells} | {sum(row.values())} |")
        sums = [sum(by_layer.values()) for by_layer in grid.values()]
        rows.append(f"| sum | {' | '.join(map(str, sums))} | {sum(sums)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def heat_map(model: nn.Module, ranks: Mapping[str, int], file: str | Path | None = None) -> "Figure":
    """The ranks as a heat map a stack, roles upwards and layers to the right; written to `file` if one is given.

    Raises:
        MissingExtraError: matplotlib isn't installed.
    """
    require("drawing a heat map", "matplotlib")
    from matplotlib.figure import Figure

    by_stack = grids(model, ranks)
    highest = max(ranks.values(), default=1) or 1
    columns = max((layer + 1 for grid in by_stack.values() for at in grid.values() for layer in at), default=1)
    rows = [len(grid) for grid in by_stack.values()]
    figure = Figure(figsize=(2.5 + 0.45 * columns, 1.0 + 0.45 * sum(rows) + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (stack, grid) in zip(axes, by_stack.items(), strict=True):
        layers = range(1 + max(layer for at in grid.values() for layer in at))
        values = [[at.get(layer, float("nan")) for layer in layers] for at in grid.values()]
        image = axis.imshow(values, vmin=0, vmax=highest, cmap="viridis", aspect="auto", origin="lower")
        for y, at in enumerate(grid.values()):
            for layer, rank in at.items():
                axis.text(
                    layer, y, str(rank), ha="center", va="center", color="white" if rank < highest * 0.6 else "black"
                )
        axis.set(title=stack, xlabel="layer", xticks=list(layers), yticks=range(len(grid)), yticklabels=list(grid))
        figure.colorbar(image, ax=axis, label="rank")
    if file is not None:
        figure.savefig(str(file))
    return figure
