"""What is kept of LoRA r 8's gain at a given size: short runs of many methods on a small decoder, on one core.

    apt-get download manpages-fr && dpkg-deb -x manpages-fr_*.deb deb && sh benchmarks/frontier_pages.sh deb pages
    nice -n 19 python benchmarks/frontier.py --model SMOLLM2 --pages pages --alpaca alpaca/train.parquet \\
        --plain drop/validation.parquet --out benchmarks/frontier.jsonl

The plan is frontier.yaml: methods, rates, order; frontier_long.yaml has longer runs, in bfloat16. Every run is one line
of JSON; a run whose line is there already is skipped, so a killed command goes on where it was. All runs of a task see
the same rows, as many steps, and, with the same seed, the same order. `--list` prints what is missing. SMOLLM2: a
folder with SmolLM2-135M's weights and tokenizer.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import yaml
from frontier_data import IGNORED, Rows, Splits, answers, pages, passages
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import ziggurat
from ziggurat.host.tensors import tier_of

HERE = Path(__file__).resolve().parent
#: Rows of one forward pass in evaluation; the result doesn't depend on it but for rounding.
EVALUATION_BATCH = 16


class Run(NamedTuple):
    """One line of the results. `config`: the adapter's class and fields; empty: the frozen model."""

    task: str
    targets: str
    method: str
    config: dict[str, Any]
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """What makes two runs the same: a method that is changed in the plan is another one."""
        return json.dumps([self.task, self.targets, self.config, self.rate, self.seed], sort_keys=True)


def missing(plan: dict[str, Any], lines: list[dict[str, Any]]) -> Iterator[Run]:
    """The runs that can be started, in the plan's order: a group's first rates, its other rates, its other seeds.

    With `seeds_first` the other seeds of the first rates come before the other rates. A group may have `seeds` of its
    own in the place of the plan's.
    """
    done = {line["key"]: line for line in lines}
    for group in plan["groups"]:
        tuned = [_tuning(plan, group, name, rates, done) for name, rates in group["rates"].items()]
        first, *others = seeds_of(plan, group)
        if group.get("seeds_first"):
            firsts = [runs[0]._replace(seed=seed) for seed in (first, *others) for runs in tuned]
            yield from (run for run in firsts if run.key not in done and (run.config or run.seed == first))
            if any(run.key not in done for run in firsts if run.config):
                return
        longest = max(map(len, tuned))
        turns = [runs[turn] for turn in range(longest) for runs in tuned if turn < len(runs)]
        yield from (run for run in turns if run.key not in done)
        if any(run.key not in done for run in turns):
            return
        for seed in others:
            for runs in tuned:
                best = best_rate(runs, done)
                if best is not None and runs[0].config:
                    again = best._replace(seed=seed)
                    if again.key not in done:
                        yield again


def seeds_of(plan: dict[str, Any], group: dict[str, Any]) -> list[int]:
    """The seeds of a group's runs; rates are chosen with the first."""
    return group.get("seeds", plan["seeds"])


def planned(plan: dict[str, Any], done: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, list[Run]]]:
    """Group, method and its runs with the first seed, of the whole plan; `done`: lines by key."""
    for group in plan["groups"]:
        for name, rates in group["rates"].items():
            yield group, name, _tuning(plan, group, name, rates, done)


def _tuning(
    plan: dict[str, Any], group: dict[str, Any], name: str, rates: list[float], done: dict[str, Any]
) -> list[Run]:
    """A method's runs with the first seed: the rates of the plan, then those beyond a best one that is the last."""
    config = dict(plan["methods"][name])
    if config and config["config"] != "LoR2CConfig":
        config["target_modules"] = plan["targets"][group["targets"]]
    # LoR2C's paths go around whole layers: it has no targets.
    targets = "" if not config else "paths" if config["config"] == "LoR2CConfig" else group["targets"]
    runs = [Run(group["task"], targets, name, config, float(rate), seeds_of(plan, group)[0]) for rate in rates]
    for _ in range(2):
        best = best_rate(runs, done)
        if best is None or len(runs) < 3 or min(r.rate for r in runs) < best.rate < max(r.rate for r in runs):
            break
        runs.append(best._replace(rate=best.rate * (2 if best.rate == max(r.rate for r in runs) else 0.5)))
    return runs


def best_rate(runs: list[Run], done: dict[str, Any]) -> Run | None:
    """The run with the lowest loss on the tuning rows; None where one of them isn't done or all failed."""
    lines = [done.get(run.key) for run in runs]
    if any(line is None for line in lines):
        return None
    losses = [line["tuning_after"] if line and line.get("tuning_after") is not None else math.inf for line in lines]
    return runs[losses.index(min(losses))] if min(losses) < math.inf else None


def adapted(base: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The base model with a fresh adapter; itself, frozen, for an empty config."""
    if not config:
        return base.requires_grad_(False)
    fields = dict(config)
    name = fields.pop("config")
    make = getattr(ziggurat, name, None) or getattr(peft, name)
    return peft.get_peft_model(base, make(task_type="CAUSAL_LM", **fields))  # type: ignore[arg-type]


def trained(
    model: nn.Module, rows: Rows, rate: float, seed: int, batch: int, of_tiers: dict[str, float] | None = None
) -> dict[str, Any]:
    """One epoch: AdamW, linear decay to 0, clipped at norm 1. The loss and the gradient's norm of every step.

    `of_tiers`: tier -> the factor on its learning rate.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    shares = [(of_tiers or {}).get(tier_of(name), 1.0) for name in named]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p, own in zip(parameters, shares, strict=True) if own == s], "share": s} for s in {*shares}],
        lr=rate,
        weight_decay=0.0,
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).split(batch)
    losses, norms = [], []
    model.train()
    ziggurat.step(model, 0, len(order), optimizer)
    for step, batch_rows in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"] * (1 - step / len(order))
        loss = model(**rows.at(batch_rows), use_cache=False).loss
        losses.append(round(loss.item(), 4))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        norms.append(float(f"{nn.utils.clip_grad_norm_(parameters, 1.0).item():.3g}"))
        optimizer.step()
        ziggurat.step(model, step + 1, len(order), optimizer)
        optimizer.zero_grad()
    return {"steps": len(order), "losses": losses, "gradient_norms": norms}


