"""Score against trainable parameters, one panel a task, with error bars."""

from pathlib import Path

from ziggurat.extras import require

from .summary import Summary


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Write scores.png and scores.svg into `folder`. Error bars are the standard deviation over the seeds.

    Raises MissingExtraError where matplotlib is missing.
    """
    require("drawing plots", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = [column for column in summary.columns if any(key[1] == column for key in summary.cells)]
    if not columns:
        return []
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(4.2 * across, 3.4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for column, axis in zip(columns, axes, strict=False):
        for index, method in enumerate(summary.table.methods):
            cell = summary.cells.get((method, column))
            if cell is not None and method in summary.costs:
                axis.errorbar(
                    summary.parameters(method, column),
                    cell.mean,
                    yerr=cell.spread or 0.0,
                    fmt="osD^vP*X"[index % 8],
                    color=f"C{index % 10}",
                    capsize=3,
                    label=method,
                )
        # Training the head alone has 0 adapter parameters, which a logarithmic axis can't show.
        axis.set_xscale("symlog", linthresh=100)
        metric = summary.table.metrics.get(column, "mean of the tasks")
        axis.set(title=column, xlabel="trainable parameters, without the head", ylabel=metric)
        axis.grid(alpha=0.3)
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    # A method may have runs on some of the tasks only.
    drawn = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    named = [method for method in summary.table.methods if method in drawn]
    handles = [drawn[method] for method in named]
    figure.legend(handles, named, loc="outside lower center", ncols=min(4, len(named)), frameon=False, fontsize=8)
    figure.suptitle(f"{summary.table.name}: mean and standard deviation over seeds", fontsize=10)
    paths = [folder / "scores.png", folder / "scores.svg"]
    for path, canvas in zip(paths, (FigureCanvasAgg, FigureCanvasSVG), strict=True):
        canvas(figure).print_figure(str(path), dpi=150)
    return paths
