"""The page and the picture of frontier.py's runs: python benchmarks/frontier_report.py [--plan FILE]

Reads a plan and the lines beside it, frontier.yaml and frontier.jsonl, writes frontier.md and, where there is something
to draw, frontier_TASK.png (matplotlib). However many runs there are: what is missing is named. An interval needs scipy.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from frontier import best_rate, planned, read, seeds_of

HERE = Path(__file__).resolve().parent
#: The method whose gain is 100%, and what it adapts.
WHOLE = ("LoRA r 8", "q v")
#: A task on which this one equals the whole can't tell methods apart.
LEAST = ("LoRA r 1", "q v")
CONFIDENCE = 0.95


@dataclass
class Row:
    """One method on one task: its runs at the best rate, by seed, and what its tuning gave."""

    method: str
    targets: str
    tuned: list[tuple[float, float | None]] = field(default_factory=list)
    rate: float | None = None
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}, {self.targets}" if self.targets == "all" else self.method

    def mean(self, what: str) -> float:
        return fmean(line[what] for line in self.lines.values())

    def gains(self) -> dict[int, float]:
        """By how much the loss on the reported rows has fallen, by seed."""
        return {seed: line["reported_before"] - line["reported_after"] for seed, line in self.lines.items()}


def rows(plan: dict[str, Any], lines: list[dict[str, Any]], task: str) -> list[Row]:
    """All methods of the task that have at least one run, in the plan's order. Failed runs have no part in a mean."""
    done = {line["key"]: line for line in lines}
    table = []
    for group, name, runs in planned(plan, done):
        tried = [(run, done[run.key]) for run in runs if run.key in done]
        if group["task"] != task or not tried or not runs[0].config:
            continue
        row = Row(name, runs[0].targets, [(run.rate, line.get("tuning_after")) for run, line in tried])
        best = best_rate([run for run, _ in tried], done)
        if best is not None:
            row.rate = best.rate
            for seed in seeds_of(plan, group):
                line = done.get(best._replace(seed=seed).key)
                if line is not None and line.get("reported_after") is not None:
                    row.lines[seed] = line
        table.append(row)
    return table