@torch.inference_mode()
def loss_on(model: nn.Module, rows: Rows) -> float:
    """Mean loss of the tokens that count."""
    model.eval()
    total, tokens = 0.0, 0
    for first in range(0, len(rows), EVALUATION_BATCH):
        batch = rows.at(slice(first, first + EVALUATION_BATCH))
        number = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += model(**batch, use_cache=False).loss.item() * number
        tokens += number
    return total / tokens


def measured(
    run: Run, model_folder: Path, splits: Splits, plain: Rows, batch: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Build, train, evaluate, save: the line of `run`, without what all lines have.

    `dtype`: that of the base model; an adapter's parameters are float32, as PEFT makes them.
    """
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    torch.manual_seed(run.seed)
    model = adapted(base, run.config)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    begun, worked = time.monotonic(), time.process_time()
    result = trained(model, splits.training, run.rate, run.seed, batch) if run.config else {}
    training = time.monotonic() - begun
    after = {f"{name}_after": round(loss_on(model, rows), 5) for name, rows in _evaluated(splits, plain).items()}
    with tempfile.TemporaryDirectory() as folder:
        if run.config:
            model.save_pretrained(folder)  # type: ignore[operator]
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {
        "parameters": parameters,
        "stored_bytes": stored,
        **{name: value if math.isfinite(value) else None for name, value in after.items()},
        "training_seconds": round(training, 1),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        **result,
    }


def _evaluated(splits: Splits, plain: Rows) -> dict[str, Rows]:
    return {"tuning": splits.tuning, "reported": splits.reported, "plain": plain}


def beside(line: dict[str, Any], frozen: dict[str, Any] | None, classes: int) -> dict[str, Any]:
    """The losses before, which are the frozen model's, and whether the run broke: it ended above its start, or a
    step's loss was above that of a uniform guess, or no number."""
    before = {f"{name}_before": (frozen or line)[f"{name}_after"] for name in ("tuning", "reported", "plain")}
    if frozen is None:
        return before
    ended, losses = line["tuning_after"], line["losses"]
    broke = ended is None or ended > before["tuning_before"] or not max(losses) <= math.log(classes)
    return {**before, "diverged": broke}


def machine() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "tokenizers", "numpy")}
    tag = subprocess.run(["git", "describe", "--tags", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return {
        "versions": {"python": platform.python_version(), "ziggurat": ziggurat.__version__, **versions},
        "tag": tag.stdout.strip(),
        "threads": torch.get_num_threads(),
        # The same seed ends elsewhere where sums are made in another order.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        # A folder's name says which one it was; where it lay on the machine is nobody's concern.
        "command": ["python", "benchmarks/frontier.py", *(word.rpartition("/")[2] for word in sys.argv[1:])],
    }


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file; one that a killed process left unfinished is no line."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model and its tokenizer")
    parser.add_argument("--pages", type=Path, required=True, help="folder of .txt files, one a page")
    parser.add_argument("--alpaca", type=Path, required=True, help="table with columns instruction, input, output")
    parser.add_argument("--plain", type=Path, required=True, help="table with a column passage: English text")
    parser.add_argument("--plan", type=Path, default=HERE / "frontier.yaml")
    parser.add_argument("--out", type=Path, help="file that the lines are added to; without it the plan's, .jsonl")
    parser.add_argument("--until", type=float, default=math.inf, help="no run starts after this Unix time")
    parser.add_argument("--list", action="store_true", help="print the runs that can be started, and end")
    args = parser.parse_args()
    args.out = args.out or args.plan.with_suffix(".jsonl")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)  # one core, and the same sums in the same order whatever the machine has
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    if args.list:
        for run in missing(plan, read(args.out)):
            print(run.task, run.targets, run.method, run.rate, run.seed)
        return
    tokenizer, tokens = AutoTokenizer.from_pretrained(args.model), plan["tokens"]
    plain = passages(args.plain, tokenizer, plan["sizes"]["plain"], tokens)
    made = {"french": lambda: pages(args.pages, tokenizer, plan["sizes"], tokens)}
    made["alpaca"] = lambda: answers(args.alpaca, tokenizer, plan["sizes"], tokens)
    splits: dict[str, Splits] = {}
    while time.time() < args.until and (run := next(missing(plan, read(args.out)), None)) is not None:
        if run.task not in splits:
            splits[run.task] = made[run.task]()
        head = {**run._asdict(), "key": run.key, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        try:
            line = measured(run, args.model, splits[run.task], plain, plan["batch"], plan.get("dtype", "float32"))
            frozen = next((old for old in read(args.out) if old["task"] == run.task and not old["config"]), None)
            if run.config and frozen is None:
                raise ValueError(f"{run.task} has no run of the frozen model: put `frozen: [0]` first in the plan.")
            line = {**head, **line, **beside(line, frozen, len(tokenizer)), **machine()}
        except Exception as error:  # the other runs go on; the line says which one did not
            line = {**head, "error": f"{type(error).__name__}: {error}"[:600], **machine()}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print({name: line.get(name) for name in ("method", "rate", "seed", "reported_after", "error")}, flush=True)


if __name__ == "__main__":
    main()
