"""Does a bank help a new task with few rows? Private tiers on a bank of other tasks, a fresh pyramid, fresh LoRA.

    python benchmarks/tenants.py --model DIR --data DIR --work DIR --out tenants.jsonl

For each seed an MSPLoRA bank is trained on the tasks of --bank together (`ziggurat.share`), and kept in --work. Then
each task of --new learns from --rows of its rows, for as many steps each: `private`, only the layer tier on the frozen
bank; `msplora`, a fresh pyramid of the same ranks; `lora:N`, a fresh LoRA of as many parameters as the private tier, as
the pyramid, and of rank --r; `head`, no adapter. All have a fresh head, which no count holds. Scores are those after
the last step, on the validation split; bytes are those of the weights that a new task adds; seconds the processor's.

With several --rates each arm has its best one: of the first seed and --tune-on rows, on validation rows apart from
those that are reported (--eval-rows must leave some).

Each run adds a line to --out. The runs that choose rates come first, then all of the first seed, those with the fewest
rows at the head, so that what is there when it is stopped can be compared. What --out holds already is not run again;
--table prints it and runs nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import methods_on_glue as glue
import pandas as pd
import peft
import torch
import transformers
from torch import Tensor, nn

import ziggurat
from ziggurat import MSPLoraConfig

WEIGHTS = "adapter_model.safetensors"


class Heads(nn.Module):
    """An encoder with adapters, and a head for each task on the mean of the last states (methods_on_glue's)."""

    def __init__(self, options: argparse.Namespace, tasks: list[str]) -> None:
        super().__init__()
        self.encoder: Any = transformers.AutoModel.from_pretrained(options.model)
        width = self.encoder.config.hidden_size
        self.heads = nn.ModuleDict()
        for task in tasks:
            pair = len(glue.TASKS[task].columns) == 2
            self.heads[task] = nn.Linear(width * (4 if pair else 1), glue.TASKS[task].labels)

    def forward(self, task: str, batch: list[dict[str, Tensor]], **names: Any) -> Tensor:
        pooled = []
        for part in batch:
            states = self.encoder(**part, **names).last_hidden_state
            mask = part["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled.append((states * mask).sum(1) / mask.sum(1))
        if len(pooled) == 2:
            a, b = pooled
            pooled = [torch.cat([a, b, (a - b).abs(), a * b], dim=-1)]
        return self.heads[task](pooled[0])


def split(options: argparse.Namespace, task: str, table: pd.DataFrame) -> glue.Split:
    kind = glue.TASKS[task]
    head = "pair" if len(kind.columns) == 2 else "mean"
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    return glue.Split(table, kind, head, tokenizer, torch.device(options.device))


def loss_of(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    if glue.TASKS[task].labels == 1:
        return nn.functional.mse_loss(logits.squeeze(-1), labels)
    return nn.functional.cross_entropy(logits, labels)


def fit(
    options: argparse.Namespace, model: Heads, splits: dict[str, glue.Split], steps: int, seed: int, rate: float
) -> None:
    """Each step takes a batch of every task."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(0.06 * steps, 1), (steps - step) / (0.94 * steps))
    )
    shuffle = torch.Generator().manual_seed(seed)
    streams = {task: endless(part, options.batch, shuffle) for task, part in splits.items()}
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        for task, stream in streams.items():
            batch, labels = next(stream)
            names = {"adapter_names": [task] * len(labels)} if len(splits) > 1 else {}
            loss_of(task, model(task, batch, **names), labels).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        scheduler.step()


def endless(part: glue.Split, size: int, shuffle: torch.Generator) -> Any:
    while True:
        yield from part.batches(torch.randperm(len(part.labels), generator=shuffle), size)


def table_of(options: argparse.Namespace, task: str, name: str) -> pd.DataFrame:
    return pd.read_parquet(Path(options.data) / task / f"{name}.parquet")


def drawn(table: pd.DataFrame, rows: int | None, seed: int) -> pd.DataFrame:
    return table if rows is None or rows >= len(table) else table.sample(n=rows, random_state=seed)


def pyramid(options: argparse.Namespace, **fields: Any) -> MSPLoraConfig:
    targets = {} if "from_adapter" in fields else {"target_modules": glue.QUERY_VALUE}
    return MSPLoraConfig(r=options.r, lora_alpha=16, even_scales=True, **targets, **fields)


def bank(options: argparse.Namespace, seed: int) -> tuple[Path, float]:
    """The set trained on the bank's tasks, and the seconds that it took."""
    tasks = options.bank
    size = f"r{options.r}-{options.bank_steps}x{options.batch}-{options.bank_rows}-{options.lr:g}"
    folder = Path(options.work) / f"{'-'.join(tasks)}-{size}-{seed}"
    note = folder.parent / f"{folder.name}.json"
    if not note.is_file():
        torch.manual_seed(seed)
        model = Heads(options, tasks)
        model.encoder = peft.get_peft_model(model.encoder, pyramid(options), tasks[0])
        for task in tasks[1:]:
            model.encoder.add_adapter(task, pyramid(options))
        ziggurat.share(model.encoder, tasks)
        splits = {t: split(options, t, drawn(table_of(options, t, "train"), options.bank_rows, seed)) for t in tasks}
        begun = clock(options)
        fit(options, model.to(options.device), splits, options.bank_steps, seed, options.lr)
        seconds = clock(options) - begun
        folder.parent.mkdir(parents=True, exist_ok=True)
        ziggurat.save_tenants(model.encoder, folder)
        note.write_text(json.dumps({"seconds": seconds}))
    return folder / tasks[0], json.loads(note.read_text())["seconds"]


def arms(options: argparse.Namespace) -> list[str]:
    """The LoRAs have as many parameters as the private tier, as the pyramid, and rank r."""
    model = transformers.AutoModel.from_pretrained(options.model)
    rank_one = ziggurat.DyLoRAConfig(r=1, target_modules=glue.QUERY_VALUE)
    unit = count(peft.get_peft_model(model, rank_one))
    fresh = peft.get_peft_model(transformers.AutoModel.from_pretrained(options.model), pyramid(options))
    private = sum(p.numel() for n, p in fresh.named_parameters() if n.endswith("_layer"))
    ranks = sorted({max(1, round(private / unit)), max(1, round(count(fresh) / unit)), options.r})
    return ["private", "msplora", *(f"lora:{rank}" for rank in ranks), "head"]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(options: argparse.Namespace, task: str, rows: int, arm: str, seed: int, rate: float) -> dict[str, Any]:
    on, bank_seconds = bank(options, seed) if arm == "private" else (None, 0.0)
    torch.manual_seed(seed)
    model = Heads(options, [task])
    model.encoder.requires_grad_(False)
    configs = {"private": lambda: pyramid(options, from_adapter=str(on)), "msplora": lambda: pyramid(options)}
    if arm in configs:
        model.encoder = peft.get_peft_model(model.encoder, configs[arm]())
    elif arm != "head":
        lora = peft.LoraConfig(r=int(arm.partition(":")[2]), lora_alpha=16, target_modules=glue.QUERY_VALUE)
        model.encoder = peft.get_peft_model(model.encoder, lora)
    trained = count(model.encoder)
    train = split(options, task, drawn(table_of(options, task, "train"), rows, seed))
    begun = clock(options)
    fit(options, model.to(options.device), {task: train}, options.steps, seed, rate)
    seconds = clock(options) - begun
    table = table_of(options, task, "validation")
    reported = drawn(table, options.eval_rows, 0)
    others = table.drop(reported.index)
    return {
        "task": task,
        "rows": rows,
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "score": score(options, model, task, split(options, task, reported)),
        "tuning": score(options, model, task, split(options, task, others)) if len(others) else None,
        "trained": trained,
        "bytes": stored(model.encoder, on),
        "seconds": round(seconds, 1),
        "bank_seconds": round(bank_seconds, 1),
        "setting": setting(options),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, ziggurat)},
    }


def setting(options: argparse.Namespace) -> dict[str, Any]:
    """What all lines of one file have to agree in."""
    names = ("bank", "steps", "bank_steps", "bank_rows", "eval_rows", "batch", "lr", "r")
    return {"model": Path(options.model).name, **{name: getattr(options, name) for name in names}}


def clock(options: argparse.Namespace) -> float:
    """Seconds of the processor, which don't depend on what else runs; on a GPU of the clock."""
    return time.process_time() if options.device == "cpu" else time.perf_counter()


def stored(encoder: Any, on: Path | None) -> int:
    """Bytes of the weights that a new task adds; with a bank those of its own small file."""
    if not isinstance(encoder, peft.PeftModel):
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        encoder.save_pretrained(scratch)
        if on is None:
            return (Path(scratch) / WEIGHTS).stat().st_size
        copy = Path(scratch) / "set"
        ziggurat.add_tenants(copy, {"old": on})
        return ziggurat.add_tenants(copy, {"new": scratch})["new"]


@torch.no_grad()
def score(options: argparse.Namespace, model: Heads, task: str, part: glue.Split) -> float:
    model.eval()
    outputs = []
    for batch, _ in part.batches(torch.arange(len(part.labels)), 4 * options.batch):
        logits = model(task, batch)
        outputs.append(logits.squeeze(-1) if glue.TASKS[task].labels == 1 else logits.argmax(-1))
    return glue.METRICS[glue.TASKS[task].metrics[0]](torch.cat(outputs).cpu().numpy(), part.labels.cpu().numpy())


def rate_of(line: dict[str, Any]) -> float:
    return line.get("rate", line["setting"]["lr"])


def best_rates(lines: list[dict[str, Any]], rows: int) -> dict[str, tuple[float, int]]:
    """Arm -> its best rate, and how many were tried, by the mean over the tasks of the first seed's `tuning`."""
    best = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        of_arm = [line for line in lines if line["arm"] == arm]
        tuned: dict[float, list[float]] = {}
        for line in of_arm:
            if line["rows"] == rows and line["seed"] == lines[0]["seed"] and line.get("tuning") is not None:
                tuned.setdefault(rate_of(line), []).append(line["tuning"])
        rate = max(tuned, key=lambda rate: statistics.mean(tuned[rate]), default=rate_of(of_arm[0]))
        best[arm] = (rate, max(1, len(tuned)))
    return best


def page(lines: list[dict[str, Any]], tuned_on: int) -> str:
    """The setting; scores, parameters, bytes and seconds of each arm; the private tiers' lead over the other arms."""
    best = best_rates(lines, tuned_on)
    lines = [line for line in lines if rate_of(line) == best[line["arm"]][0]]
    of_bank = [line["bank_seconds"] for line in lines if line["bank_seconds"]]
    places = list(dict.fromkeys((line["task"], line["rows"]) for line in lines))
    places.sort(key=lambda place: place[0])
    score_at = {(x["arm"], x["task"], x["rows"], x["seed"]): 100 * x["score"] for x in lines}
    arms_run = list(dict.fromkeys(line["arm"] for line in lines))
    seeds = sorted({line["seed"] for line in lines})
    head = " | ".join(f"{task} {rows}" for task, rows in places)
    text = [", ".join(f"{name} {value}" for name, value in lines[0]["setting"].items()), ""]
    text += [f"Seconds to train a bank: {statistics.mean(of_bank):.0f}.", ""] if of_bank else []
    text += [f"| | parameters | bytes | seconds | rate (of) | {head} |", "|---|--:|--:|--:|--:|" + "--:|" * len(places)]
    for arm in arms_run:
        of_arm = [line for line in lines if line["arm"] == arm]
        cells = []
        for place in places:
            scores = [score_at[arm, *place, seed] for seed in seeds if (arm, *place, seed) in score_at]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.1f}{spread}" if scores else "")
        seconds = statistics.mean(line["seconds"] for line in of_arm)
        numbers = (
            f"{of_arm[0]['trained']:,} | {of_arm[0]['bytes']:,} | {seconds:.0f} | {best[arm][0]:g} ({best[arm][1]})"
        )
        text.append(f"| {arm} | {numbers} | {' | '.join(cells)} |")
    text += ["", "Private minus the others, paired by seed: mean (lowest to highest).", ""]
    text += [f"| | {head} |", "|---|" + "--:|" * len(places)]
    for arm in (arm for arm in arms_run if arm != "private"):
        cells = []
        for place in places:
            both = [s for s in seeds if (arm, *place, s) in score_at and ("private", *place, s) in score_at]
            gaps = [score_at["private", *place, s] - score_at[arm, *place, s] for s in both]
            cells.append(f"{statistics.mean(gaps):+.1f} ({min(gaps):+.1f} to {max(gaps):+.1f})" if gaps else "")
        text.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON lines, added to")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--data", help="folder with one folder a task: train.parquet and validation.parquet")
    parser.add_argument("--work", help="folder for the banks")
    parser.add_argument("--bank", nargs="+", default=["stsb", "qnli", "cola"], choices=glue.TASKS)
    parser.add_argument("--new", nargs="+", default=["mrpc", "sst2"], choices=glue.TASKS)
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--r", type=int, default=8, help="rank of the global tier; mid and layer have a half and a quarter"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--bank-steps", type=int, default=200, help="each with a batch of every task of the bank")
    parser.add_argument("--bank-rows", type=int, help="rows of each of the bank's tasks (default: all)")
    parser.add_argument("--eval-rows", type=int, help="rows of the validation split (default: all)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--arms", nargs="+", help="instead of all")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the bank")
    parser.add_argument("--rates", nargs="+", type=float, help="of the new tasks (default: --lr)")
    parser.add_argument("--tune-on", type=int, default=256, help="rows with which an arm's best rate is chosen")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run_once(
    options: argparse.Namespace, task: str, rows: int, arm: str, seed: int, rate: float, *, tuning: bool = False
) -> None:
    """Add the line of a run to --out, if it isn't there; with `tuning`, if none with a score on the tuning rows is."""
    key = (task, rows, arm, seed, rate)
    for line in glue.held(options.out):
        same = (line["task"], line["rows"], line["arm"], line["seed"], rate_of(line)) == key
        if same and not (tuning and line.get("tuning") is None):
            return
    line = run(options, *key)
    with options.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(*key, f"{line['score']:.4f}", line["seconds"], "s", flush=True)


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if not options.table:
        if not (options.model and options.data and options.work):
            parser.error("--model, --data and --work are needed")
        if len(options.bank) < 2 or set(options.bank) & set(options.new):
            parser.error("--bank has two tasks or more, and none of --new")
        transformers.logging.set_verbosity_error()
        lines = glue.held(options.out)
        if any(line["setting"] != setting(options) for line in lines):
            parser.error(f"{options.out} holds runs of other options ({lines[0]['setting']}): name another file")
        todo = options.arms or arms(options)
        rates = options.rates or [options.lr]
        if len(rates) > 1:
            for task, arm, rate in product(options.new, todo, rates):
                run_once(options, task, options.tune_on, arm, options.seeds[0], rate, tuning=True)
            best = best_rates(glue.held(options.out), options.tune_on)
        for seed, rows, task, arm in product(options.seeds, options.rows, options.new, todo):
            run_once(options, task, rows, arm, seed, best[arm][0] if len(rates) > 1 else rates[0])
    if not (lines := glue.held(options.out)):
        parser.error(f"{options.out} holds no runs")
    print(page(lines, options.tune_on))


if __name__ == "__main__":
    main()
