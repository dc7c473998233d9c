"""What the benchmarks of whole models share: bases, adapters on them, and steps timed in turns.

Every way runs in one process, in turns, in a random order each round. What is told are medians and quartiles of
*ratios within a round* of processor time: a busy machine disturbs both sides of a ratio alike. One thread,
because processor time of several counts waiting. All ways share the frozen weights' memory.
"""

import copy
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from ziggurat import LoR2CConfig, LoRA2Config, MSPLoraConfig
from ziggurat.lowrank.remade import unchanged
from ziggurat.methods.lora2.pruning import prune

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

#: AdaLoRA's and LoRA²'s schedules need the length of a run: the steps timed lie in its middle, where both prune.
RUN = 1_000_000


def roberta(layers: int, width: int = 768, own_dropout: bool = True) -> nn.Module:
    """RoBERTa-base's shapes, random numbers, with its own dropout of 0.1 or without."""
    p = 0.1 if own_dropout else 0.0
    config = RobertaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        max_position_embeddings=1100,
    )
    return RobertaForSequenceClassification(config)


def dry_roberta(layers: int) -> nn.Module:
    """The same without its own dropout."""
    return roberta(layers, own_dropout=False)


def llama(layers: int = 8, width: int = 576, heads: int = 9, kv_heads: int = 3, inner: int = 1536) -> nn.Module:
    """A small Llama with SmolLM2-135M's widths, random numbers."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        pad_token_id=0,
        max_position_embeddings=1100,
    )
    return LlamaForSequenceClassification(config)


def adapters(targets: list[str], p: float, r: int = 8) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Name -> what puts that adapter into a model. VeRA with its default rank, the others with r or as named."""
    from peft import LilyConfig, VeraConfig  # not in every PEFT that the steps alone work with

    def by(config: object) -> Callable[[nn.Module], nn.Module]:
        return lambda model: get_peft_model(model, config)  # type: ignore[arg-type]

    lora = {"target_modules": targets, "lora_dropout": p}
    wide = r + r // 2 + r // 4
    return {
        f"MSPLoRA r {r}": by(MSPLoraConfig(r=r, **lora)),
        f"LoR2C r {r}": by(LoR2CConfig(r=r, lora_dropout=p)),
        f"LoRA² r {r}": by(LoRA2Config(r=r, **lora)),
        f"PEFT LoRA r {r}": by(LoraConfig(r=r, **lora)),
        f"PEFT LoRA r {wide}": by(LoraConfig(r=wide, **lora)),
        "PEFT AdaLoRA": by(AdaLoraConfig(init_r=r + r // 2, target_r=r, tinit=1, tfinal=1, total_step=RUN, **lora)),
        "PEFT Lily": by(LilyConfig(r=r, target_modules=targets)),
        "PEFT VeRA": by(VeraConfig(target_modules=targets, vera_dropout=p)),
        "PEFT DoRA": by(LoraConfig(r=r, use_dora=True, **lora)),
    }


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the model with the very same parameters, frozen."""
    kept = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, kept).requires_grad_(False)


class Step:
    """One training step: forward, backward, fused AdamW on what trains, and what the method does after it.

    The embeddings' output asks for a gradient in every way, the frozen model's too: a fair frozen step
    passes gradients through all of its layers, as an adapter needs them. With `autocast`, the forward runs under it.
    """

    def __init__(
        self,
        base: nn.Module,
        adapt: Callable[[nn.Module], nn.Module] | None,
        batch: Mapping[str, Tensor],
        autocast: torch.dtype | None = None,
    ):
        torch.manual_seed(0)
        self.base = sharing(base)
        self.base.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        self.model = (adapt(self.base) if adapt else self.base).train()
        self.batch, self.autocast, self.number = batch, autocast, RUN // 2
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in learning)
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True) if learning else None

    def loss(self) -> Tensor:
        device = self.batch["input_ids"].device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            return self.model(**self.batch).loss

    def __call__(self) -> None:
        self.loss().backward()
        if self.optimizer is None:
            return
        self.number += 1
        self.optimizer.step()
        kind = type(next(iter(self.model.peft_config.values())))
        if kind is LoRA2Config:
            prune(self.model, self.number, RUN, "default")
        if kind is AdaLoraConfig:
            self.model.base_model.update_and_allocate(self.number)
        self.optimizer.zero_grad()

    def saved(self) -> int:
        """Bytes autograd keeps for a backward, each storage once; parameters and buffers don't count."""
        fixed = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, unchanged):
            alive = self.loss()
        del alive
        return sum(size for at, size in kept.items() if at not in fixed)


def batch(sequences: int, tokens: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(5, 1000, (sequences, tokens)), "labels": torch.arange(sequences) % 2}


def times(ways: Mapping[str, Callable[[], object]], limit_s: float, least: int = 3) -> dict[str, list[float]]:
    """Seconds of processor time of each way in each round; rounds until `limit_s` of wall time is over."""
    clock = time.process_time
    for run in ways.values():
        run()
    took: dict[str, list[float]] = {name: [] for name in ways}
    order, end = list(ways), time.perf_counter() + limit_s
    while time.perf_counter() < end or len(took[order[0]]) < least:
        random.shuffle(order)
        for name in order:
            begin = clock()
            ways[name]()
            took[name].append(clock() - begin)
    return took


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of ratios within a round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(of: Sequence[float], to: Sequence[float]) -> Ratio:
    low, median, high = statistics.quantiles([a / b for a, b in zip(of, to, strict=True)], n=4, method="inclusive")
    return Ratio(median, low, high)


def head(note: str = "") -> str:
    """The versions and the machine, as a line under a table's title."""
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, PEFT {peft.__version__}, transformers {transformers.__version__}"
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg()) if sys.platform != "win32" else "unknown"
    where = f"{platform.machine()}, {os.cpu_count()} cores, load {load}"
    return f"{time.strftime('%Y-%m-%d')}, {versions}, one thread, {where}. {note}".strip()
