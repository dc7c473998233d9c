"""Adaptation methods side by side on GLUE tasks: same data, seeds, batches and head; scores as JSON lines and a table.

    python benchmarks/methods_on_glue.py --model DIR --data DIR --out scores.jsonl --workers 8 \
        --methods lora:r=8 adalora:r=8 lora2:r=8,target_rank=4 --tasks rte mrpc stsb cola --seeds 0 1 2 3 4

A method is `name[:field=value,...]`: the fields are those of its PEFT config, and `lr`. `--data` holds one folder a
task with train.parquet and validation.parquet. Runs that `--out` holds already are not run again, so one file can be
filled by several calls; `--table` prints what it holds and runs nothing.

The score is that of the *last* epoch on the validation split, never the best one: choosing the epoch on the data that
is reported would favour whatever method swings most.
"""

import argparse
import ast
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import torch
import transformers
from scipy.stats import pearsonr, spearmanr, t
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import ziggurat

QUERY_VALUE = ["query", "value", "q", "v", "q_lin", "v_lin", "query_proj", "value_proj", "q_proj", "v_proj"]


@dataclass(frozen=True)
class Task:
    columns: tuple[str, ...]
    labels: int
    metrics: tuple[str, ...]
    epochs: int
    max_length: int = 128


TASKS = {
    "cola": Task(("sentence",), 2, ("matthews",), 8, 64),
    "sst2": Task(("sentence",), 2, ("accuracy",), 1, 64),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "f1"), 8),
    "stsb": Task(("sentence1", "sentence2"), 1, ("pearson", "spearman"), 6),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",), 15, 256),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",), 3, 256),
}
METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": lambda answers, right: float((answers == right).mean()),
    "f1": lambda answers, right: float(f1_score(right, answers)),
    "matthews": lambda answers, right: float(matthews_corrcoef(right, answers)),
    "pearson": lambda answers, right: float(pearsonr(right, answers).statistic),
    "spearman": lambda answers, right: float(spearmanr(right, answers).statistic),
}


@dataclass(frozen=True)
class Method:
    """A config class with the fields it is given, and what a method's own schedule has done at each step.

    `after_step(model, step, total, optimizer)` is called after each optimiser step (from 1), before gradients are
    cleared.
    """

    config: Callable[..., peft.PeftConfig]
    fields: Callable[[dict[str, Any], int], dict[str, Any]] = lambda given, total: given
    after_step: Callable[[Any, int, int, torch.optim.Optimizer], Any] | None = None


def _adalora_fields(given: dict[str, Any], total: int) -> dict[str, Any]:
    """`r` is the final rank; it starts at half as much again, with the same shares of the run as LoRA²'s defaults."""
    final = given.pop("r", 8)
    plan = {"init_r": -(-final * 3 // 2), "target_r": final, "tinit": round(0.15 * total), "tfinal": round(0.5 * total)}
    return {**plan, "deltaT": 10, "orth_reg_weight": 0.1, "total_step": total, **given}


def _ours(name: str) -> Callable[..., peft.PeftConfig]:
    return lambda **fields: getattr(ziggurat, name)(**fields)


def _without(config: Callable[..., peft.PeftConfig], *dropped: str, **renamed: str) -> Callable[..., peft.PeftConfig]:
    """`config` of a method that lacks some of the common fields, or calls them otherwise."""
    return lambda **fields: config(**{renamed.get(k, k): v for k, v in fields.items() if k not in dropped})


METHODS: dict[str, Method] = {
    "lora": Method(peft.LoraConfig),
    "adalora": Method(
        peft.AdaLoraConfig,
        _adalora_fields,
        lambda model, step, total, _: model.base_model.update_and_allocate(step - 1),
    ),
    "msplora": Method(_ours("MSPLoraConfig")),
    "lora2": Method(_ours("LoRA2Config"), after_step=lambda model, step, total, _: model.prune(step, total)),
    # What is due before step k (from 0) is done after k steps, as the Trainer's callback does it.
    "lor2c": Method(
        _ours("LoR2CConfig"), after_step=lambda model, step, total, optimizer: model.restructure(step, total, optimizer)
    ),
    "dora": Method(lambda **fields: peft.LoraConfig(use_dora=True, **fields)),
    "pissa": Method(lambda **fields: peft.LoraConfig(init_lora_weights="pissa_niter_4", **fields)),
    "vera": Method(_without(peft.VeraConfig, "lora_alpha", lora_dropout="vera_dropout")),
    "lily": Method(_without(peft.LilyConfig, "lora_alpha", "lora_dropout")),
}


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """`lora:r=8,lr=5e-4` -> ("lora", {"r": 8, "lr": 0.0005}). Lists are joined by `+`: target_modules=query+value."""
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        raise SystemExit(f"--methods {spec}: {name!r} is not one of {', '.join(METHODS)}")
    fields: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value.split("+") if "+" in value else value
    return name, fields


class Classifier(nn.Module):
    """An encoder with a head over the mean of its last states (or over the first token's).

    Two sentences go through the encoder one by one and are joined as [a, b, |a - b|, a * b] (`head` pair), or go
    through it together.
    """

    def __init__(self, folder: str, labels: int, head: str) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder)
        width = self.encoder.config.hidden_size
        self.pooling = head
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width * (4 if head == "pair" else 1), labels))

    def forward(self, batch: list[dict[str, Tensor]], labels: Tensor | None = None) -> SequenceClassifierOutput:
        pooled = [self.pool(part) for part in batch]
        if self.pooling == "pair":
            a, b = pooled
            pooled = [torch.cat([a, b, (a - b).abs(), a * b], dim=-1)]
        logits = self.head(pooled[0]).float()
        loss = None
        if labels is not None:
            few = nn.functional.mse_loss if logits.shape[-1] == 1 else nn.functional.cross_entropy
            loss = few(logits.squeeze(-1), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def pool(self, part: dict[str, Tensor]) -> Tensor:
        states = self.encoder(**part).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        mask = part["attention_mask"].unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


class Split:
    """One split, tokenised once and kept on the device."""

    def __init__(self, table: pd.DataFrame, task: Task, head: str, tokenizer: Any, device: torch.device) -> None:
        texts = [table[column].tolist() for column in task.columns]
        parts = [(column,) for column in texts] if head == "pair" else [tuple(texts)]
        self.parts, self.lengths = [], []
        for part in parts:
            tokens = tokenizer(*part, truncation=True, max_length=task.max_length, padding=True, return_tensors="pt")
            self.lengths.append(tokens["attention_mask"].sum(1))
            self.parts.append({name: tensor.to(device) for name, tensor in tokens.items()})
        dtype = torch.float32 if task.labels == 1 else torch.int64
        self.labels = torch.tensor(table["label"].tolist(), dtype=dtype, device=device)

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[list[dict[str, Tensor]], Tensor]]:
        """Batches of the examples in `order`, each cut to its longest text."""
        for rows in order.split(size):
            here = rows.to(self.labels.device)
            cut = [int(lengths[rows].max()) for lengths in self.lengths]
            batch = [{k: v[here, :n] for k, v in part.items()} for part, n in zip(self.parts, cut, strict=True)]
            yield batch, self.labels[here]


