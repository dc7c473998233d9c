"""The paper's Fig. 3 and 4 (arXiv 2503.21838) of an encoder that you have: spectra over epochs, KL between layers.

    python benchmarks/figures_3_and_4.py --model DIR --train sst2/train.parquet --validation sst2/validation.parquet \
        --out figures

Trains MSPLoRA with one rank for all tiers (as the paper does for its Fig. 3) and LoRA of the same rank on the same
rows, in the same order and with the same head, by `ziggurat train`, with `spectra=epoch`. Fig. 3: the eight largest
singular values of each tier, mean over its pairs, by epoch. Fig. 4: the KL divergence between the layers' spectra of
MSPLoRA's layer tier and of LoRA, and the difference. Alpha, dropout, warm-up, weight decay and the head's rate are the
reference scripts' (recipe roberta-sst2); rows, epochs, batch and rate are options. `--plot` draws anew from runs that
are there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ziggurat.analysis import Collected, collect, figures, measures, trace
from ziggurat.analysis.style import new_row, styled
from ziggurat.recipe.recipe import load_recipe
from ziggurat.training.loop.run import train

RUNS = ("msplora", "lora")


def run(options: argparse.Namespace, method: str) -> None:
    """Train one of the two into --out, unless it is there."""
    folder = options.out / method
    if (folder / "run.json").is_file():
        return
    shape = {
        "msplora": [f"method.ranks={[options.rank] * 3}", "method.r="],
        "lora": [f"method.r={options.rank}", "method.num_groups="],
    }
    words = [
        f"model={options.model}",
        f"data.train={options.train}",
        f"data.validation={options.validation}",
        *("data.subset=", "data.train_split=", "data.validation_split="),
        f"data.text={options.text}",
        f"data.max_train={options.rows}",
        f"data.max_length={options.max_length}",
        f"method.name={method}",
        *shape[method],
        f"train.epochs={options.epochs}",
        f"train.batch={options.batch}",
        f"train.lr={options.lr}",
        *("train.evaluate=never", "train.save=never", "train.best=false", "spectra=epoch"),
        f"seed={options.seed}",
        f"output={folder}",
    ]
    result = train(load_recipe("roberta-sst2", words))
    scores = {name: round(value, 2) for name, value in result.after.items()}
    print(method, scores, f"{result.seconds:.0f} s", flush=True)


def save(ax: Any, out: Path) -> None:
    ax.figure.savefig(out)


def fig_3(folder: Path, out: Path) -> dict[str, Any]:
    """Draw it; returns how the largest singular value and the effective rank of each tier went."""
    history = json.loads((folder / "run.json").read_text())["history"]
    spectra = trace.top_values(history)
    with styled():
        save(figures.figure_3(spectra)[0], out)
    ranks = trace.series(history, "effective_rank")
    return {
        part: {
            "s1, first and last epoch": [round(float(values[0, n]), 3) for n in (0, -1)],
            "s8 / s1, last epoch": round(float(values[-1, -1] / values[0, -1]), 3),
            "effective rank, first and last epoch": [round(float(ranks[part][1][n]), 2) for n in (0, -1)],
        }
        for part, (_, values) in spectra.items()
    }


def fig_4(first: Collected, other: Collected, out: Path) -> dict[str, Any]:
    """Draw both KL maps on one scale, and the difference; returns the means off the diagonal."""
    grids = [measures.kl_matrix(first), measures.kl_matrix(other)]
    difference = measures.kl_difference(first, other)
    high = max(float(np.nanmax(grid)) for grid in grids)
    side = 1.2 + 0.36 * max(6, len(difference))
    with styled():
        axes = new_row(3 * side + 2.4, side, [1, 1, 1])
        for ax, grid, name in zip(axes, grids, ("MSPLoRA, layer tier", "LoRA"), strict=False):
            figures.layer_map(grid, f"KL between layers: {name}", "KL(i || j)", ax, least=high)
        label = "positive: MSPLoRA is less redundant"
        figures.layer_map(difference, "MSPLoRA minus LoRA", label, axes[2], centred=True)
        save(axes[0], out)
    off = ~np.eye(len(difference), dtype=bool)
    return {
        "mean KL": {name: round(float(grid[off].mean()), 4) for name, grid in zip(RUNS, grids, strict=True)},
        "mean difference": round(float(difference[off].mean()), 4),
        "positive": f"{(difference[off] > 0).mean():.0%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder of runs and figures")
    parser.add_argument("--plot", action="store_true", help="train nothing")
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--train", help="parquet, CSV or JSON lines with texts and labels")
    parser.add_argument("--validation")
    parser.add_argument("--text", default="sentence", help="the column of texts")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4, help="the reference's")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.plot:
        if not (options.model and options.train and options.validation):
            parser.error("--model, --train and --validation are needed")
        for method in RUNS:
            run(options, method)
    first, other = (collect(options.out / method) for method in RUNS)
    spectra = {name: fig_3(options.out / name, options.out / f"figure_3_{name}.png") for name in RUNS}
    print(json.dumps({**spectra, "figure 4": fig_4(first, other, options.out / "figure_4.png")}, indent=1))


if __name__ == "__main__":
    main()