def interval(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its interval (Student's t, n - 1 degrees of freedom); None with one value."""
    if len(values) < 2:
        return fmean(values), None
    from scipy.stats import t

    return fmean(values), float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def kept(row: Row, whole: Row | None) -> tuple[float, float | None] | None:
    """The share of the whole's gain that `row` has, paired by seed: the mean over the seeds of the two's ratio."""
    if whole is None:
        return None
    theirs = whole.gains()
    shares = [gain / theirs[seed] for seed, gain in row.gains().items() if seed in theirs]
    return interval(shares) if shares else None


def apart(table: list[Row]) -> str:
    """Whether the task tells methods apart at all: the gap between the whole and the least, paired by seed."""
    whole, least = _find(table, WHOLE), _find(table, LEAST)
    if whole is None or least is None:
        return "Whether this task tells methods apart isn't known: LoRA r 1 or r 8 has no run."
    theirs = whole.gains()
    gaps = [theirs[seed] - gain for seed, gain in least.gains().items() if seed in theirs]
    if len(gaps) < 2:
        return "Whether this task tells methods apart isn't known: LoRA r 1 and r 8 have one seed in common."
    mean, half = interval(gaps)
    verdict = "tells" if mean > (half or 0.0) else "**can't tell**"
    return f"LoRA r 8 ends {mean:.3f} ± {half:.3f} below LoRA r 1: this task {verdict} methods apart."


def differences(table: list[Row]) -> Iterable[str]:
    """For each two methods with three seeds in common, the loss of the one minus that of the other, paired by seed."""
    for first, second in combinations([row for row in table if len(row.lines) > 2], 2):
        seeds = sorted(first.lines.keys() & second.lines.keys())
        if len(seeds) > 2:
            losses = [[row.lines[seed]["reported_after"] for seed in seeds] for row in (first, second)]
            gap = interval([ours - theirs for ours, theirs in zip(*losses, strict=True)])
            yield f"- {first.name} minus {second.name}: {_with(gap, 1, 3, '')} ({len(seeds)} seeds)"


def table_of(task: str, table: list[Row], frozen: dict[str, Any] | None) -> Iterable[str]:
    whole = _find(table, WHOLE)
    yield f"## {task}\n"
    if frozen is not None:
        yield (
            f"Frozen model: {frozen['reported_after']:.3f} on the reported rows, {frozen['tuning_after']:.3f} on the "
            f"tuning rows, {frozen['plain_after']:.3f} on plain English.\n"
        )
    yield apart(table) + "\n"
    yield "| method | parameters | stored bytes | best rate | seeds | loss | share of LoRA r 8's gain | forgotten |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for row in sorted((row for row in table if row.lines), key=lambda row: row.mean("reported_after")):
        first = next(iter(row.lines.values()))
        share = kept(row, whole)
        forgotten = interval([line["plain_after"] - line["plain_before"] for line in row.lines.values()])
        yield (
            f"| {row.name} | {first['parameters']:,} | {first['stored_bytes']:,} | {_rate(row)} | {len(row.lines)} "
            f"| {row.mean('reported_after'):.3f} | {_with(share, 100, 0, '%')} | {_with(forgotten, 1, 3, '')} |"
        )
    yield ""
    broken = [
        f"{row.name} at {rate:g}"
        for row in table
        for rate, loss in row.tuned
        if loss is None or _diverged(row, rate, frozen, loss)
    ]
    if broken:
        yield f"Broke (above its start): {', '.join(broken)}.\n"
    if gaps := list(differences(table)):
        yield "Differences of the loss, paired by seed:\n"
        yield from (*gaps, "")
    yield "Tuning, seed 0, loss on the tuning rows by rate:\n"
    for row in table:
        tried = ", ".join(
            f"{rate:g}: {'failed' if loss is None else f'{loss:.3f}'}" for rate, loss in sorted(row.tuned)
        )
        yield f"- {row.name}: {tried}"
    yield ""


def _diverged(row: Row, rate: float, frozen: dict[str, Any] | None, loss: float) -> bool:
    return frozen is not None and loss > frozen["tuning_after"]


def _rate(row: Row) -> str:
    """The best rate; with a mark where its neighbours are not both tried."""
    rates = [rate for rate, _ in row.tuned]
    assert row.rate is not None
    inside = len(rates) >= 3 and min(rates) < row.rate < max(rates)
    return f"{row.rate:g}" if inside else f"{row.rate:g} (of {len(rates)})"


def _with(value: tuple[float, float | None] | None, times: float, digits: int, unit: str) -> str:
    if value is None:
        return "-"
    mean, half = value
    text = f"{mean * times:.{digits}f}{unit}"
    return text if half is None else f"{text} ± {half * times:.{digits}f}"


def _find(table: list[Row], which: tuple[str, str]) -> Row | None:
    return next((row for row in table if (row.method, row.targets) == which and row.lines), None)


#: A method that keeps less would press the others together.
LEAST_DRAWN = 0.4


def _write_names(figure: Any, axis: Any, names: list[tuple[str, float, float]]) -> None:
    """A name beside each point, where it covers no other name and no point if there is such a place."""
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (axis.transData.transform(at) for _, *at in names)]
    for name, x, y in names:
        for dx, dy in ((6, 4), (-6, 4), (6, -10), (-6, -10), (6, 14), (-6, 14), (6, -20), (-6, -20)):
            side = "left" if dx > 0 else "right"
            text = axis.annotate(name, (x, y), (dx, dy), textcoords="offset points", fontsize=7, ha=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (dx, dy) == (-6, -20):
                taken.append(box)
                break
            text.remove()


def picture(task: str, table: list[Row], file: Path) -> None:
    """The share of LoRA r 8's gain over trainable parameters and over stored bytes, both on a log scale.

    A method's variants, which have a comma in their names and lie close to it, stand in the table alone.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = _find(table, WHOLE)
    shares = [(row, kept(row, whole)) for row in table if row.lines and "," not in row.method]
    drawn = [(row, share) for row, share in shares if share is not None and share[0] >= LEAST_DRAWN]
    low = [f"{row.name} {share[0]:.0%}" for row, share in shares if share is not None and share[0] < LEAST_DRAWN]
    below = f"; below the picture: {', '.join(low)}" if low else ""
    families = sorted({row.method.split(" r ")[0] for row, _ in drawn})
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), sharey=True)
    labels = {"parameters": "trainable parameters", "stored_bytes": "stored bytes"}
    named: dict[str, list[tuple[str, float, float]]] = {label: [] for label in labels.values()}
    for axis, (what, label) in zip(axes, labels.items(), strict=True):
        for row, (mean, half) in drawn:
            x = next(iter(row.lines.values()))[what]
            named[label].append((row.name, x, 100 * mean))
            colour = f"C{families.index(row.method.split(' r ')[0]) % 10}"
            error = None if half is None else [[100 * half], [100 * half]]
            axis.errorbar([x], [100 * mean], yerr=error, fmt="s" if row.targets == "all" else "o", color=colour)
        axis.axhline(100, color="grey", linewidth=0.7)
        axis.set_xscale("log")
        axis.margins(x=0.2)
        axis.set_xlabel(label)
    axes[0].set_ylabel("share of LoRA r 8's gain on held-out rows, %")
    figure.suptitle(f"{task}: mean and 95% interval over seeds; circles: q and v or paths, squares: all seven{below}")
    figure.tight_layout()
    for axis, names in zip(axes, named.values(), strict=True):
        _write_names(figure, axis, names)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def left_out(plan: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """The methods of the plan that lack a rate or a seed, and which."""
    done = {line["key"]: line for line in lines}
    names = []
    for group, name, runs in planned(plan, done):
        rates = [f"{run.rate:g}" for run in runs if run.key not in done]
        tried = [run for run in runs if run.key in done]
        best = best_rate(tried, done) if tried else None
        seeds = [
            str(seed)
            for seed in seeds_of(plan, group)[1:]
            if runs[0].config and (best is None or best._replace(seed=seed).key not in done)
        ]
        lacking = [f"rates {', '.join(rates)}"] * bool(rates) + [f"seeds {', '.join(seeds)}"] * bool(seeds)
        if lacking:
            names.append(f"{group['task']}, {group['targets']}, {name}: {'; '.join(lacking)}")
    return names


def page(name: str, plan: dict[str, Any], lines: list[dict[str, Any]], pictures: Iterable[str]) -> str:
    """The page of the plan in the file `name`.yaml."""
    sizes = plan["sizes"]
    dtype = plan.get("dtype", "float32")
    versions = sorted({json.dumps(line["versions"], sort_keys=True) for line in lines})
    seconds = sum(line.get("seconds", 0.0) for line in lines)
    text = [
        f"# What is kept of LoRA r 8's gain, at which size: {sizes['training']:,} blocks of {plan['tokens']} tokens\n",
        f"Made by `frontier_report.py` from `{name}.jsonl`; the plan is `{name}.yaml`, run by `frontier.py`.\n",
        f"SmolLM2-135M-Instruct (30 layers, from a 4-bit GGUF, {dtype}; adapters float32). "
        f"{sizes['training']:,} blocks of {plan['tokens']} tokens, batch {plan['batch']}, one epoch, AdamW without "
        "weight decay, linear decay, clipped at norm 1, no dropout, alpha 2 r. `french`: pages of Debian's "
        f"manpages-fr; `alpaca`: answers. Rates are chosen with seed 0 on {sizes['tuning']} tuning rows, results read "
        f"on {sizes['reported']} others, from other pages. *Forgotten*: what the loss on {sizes['plain']} English "
        "passages (DROP) has risen by. ±: 95% interval over seeds (Student's t), shares paired by seed; without ±: one "
        "seed, whose noise is not known. (of n): the best rate is at an end of the n that were tried.\n",
        f"{len(lines)} runs, {seconds / 3600:.1f} hours. Versions: {'; '.join(versions)}.\n",
    ]
    for task in dict.fromkeys(group["task"] for group in plan["groups"]):
        of_task = [line for line in lines if line["task"] == task]
        if of_task:
            frozen = next((line for line in of_task if not line["config"] and "error" not in line), None)
            text += table_of(task, rows(plan, lines, task), frozen)
    text += [f"![{name}]({name})\n" for name in pictures]
    failed = [f"- {line['method']} at {line['rate']:g}: {line['error']}" for line in lines if "error" in line]
    text += ["## Failed\n", *failed, ""] if failed else []
    lacking = left_out(plan, lines)
    text += ["## Not run\n", *(f"- {name}" for name in lacking), ""] if lacking else []
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "frontier.yaml")
    parser.add_argument("--runs", type=Path, help="without it the plan's, .jsonl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the page and the pictures")
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    lines = read(args.runs or args.plan.with_suffix(".jsonl"))
    pictures = []
    for task in dict.fromkeys(group["task"] for group in plan["groups"]):
        table = rows(plan, lines, task)
        if sum(bool(row.lines) for row in table) > 1 and _find(table, WHOLE) is not None:
            pictures.append(f"{args.plan.stem}_{task}.png")
            picture(task, table, args.out / pictures[-1])
    (args.out / f"{args.plan.stem}.md").write_text(page(args.plan.stem, plan, lines, pictures), encoding="utf-8")


if __name__ == "__main__":
    main()