def read(folder: Path, holdout: float, rows: int | None) -> list[pd.DataFrame]:
    """Training and validation rows, the same for every seed. With `holdout`, both are of the training split.

    `rows` of the training split, drawn once, are learned from (all by default).
    """
    train = pd.read_parquet(folder / "train.parquet")
    if rows is not None:
        train = train.sample(n=min(rows, len(train)), random_state=1)
    if not holdout:
        return [train, pd.read_parquet(folder / "validation.parquet")]
    held_out = train.sample(frac=holdout, random_state=0)
    return [train.drop(held_out.index), held_out]


def run(options: argparse.Namespace, spec: str, task_name: str, seed: int) -> dict[str, Any]:
    """Train one method on one task from one seed; the line that goes into the file."""
    name, given = parse(spec)
    method, task = METHODS[name], TASKS[task_name]
    device = torch.device(options.device)
    head = options.head if options.head != "auto" else ("pair" if len(task.columns) == 2 else "mean")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    tables = read(Path(options.data) / task_name, options.holdout, options.train_rows)
    train, validation = (Split(table, task, head, tokenizer, device) for table in tables)
    epochs = options.epochs or task.epochs
    total = epochs * -(-len(train.labels) // options.batch)

    torch.manual_seed(seed)
    model: Any = Classifier(options.model, task.labels, head)
    lr = given.pop("lr", options.lr)
    fields = {"target_modules": options.targets or QUERY_VALUE, "lora_alpha": 16, "lora_dropout": 0.05, **given}
    config = method.config(**method.fields(fields, total), modules_to_save=["head"])
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, config).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    trainable = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "head" not in n)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=0.01, fused=device.type == "cuda")
    warmup = 0.06 * total
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(warmup, 1), (total - step) / (total - warmup))
    )
    shuffle = torch.Generator().manual_seed(seed)
    step, scores, start = 0, [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        for batch, labels in train.batches(torch.randperm(len(train.labels), generator=shuffle), options.batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                loss = model(batch=batch, labels=labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            scheduler.step()
            step += 1
            if method.after_step is not None:
                method.after_step(model, step, total, optimizer)
            optimizer.zero_grad()
        if epoch == epochs or not options.score_last:
            scores.append(score(model, validation, task, options))
    return {
        "method": spec,
        "task": task_name,
        "seed": seed,
        "score": scores[-1],
        "by_epoch": [s[task.metrics[0]] for s in scores],
        "trainable": trainable,
        "final": final_parameters(model, trainable),
        "steps": total,
        "seconds": round(time.perf_counter() - start, 1),
        "setting": {"model": Path(options.model).name, "head": head, "batch": options.batch, "lr": lr}
        | {
            "epochs": epochs,
            "train_rows": len(train.labels),
            "bf16": options.bf16,
            "targets": options.targets or "query, value",
        },
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, ziggurat)}
        | {"device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()},
    }


@torch.no_grad()
def score(model: Any, split: Split, task: Task, options: argparse.Namespace) -> dict[str, float]:
    model.eval()
    order = sum(split.lengths).argsort(descending=True)  # type: ignore[union-attr]
    answers = []
    for batch, _ in split.batches(order, 4 * options.batch):
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=options.bf16):
            logits = model(batch=batch).logits
        answers.append(logits.squeeze(-1) if task.labels == 1 else logits.argmax(-1))
    right = split.labels[order.to(split.labels.device)].cpu().numpy()
    return {name: METRICS[name](torch.cat(answers).cpu().numpy(), right) for name in task.metrics}


def final_parameters(model: Any, trainable: int) -> int:
    """How many adapter parameters are left once pruned directions are dropped."""
    if hasattr(model, "compact"):
        model.compact()
        return sum(p.numel() for n, p in model.named_parameters() if model.base_model.prefix in n)
    if isinstance(model.base_model, peft.AdaLoraModel):
        left = 0
        for layer in model.modules():
            if isinstance(layer, peft.tuners.adalora.AdaLoraLayer):
                kept = int(torch.count_nonzero(layer.lora_E["default"]))
                left += kept * (layer.in_features + layer.out_features + 1)
        return left
    return trainable


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds; below, each method's difference from the first, paired by seed."""
    methods, tasks = list(dict.fromkeys(x["method"] for x in lines)), list(dict.fromkeys(x["task"] for x in lines))
    main = {task: TASKS[task].metrics[0] for task in tasks}
    at = {(x["method"], x["task"], x["seed"]): 100 * x["score"][main[x["task"]]] for x in lines}
    seeds = sorted({x["seed"] for x in lines})
    head = " | ".join(f"{task} ({main[task]})" for task in tasks)
    rows = [f"| method | trained / final parameters | {head} | mean |", "|---|--:|" + "--:|" * (len(tasks) + 1)]
    for method in methods:
        of_method = [x for x in lines if x["method"] == method]
        trained, final = max(x["trainable"] for x in of_method), round(statistics.mean(x["final"] for x in of_method))
        cells = [[at[method, task, seed] for seed in seeds if (method, task, seed) in at] for task in tasks]
        texts = [
            f"{statistics.mean(c):.1f} ± {statistics.stdev(c) if len(c) > 1 else 0:.1f}" if c else "" for c in cells
        ]
        mean = f"{statistics.mean(map(statistics.mean, cells)):.2f}" if all(cells) else ""
        rows.append(f"| {method} | {trained:,} / {final:,} | {' | '.join(texts)} | {mean} |")
    rows += ["", f"Difference from `{methods[0]}`, paired by seed, with the half width of its 95% interval (t):", ""]
    rows += [f"| method | {' | '.join(tasks)} |", "|---|" + "--:|" * len(tasks)]
    for method in methods[1:]:
        cells = []
        for task in tasks:
            both = [s for s in seeds if (method, task, s) in at and (methods[0], task, s) in at]
            gaps = [at[method, task, s] - at[methods[0], task, s] for s in both]
            if len(gaps) < 2:
                cells.append("")
                continue
            half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / len(gaps) ** 0.5
            cells.append(f"{statistics.mean(gaps):+.1f} ± {half:.1f}")
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def held(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON lines, added to")
    parser.add_argument("--table", action="store_true", help="only print the table of --out")
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--data", help="folder with one folder a task")
    parser.add_argument("--methods", nargs="+", default=["lora:r=8"])
    parser.add_argument("--tasks", nargs="+", default=["rte"], choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, help="default: as each task's row says")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="for methods that don't give their own")
    parser.add_argument("--holdout", type=float, default=0.0, help="tune: score on this share of the training split")
    parser.add_argument("--train-rows", type=int, help="learn from this many rows (default: all)")
    parser.add_argument("--score-last", action="store_true", help="score after the last epoch only")
    parser.add_argument("--head", choices=["auto", "pair", "mean", "cls"], default="auto")
    parser.add_argument("--targets", nargs="+", help="default: queries and values")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.table:
        if not (options.model and options.data):
            parser.error("--model and --data are needed")
        if options.workers > 1:
            command = [sys.executable, *sys.argv]
            shares = [f"{i}/{options.workers}" for i in range(options.workers)]
            children = [subprocess.Popen([*command, "--workers", "1", "--share", share]) for share in shares]
            if sum(child.wait() != 0 for child in children):
                raise SystemExit("a worker failed; what is done is in the file, call again for the rest")
        else:
            work(options)
    if options.share == "0/1":
        print(table(held(options.out)))


def work(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    done = {(x["method"], x["task"], x["seed"]) for x in held(options.out)}
    todo = [(m, k, s) for s in options.seeds for k in options.tasks for m in options.methods if (m, k, s) not in done]
    index, number = map(int, options.share.split("/"))
    for spec, task, seed in todo[index::number]:
        line = run(options, spec, task, seed)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(spec, task, seed, {k: round(v, 4) for k, v in line["score"].items()}, line["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
