"""Why the pyramid does as well as it does: what each tier learns, what layers have in common, and other starts.

    nice -n 19 python benchmarks/pyramid_study.py --model SMOLLM2 --pages pages --out benchmarks/pyramid_study.jsonl
    python benchmarks/pyramid_study.py --report > benchmarks/pyramid_study.md

Runs of frontier.py (French pages, queries and values, rate 1e-2, one seed), each measured after training:

- *norm*: ||s_t B_t A_t||_F of each tier t, the mean over its sites; *energy*: the sum of its squares over sites, of the
  sum of all tiers;
- *common*: the share of the energy of the layers' updates that one matrix for all layers, or one for each third of
  them, could hold (ziggurat/analysis/sharing.py), by role. 1/30 and 1/10 for unrelated updates.

The line with an empty name is the frozen model: what the gradients by the adapted weights have in common. Every run is
one line of JSON; a run whose line is there already is skipped. `cpu_seconds` are those of training and evaluation.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from frontier import HERE, Run, adapted, loss_on, machine, read, trained
from frontier_data import Splits, pages
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ziggurat import MSPLoraConfig
from ziggurat.analysis import sharing
from ziggurat.host.base.anatomy import Anatomy
from ziggurat.host.method import parts_of
from ziggurat.host.method_layer import MethodLayer
from ziggurat.lowrank.pair import FactorPair, inner

RATE = 1e-2
TARGETS = ["q_proj", "v_proj"]
PYRAMID = {"config": "MSPLoraConfig", "r": 8, "lora_alpha": 16, "target_modules": TARGETS}
#: Batches whose gradients are compared in the frozen model.
BATCHES = 8


def by_sharers(layers: int, groups: int = 3) -> list[dict[str, Any]]:
    """The tiers of r 8, alpha 16, each alpha over the square root of how many layers share its pair."""
    sharers = {"global": layers, "mid": layers / groups, "layer": 1}
    names = zip(sharers, (1, groups, "layers"), (8, 4, 2), strict=True)
    return [{"name": n, "groups": g, "r": r, "lora_alpha": 16 / sharers[n] ** 0.5} for n, g, r in names]


@torch.no_grad()
def orthonormal(model: nn.Module) -> None:
    """Make the rows of all A's of one role orthogonal to each other, over tiers and layers. Each A keeps its norm."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        # <stack>:<role>:<d_out>x<d_in>:<group>:<key>
        stack, role, *_, key = name.rpartition("factors.")[2].split(":") if ":" in name else ("", "", "")
        if key.startswith("A_"):
            rows[f"{stack}:{role}"].append(parameter)
    for factors in rows.values():
        number, d_in = sum(map(len, factors)), factors[0].shape[1]
        if number > d_in:
            raise SystemExit(f"{number} rows can't be orthogonal in {d_in} dimensions")
        Q, _ = torch.linalg.qr(torch.randn(d_in, number))
        for A, part in zip(factors, Q.T.split([len(A) for A in factors]), strict=True):
            A.copy_(part * (A.norm() / len(A) ** 0.5))


class Variant(NamedTuple):
    """`config`: the adapter's; `by_sharers`: with the tiers of `by_sharers`; `start`: called with the fresh model;
    `rates`: tier -> the factor on its learning rate."""

    config: dict[str, Any] = PYRAMID
    by_sharers: bool = False
    start: Callable[[nn.Module], None] | None = None
    rates: dict[str, float] | None = None


VARIANTS = {
    "as published": Variant(),
    "LoRA r 8": Variant(PYRAMID | {"config": "LoraConfig"}),
    "A's orthogonal across tiers and layers": Variant(start=orthonormal),
    "shared tiers at a third of the rate": Variant(rates={"global": 1 / 3, "mid": 1 / 3}),
    "scales over the square root of the sharers": Variant(by_sharers=True),
    "layer tier at a third of the rate": Variant(rates={"layer": 1 / 3}),
}


@torch.no_grad()
def tiers_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """The mean norm and the share of the energy of each tier."""
    norms: dict[str, list[float]] = defaultdict(list)
    for layer in (module for module in model.modules() if isinstance(module, MethodLayer)):
        parts = parts_of(layer.method, layer.configs["default"], layer.sites["default"], layer.stored("default"))
        for part in parts:
            norms[part.name].append(inner(part.pair, part.pair) ** 0.5)
    energies = {name: sum(norm**2 for norm in each) for name, each in norms.items()}
    return {
        name: {
            "norm": round(sum(each) / len(each), 4),
            "energy": round(energies[name] / sum(energies.values()), 4),
        }
        for name, each in norms.items()
    }


def updates(model: nn.Module) -> list[sharing.Item]:
    """The update of each adapted linear layer."""
    items = []
    anatomy = Anatomy(model)
    for path, module in model.named_modules():
        if isinstance(module, MethodLayer):
            pair = module.effective_pair("default")
        elif isinstance(module, LoraLayer):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            pair = FactorPair(A, module.scaling["default"] * B)
        else:
            continue
        place = anatomy.position(path)
        items.append(sharing.Item("", place.stack, place.role, place.layer, place.num_layers, pair))
    return items


