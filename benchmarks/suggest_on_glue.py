"""Does a pyramid laid out by a probe beat the halved one and LoRA at one budget? Scores as JSON lines and a table.

    python benchmarks/suggest_on_glue.py --model DIR --data DIR --out suggest.jsonl --tasks rte mrpc stsb cola

For each task a probe (MSPLoRA, every tier at --probe-rank, --probe-epochs epochs, a seed of its own) gives ranks and
groups by each criterion. Then the suggestions, the halved pyramid of rank --r, and the LoRA with the most rank that the
same parameters pay train on all seeds, by methods_on_glue.py's own run: same data, order, head, epochs. The probe's
cost is not counted in the scores; its seconds stand beside --out. What --out holds already is not run again.
"""

import argparse
import copy
import json
import time
from typing import Any

import methods_on_glue as glue
import numpy as np
import torch
import transformers

from ziggurat import MSPLoraConfig
from ziggurat.analysis import collect
from ziggurat.plan.allocate import CRITERIA, costs, sensitivities
from ziggurat.plan.suggest import suggestion

PROBE_SEED = 1000


def probe(options: argparse.Namespace, task: str) -> dict[str, Any]:
    """Train the probe; the suggestion of each criterion for the halved pyramid's parameters, as ranks and groups."""
    gains: dict[str, np.ndarray] = {}
    kept: dict[str, Any] = {}

    def after_step(model: Any, step: int, total: int, optimizer: Any) -> None:
        for tier, values in sensitivities(model).items():
            old = gains.get(tier, np.zeros(len(values)))
            gains[tier] = old + (values - old) / step
        if step == total:
            kept["probe"] = collect(model)

    def config(**fields: Any) -> MSPLoraConfig:
        return MSPLoraConfig(ranks=[options.probe_rank] * 3, **fields)

    glue.METHODS["probe"] = glue.Method(config, after_step=after_step)
    quick = copy.copy(options)
    quick.epochs = options.probe_epochs
    begun = time.perf_counter()
    glue.run(quick, "probe", task, PROBE_SEED)
    probe, cost = kept["probe"], costs(kept["probe"])
    budget = sum(cost[tier] * max(options.r // 2**n, 1) for n, tier in enumerate(cost))
    line: dict[str, Any] = {"task": task, "budget": budget, "seconds": round(time.perf_counter() - begun, 1), "by": {}}
    for criterion in options.criteria:
        suggested = suggestion(probe, budget, criterion, sensitivity=gains)
        line["by"][criterion] = {
            "ranks": list(suggested.ranks.values()),
            "group_starts": suggested.group_starts,
            "spent": suggested.spent,
            "notes": suggested.notes,
        }
    # One rank of LoRA on the same linears costs what one rank of the private tier does.
    line["lora"] = budget // cost["layer"]
    return line


def prepare(options: argparse.Namespace, task: str) -> None:
    """Give methods_on_glue the task's own methods, probing first where the notes beside --out lack the task."""
    notes = options.out.with_suffix(".probes.json")
    probes = json.loads(notes.read_text()) if notes.is_file() else {}
    if task not in probes:
        probes[task] = probe(options, task)
        notes.write_text(json.dumps(probes, indent=1))
    suggested = probes[task]
    print(task, json.dumps(suggested), flush=True)
    ways: dict[str, dict[str, Any]] = {"halved": {"ranks": [max(options.r // 2**n, 1) for n in range(3)]}}
    for criterion, choice in suggested["by"].items():
        ways[criterion] = {"ranks": choice["ranks"], "group_starts": choice["group_starts"]}
        if options.ablate:
            ways[f"{criterion}_ranks"] = {"ranks": choice["ranks"]}
    names = []
    for name, fields in ways.items():
        if options.even_scales:
            # LoRA's alpha is 16 here, so this is the scale of LoRA of rank r.
            name, fields = (
                f"{name}_even",
                {"even_scales": True, "lora_alpha": 16 / options.r * fields["ranks"][0], **fields},
            )
        glue.METHODS[name] = glue.Method(lambda fields=fields, **given: MSPLoraConfig(**{**given, **fields}))
        names.append(name)
    options.methods = [f"{names[0]}:r={options.r}", f"lora:r={suggested['lora']}", *names[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=glue.Path, help="JSON lines, added to")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--data", help="folder with one folder a task")
    parser.add_argument("--tasks", nargs="+", default=["rte", "mrpc", "stsb", "cola"], choices=glue.TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--r", type=int, default=8, help="rank of the halved pyramid, which sets the budget")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA)
    parser.add_argument("--ablate", action="store_true", help="also the suggested ranks with groups of equal parts")
    parser.add_argument(
        "--even-scales", action="store_true", help="pyramids whose tiers all have LoRA's scale at rank r"
    )
    parser.add_argument("--probe-rank", type=int, default=16)
    parser.add_argument("--probe-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="default: as each task's row says")
    parser.add_argument("--train-rows", type=int, help="learn from this many rows (default: all)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--holdout", type=float, default=0.0)
    parser.add_argument("--score-last", action="store_true", help="score after the last epoch only")
    parser.add_argument("--head", choices=["auto", "pair", "mean", "cls"], default="auto")
    parser.add_argument("--targets", nargs="+", help="default: queries and values")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not options.table:
        if not (options.model and options.data):
            parser.error("--model and --data are needed")
        transformers.logging.set_verbosity_error()
        for task in options.tasks:
            work(options, task)
    lines = glue.held(options.out)
    for line in lines:
        # The rank of LoRA depends on the task's budget only through the model, so it is one method of the table.
        line["method"] = line["method"].split(":")[0]
    print(glue.table(lines))


def work(options: argparse.Namespace, task: str) -> None:
    prepare(options, task)
    done = {(x["method"], x["task"], x["seed"]) for x in glue.held(options.out)}
    for seed in options.seeds:
        for spec in options.methods:
            if (spec, task, seed) not in done:
                line = glue.run(options, spec, task, seed)
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(spec, task, seed, line["score"], line["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
