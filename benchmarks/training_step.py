"""A whole training step against the frozen model's: time, and what autograd keeps.

    python benchmarks/training_step.py                    # every shape, whole models, 100 seconds each
    python benchmarks/training_step.py roberta --layers 2 --seconds 300

Prints a table a shape and, with --json FILE, adds the numbers to a file. How it is timed: benchmarks/paired.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from paired import Step, adapters, batch, dry_roberta, head, llama, ratio, roberta, times
from torch import nn

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV, LLAMA_QV = ["query", "value"], ["q_proj", "v_proj"]


class Shape(NamedTuple):
    """A model of some layers, what is adapted in it, the batch, and the dropout of the adapter."""

    what: str
    make: Callable[[int], nn.Module]
    layers: int
    targets: list[str]
    batch: tuple[int, int]
    dropout: float


ROBERTA, LLAMA = "RoBERTa-base's shapes", "Llama, d 576"
SHAPES = {
    "roberta": Shape(f"{ROBERTA}, q and v", roberta, 12, QV, (16, 64), 0.05),
    "roberta-dry": Shape(f"{ROBERTA}, no dropout of its own, q and v", dry_roberta, 12, QV, (16, 64), 0.05),
    "llama-qv": Shape(f"{LLAMA}, q and v", llama, 8, LLAMA_QV, (4, 128), 0.05),
    "llama-all": Shape(f"{LLAMA}, all seven linear layers", llama, 8, ALL, (4, 128), 0.05),
    "llama-qv-0": Shape(f"{LLAMA}, q and v", llama, 8, LLAMA_QV, (4, 128), 0.0),
    "llama-qv-few": Shape(f"{LLAMA}, q and v", llama, 8, LLAMA_QV, (4, 16), 0.0),
    "llama-all-0": Shape(f"{LLAMA}, all seven linear layers", llama, 8, ALL, (4, 128), 0.0),
}


def measure(name: str, seconds: float, only: list[str], layers: int | None) -> list[dict[str, object]]:
    what, make, depth, targets, size, p = SHAPES[name]
    what = f"{what}, {layers or depth} of {depth} layers"
    base, inputs = make(layers or depth), batch(*size)
    steps = {"frozen": Step(base, None, inputs)}
    for adapter, adapt in adapters(targets, p).items():
        if not only or any(word in adapter for word in only):
            steps[adapter] = Step(base, adapt, inputs)
    kept = {way: step.saved() for way, step in steps.items()}
    took = times(steps, seconds)
    lora = took.get("PEFT LoRA r 8")
    rows = []
    rounds = len(took["frozen"])
    print(f"\n## {name}: {what}, batch {size[0]} x {size[1]}, dropout {p}: {rounds} rounds\n\n{head()}\n")
    print("| | trains | step / frozen (quartiles) | step / LoRA r 8 | saved, MiB | saved / frozen |")
    print("|---|--:|--:|--:|--:|--:|")
    for way, step in steps.items():
        to_frozen, to_lora = ratio(took[way], took["frozen"]), ratio(took[way], lora) if lora else None
        saved = kept[way] / 2**20
        print(
            f"| {way} | {step.parameters:,} | {to_frozen} | {f'{to_lora.median:.3f}' if to_lora else ''} "
            f"| {saved:.1f} | {kept[way] / kept['frozen']:.3f} |",
            flush=True,
        )
        rows.append(
            {
                "shape": name,
                "layers": layers or depth,
                "way": way,
                "rounds": rounds,
                "trains": step.parameters,
                "step_to_frozen": [round(v, 4) for v in (to_frozen.median, to_frozen.low, to_frozen.high)],
                "step_to_lora": to_lora and [round(v, 4) for v in (to_lora.median, to_lora.low, to_lora.high)],
                "saved_bytes": kept[way],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"which of: {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--seconds", type=float, default=100, help="time for each shape")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, where time is short")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="adapters whose names hold a word")
    parser.add_argument("--json", type=Path, help="file that the rows are added to, one a line")
    args = parser.parse_args()
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    for shape in args.shapes or SHAPES:
        rows = measure(shape, args.seconds, args.only, args.layers)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"command": sys.argv[1:], **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
