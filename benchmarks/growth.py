"""How step time and memory grow: with layers, rank, sequence length, and the number of adapters held.

    python benchmarks/growth.py --csv benchmarks/growth.csv --plot benchmarks/growth.png

RoBERTa's shapes at width 128 unless --width says otherwise, q and v, dropout 0.05; one thing grows, the others stay at
4 layers, rank 8, 4 x 64 tokens, one adapter. A step's extra is what it takes more than the frozen model's, in
milliseconds of processor time, the median over rounds; memory is what autograd keeps beyond the frozen model's, and
for adapters held the factors themselves. How it is timed: benchmarks/paired.py.
"""

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path

from paired import Step, adapters, batch, head, ratio, roberta, times
from torch import nn

GROWING: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "rank": (4, 8, 16, 32),
    "tokens": (16, 64, 256),
    "held": (1, 4, 16),
}
STILL = {"layers": 4, "rank": 8, "tokens": 64, "held": 1}


def hold(adapt: Callable[[nn.Module], nn.Module], number: int) -> Callable[[nn.Module], nn.Module]:
    """What puts `number` adapters into a model, of which the first trains."""

    def several(model: nn.Module) -> nn.Module:
        model = adapt(model)
        for i in range(1, number):
            config = model.peft_config["default"]  # type: ignore[index, union-attr]
            # AdaLoRA can hold one adapter that trains; the others are for inference.
            other = type(config)(
                **{**config.to_dict(), "inference_mode": True, "peft_type": None, "auto_mapping": None}
            )
            model.add_adapter(f"other{i}", other)  # type: ignore[operator]
        model.set_adapter("default")  # type: ignore[operator]
        return model

    return several


def factor_bytes(model: nn.Module) -> int:
    """All of the adapters' parameters and VeRA's buffers: what the model holds more than its base."""
    held = {id(t): t for name, t in (*model.named_parameters(), *model.named_buffers()) if _is_adapters(name)}
    return sum(t.numel() * t.element_size() for t in held.values())


def _is_adapters(name: str) -> bool:
    words = ("lora_", "vera_", "lily_", "msplora_", "lora2_", "lor2c_", "ranknum")
    return any(word in name for word in words)


def point(width: int, size: dict[str, int], seconds: float, rounds: int) -> list[dict[str, object]]:
    base, inputs = roberta(size["layers"], width), batch(4, size["tokens"])
    steps = {"frozen": Step(base, None, inputs)}
    for name, adapt in adapters(["query", "value"], 0.05, size["rank"]).items():
        name = name.split(" r ")[0] if f"r {size['rank']}" in name else name
        if " r " in name:  # LoRA of the stacked rank: benchmarks/training_step.py
            continue
        steps[name] = Step(base, hold(adapt, size["held"]), inputs)
    kept = {name: step.saved() for name, step in steps.items()}
    took = times(steps, seconds, least=rounds)
    frozen = took["frozen"]
    return [
        {
            "way": name,
            "rounds": len(frozen),
            "frozen_ms": 1e3 * statistics.median(frozen),
            "extra_ms": 1e3 * statistics.median(a - b for a, b in zip(took[name], frozen, strict=True)),
            "step_to_frozen": ratio(took[name], frozen).median,
            "saved_bytes": kept[name] - kept["frozen"],
            "factor_bytes": factor_bytes(step.model),
        }
        for name, step in steps.items()
        if name != "frozen"
    ]


def table(grown: str, rows: list[dict[str, object]]) -> None:
    values = GROWING[grown]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cell = {(row["way"], row["value"]): row for row in rows}
    memory = "factor_bytes" if grown == "held" else "saved_bytes"
    kept = "factors held" if grown == "held" else "saved beyond frozen"
    print(f"\n### {grown}: {', '.join(map(str, values))} (rounds a point: {rows[0]['rounds']})\n")
    print(
        "| | " + " | ".join(f"extra ms, {v}" for v in values) + " | " + " | ".join(f"{kept} KiB, {v}" for v in values)
    )
    print("|---|" + "--:|" * (2 * len(values)))
    for way in ways:
        points = [cell[way, v] for v in values]
        extra = " | ".join(f"{row['extra_ms']:.1f}" for row in points)
        print(f"| {way} | {extra} | " + " | ".join(f"{row[memory] / 1024:.0f}" for row in points) + " |", flush=True)  # type: ignore[operator]


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(GROWING), figsize=(13, 5.4), layout="constrained")
    for column, (grown, values) in enumerate(GROWING.items()):
        mine = [row for row in rows if row["grown"] == grown]
        memory = "factor_bytes" if grown == "held" else "saved_bytes"
        for way in dict.fromkeys(row["way"] for row in mine):
            of_way = {row["value"]: row for row in mine if row["way"] == way}
            style = "-" if not str(way).startswith("PEFT") else "--"
            axes[0][column].plot(values, [of_way[v]["extra_ms"] for v in values], style, marker="o", ms=3, label=way)
            axes[1][column].plot(values, [of_way[v][memory] / 2**20 for v in values], style, marker="o", ms=3)  # type: ignore[operator]
        for row, what in zip(
            (0, 1), ("extra ms a step", "factors held, MiB" if grown == "held" else "saved, MiB"), strict=True
        ):
            axes[row][column].set(xlabel=grown, ylabel=what, xscale="log", xticks=values, xticklabels=values)
            axes[row][column].minorticks_off()
            axes[row][column].set_ylim(bottom=0)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=12, help="time for each point, and at least --rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="where to write the numbers")
    parser.add_argument("--plot", type=Path, help="where to draw them; needs matplotlib")
    args = parser.parse_args()
    print(head())
    rows: list[dict[str, object]] = []
    for grown, values in GROWING.items():
        for value in values:
            points = point(args.width, {**STILL, grown: value}, args.seconds, args.rounds)
            rows += [{"grown": grown, "value": value, **row} for row in points]
        table(grown, [row for row in rows if row["grown"] == grown])
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
