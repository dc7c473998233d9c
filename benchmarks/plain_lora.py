"""An adapter as plain LoRA in memory (`ziggurat.plain_lora`), against merging it, taking all weights, and unmerging.

    python benchmarks/plain_lora.py [rounds]

A Llama of random weights in bfloat16, MSPLoRA r 16 on all linear layers. The ways take turns in one process.
"""

import statistics
import sys
import time

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ziggurat import MSPLoraConfig, plain_lora

RANK = 32
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12}


def merged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a trainer sends that knows no adapters: the base's weights with the update in them."""
    model.merge_adapter()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "msplora_" not in name}
    model.unmerge_adapter()
    return weights


def main() -> None:
    torch.set_num_threads(1)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=8000, **SIZES)).to(torch.bfloat16)
    model = get_peft_model(base, MSPLoraConfig(r=16, target_modules="all-linear", init_weights=False))
    ways = {"plain_lora": lambda: plain_lora(model, RANK).tensors, "merge": lambda: merged(model)}
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            tensors = way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
            sizes[name] = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    for name, taken in seconds.items():
        print(f"{name}: {statistics.median(taken):.3f} s, {sizes[name]:.0f} MiB")
    ratios = [a / b for a, b in zip(seconds["plain_lora"], seconds["merge"], strict=True)]
    print(f"plain_lora / merge, median of {rounds} rounds: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