def common(items: list[sharing.Item]) -> dict[str, float]:
    """The common share over depth and thirds of it, by role."""
    return {
        f"{line.where.rpartition('/')[2].rpartition('.')[2]}, {line.over}": round(line.share, 4)
        for line in sharing.shared(items)
        if line.over in ("depth", "group")
    }


def measured(name: str, model_folder: Path, splits: Splits, batch: int, seed: int) -> dict[str, Any]:
    """The line of one variant; of the frozen model for "" ."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(seed)
    if not name:
        model = get_peft_model(base, MSPLoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
        order = torch.randperm(len(splits.training), generator=torch.Generator().manual_seed(seed)).split(batch)
        losses = (model(**splits.training.at(rows), use_cache=False).loss for rows in order[:BATCHES])
        return {"gradients": common(sharing.gradients(model, losses))}
    variant = VARIANTS[name]
    tiers = {"tiers": by_sharers(base.config.num_hidden_layers), "r": None} if variant.by_sharers else {}
    fields = {key: value for key, value in (variant.config | tiers).items() if value is not None}
    model = adapted(base, fields)
    if variant.start:
        variant.start(model)
    begun = time.process_time()
    result = trained(model, splits.training, RATE, seed, batch, variant.rates)
    with torch.no_grad():
        shares = common(updates(model))
    return {
        "config": variant.config if variant == Variant(variant.config) else None,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tuning_after": round(loss_on(model, splits.tuning), 5),
        "reported_after": round(loss_on(model, splits.reported), 5),
        "tiers": tiers_of(model),
        "updates": shares,
        "cpu_seconds": round(time.process_time() - begun, 1),
        **result,
    }


def report(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> Iterator[str]:
    """The page. `others`: the lines of frontier.py, which has runs of the same settings."""
    before = {line["key"]: line["reported_after"] for line in others if "reported_after" in line}
    yield "# What the tiers of a pyramid do\n"
    yield "Made by `pyramid_study.py --report` from `pyramid_study.jsonl`; what is measured is said in the script.\n"
    yield "French pages as in frontier.md; MSPLoRA r 8 (ranks 8, 4, 2) on q and v of 30 layers; rate 1e-2.\n"
    yield (
        "*Before*: the loss of the same settings and seed in frontier.jsonl. Other processors round sums otherwise; "
        "the first five steps agree to four decimals, later ones part: that is the noise of one run.\n"
    )
    yield "| | seed | loss | before | norm: global, mid, layer | energy | common: q, v | in thirds: q, v |"
    yield "|---|--:|--:|--:|---|---|--:|--:|"
    for line in lines:
        tiers, shares = line.get("tiers", {}), line.get("updates", line.get("gradients", {}))
        loss = f"{line['reported_after']:.3f}" if line["name"] else ""
        norms = ", ".join(f"{tier['norm']:.2f}" for tier in tiers.values())
        energies = ", ".join(f"{tier['energy']:.0%}" for tier in tiers.values())
        over = {
            over: ", ".join(f"{shares[f'{role}, {over}']:.2f}" for role in TARGETS if f"{role}, {over}" in shares)
            for over in ("depth", "group")
        }
        name = line["name"] or "frozen model: gradients"
        same = Run("french", "q v", "", line["config"], RATE, line["seed"]).key if line.get("config") else ""
        earlier = f"{before[same]:.3f}" if same in before else ""
        cells = (name, line["seed"], loss, earlier, norms, energies, over["depth"], over["group"])
        yield f"| {' | '.join(map(str, cells))} |"
    for versions in dict.fromkeys(json.dumps(line["versions"]) for line in lines):
        yield f"\nVersions: {versions}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the base model and its tokenizer")
    parser.add_argument("--pages", type=Path, help="folder of .txt files, one a page")
    parser.add_argument("--plan", type=Path, default=HERE / "frontier.yaml", help="for the sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "pyramid_study.jsonl", help="file that lines are added to")
    parser.add_argument("--report", action="store_true", help="print the page, and end")
    args = parser.parse_args()
    if args.report:
        print("\n".join(report(read(args.out), read(HERE / "frontier.jsonl"))))
        return
    if args.model is None or args.pages is None:
        parser.error("--model and --pages are needed to run anything; --report alone needs neither")
    torch.set_num_threads(1)
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    splits = pages(args.pages, tokenizer, plan["sizes"], plan["tokens"])
    for name in ("", *VARIANTS):
        if any((line["name"], line["seed"]) == (name, args.seed) for line in read(args.out)):
            continue
        head = {"name": name, "seed": args.seed, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        line = {**head, **measured(name, args.model, splits, plan["batch"], args.seed), **machine()}
        line["command"][1] = "benchmarks/pyramid_study.py"
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print({key: line.get(key) for key in ("name", "reported_after", "tiers", "updates", "gradients")}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
