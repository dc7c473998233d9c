"""Does a bank help a new task with few rows? Private tiers on a bank of other tasks, a fresh pyramid, fresh LoRA.

    python benchmarks/tenants.py --model DIR --data DIR --work DIR --out tenants.jsonl --tasks rte mrpc stsb cola

For each new task and seed an MSPLoRA bank is trained on the other tasks together (`ziggurat.share`), and kept in
--work. Then the new task learns from --rows of its rows, for as many steps each: `private`, only the layer tier on the
frozen bank; `msplora`, a fresh pyramid of the same ranks; `lora:N`, a fresh LoRA of as many parameters as the private
tier, as the pyramid, and of rank --r; `head`, no adapter. All have a fresh head, which no count holds. Scores
are those after the last step, on the validation split; bytes are those of the weights that a new task adds. What --out
holds already is not run again; --table prints it and runs nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
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


def fit(options: argparse.Namespace, model: Heads, splits: dict[str, glue.Split], steps: int, seed: int) -> None:
    """Each step takes a batch of every task."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.lr, weight_decay=0.01)
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


def bank(options: argparse.Namespace, new: str, seed: int) -> tuple[Path, float]:
    """The set trained on all tasks but `new`, and the seconds that it took."""
    others = [task for task in options.tasks if task != new]
    folder = Path(options.work) / f"{'-'.join(others)}-r{options.r}-{options.bank_steps}-{seed}"
    note = folder.with_suffix(".json")
    if not note.is_file():
        torch.manual_seed(seed)
        model = Heads(options, others)
        model.encoder = peft.get_peft_model(model.encoder, pyramid(options), others[0])
        for task in others[1:]:
            model.encoder.add_adapter(task, pyramid(options))
        ziggurat.share(model.encoder, others)
        splits = {t: split(options, t, drawn(table_of(options, t, "train"), options.bank_rows, seed)) for t in others}
        begun = time.perf_counter()
        fit(options, model.to(options.device), splits, options.bank_steps, seed)
        seconds = time.perf_counter() - begun
        folder.parent.mkdir(parents=True, exist_ok=True)
        ziggurat.save_tenants(model.encoder, folder)
        note.write_text(json.dumps({"seconds": seconds}))
    return folder / others[0], json.loads(note.read_text())["seconds"]


def arms(options: argparse.Namespace) -> list[str]:
    """The LoRAs have as many parameters as the private tier, as the pyramid, and rank r."""
    model = transformers.AutoModel.from_pretrained(options.model)
    one = ziggurat.DyLoRAConfig(r=1, target_modules=glue.QUERY_VALUE)
    unit = count(peft.get_peft_model(model, one))
    fresh = peft.get_peft_model(transformers.AutoModel.from_pretrained(options.model), pyramid(options))
    private = sum(p.numel() for n, p in fresh.named_parameters() if n.endswith("_layer"))
    ranks = sorted({max(1, round(private / unit)), max(1, round(count(fresh) / unit)), options.r})
    return ["private", "msplora", *(f"lora:{rank}" for rank in ranks), "head"]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def run(options: argparse.Namespace, task: str, rows: int, arm: str, seed: int) -> dict[str, Any]:
    on, bank_seconds = bank(options, task, seed) if arm == "private" else (None, 0.0)
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
    begun = time.perf_counter()
    fit(options, model.to(options.device), {task: train}, options.steps, seed)
    seconds = time.perf_counter() - begun
    validation = split(options, task, drawn(table_of(options, task, "validation"), options.eval_rows, 0))
    return {
        "task": task,
        "rows": rows,
        "arm": arm,
        "seed": seed,
        "score": score(options, model, task, validation),
        "trained": trained,
        "bytes": stored(model.encoder, on),
        "seconds": round(seconds, 1),
        "bank_seconds": round(bank_seconds, 1),
        "setting": {name: getattr(options, name) for name in ("steps", "bank_steps", "bank_rows", "batch", "lr", "r")}
        | {"model": Path(options.model).name, "bank": [t for t in options.tasks if t != task]},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, ziggurat)},
    }


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


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds by task and rows; parameters, bytes and seconds of each arm."""
    tasks, rows = (list(dict.fromkeys(line[key] for line in lines)) for key in ("task", "rows"))
    columns = [(task, number) for task in tasks for number in rows]
    head = " | ".join(f"{task} {number}" for task, number in columns)
    text = [f"| | parameters | bytes | seconds | {head} |", "|---|--:|--:|--:|" + "--:|" * len(columns)]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        of_arm = [line for line in lines if line["arm"] == arm]
        cells = []
        for task, number in columns:
            scores = [100 * x["score"] for x in of_arm if (x["task"], x["rows"]) == (task, number)]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{statistics.mean(scores):.1f} ± {spread:.1f}" if scores else "")
        seconds = statistics.mean(x["seconds"] for x in of_arm)
        numbers = f"{of_arm[0]['trained']:,} | {of_arm[0]['bytes']:,} | {seconds:.0f}"
        text.append(f"| {arm} | {numbers} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON lines, added to")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--data", help="folder with one folder a task: train.parquet and validation.parquet")
    parser.add_argument("--work", help="folder for the banks")
    parser.add_argument("--tasks", nargs="+", default=["rte", "mrpc", "stsb", "cola", "sst2"], choices=glue.TASKS)
    parser.add_argument("--new", nargs="+", choices=glue.TASKS, help="new tasks (default: each of --tasks)")
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 256, 1024])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--r", type=int, default=8, help="rank of the global tier; mid and layer have a half and a quarter"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bank-steps", type=int, default=400, help="each with a batch of every task")
    parser.add_argument("--bank-rows", type=int, help="rows of each of the bank's tasks (default: all)")
    parser.add_argument("--eval-rows", type=int, help="rows of the validation split (default: all)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not options.table:
        if not (options.model and options.data and options.work):
            parser.error("--model, --data and --work are needed")
        transformers.logging.set_verbosity_error()
        done = {(x["task"], x["rows"], x["arm"], x["seed"]) for x in glue.held(options.out)}
        names = arms(options)
        for seed in options.seeds:
            for task in options.new or options.tasks:
                for key in ((task, rows, arm, seed) for rows in options.rows for arm in names):
                    if key not in done:
                        line = run(options, *key)
                        with options.out.open("a") as file:
                            file.write(json.dumps(line) + "\n")
                        print(*key, f"{line['score']:.4f}", line["seconds"], "s", flush=True)
    print(table(glue.held(options.out)))


if __name__ == "__main__":
    main()
