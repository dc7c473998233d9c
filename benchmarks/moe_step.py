"""A training step of a mixture of experts: MSPLoRA and LoRA on its experts, in one process, measured in turn.

python benchmarks/moe_step.py [--experts 32] [--rounds 5] [--threads 1]

Each row is one model with one adapter on experts.gate_up_proj and experts.down_proj. In every round each takes a step
(forward, backward), one after the other; a ratio is the median over the rounds of the step's time over that of the
frozen model's forward and backward to its embeddings in the same round. Saved: what autograd keeps between forward and
backward, beside parameters. File: the parameters of the adapter, in float32.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ziggurat import MSPLoraConfig
from ziggurat.plan.memory import saved_bytes

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
PRIVATE = [{"name": "expert", "groups": "layers", "expert_groups": "experts", "r": 8}]
CONFIGS: dict[str, Any] = {
    "frozen": None,
    "LoRA r 8": lambda: LoraConfig(r=8, target_parameters=EXPERTS, target_modules=[]),
    "an expert tier alone, r 8": lambda: MSPLoraConfig(tiers=PRIVATE, target_parameters=EXPERTS),
    "MSPLoRA r 8": lambda: MSPLoraConfig(r=8, target_parameters=EXPERTS),
}


def mixture(experts: int) -> nn.Module:
    """Two layers of the proportions of Qwen3-30B-A3B, a quarter as wide."""
    sizes: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": experts, "num_experts_per_tok": 8}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=1000, **sizes, **heads))


def step(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Seconds of a forward and its backward."""
    begin = time.perf_counter()
    model(**inputs).loss.backward()
    seconds = time.perf_counter() - begin
    model.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("experts", 32), ("rounds", 5), ("threads", 1), ("batch", 4), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(0, 1000, (options.batch, options.length))
    inputs = {"input_ids": tokens, "labels": tokens}
    models: dict[str, nn.Module] = {}
    for name, config in CONFIGS.items():
        model = mixture(options.experts).requires_grad_(False)
        if config is not None:
            model = get_peft_model(model, config())  # type: ignore[arg-type]
        # So that every row goes all the way down, as with adapters of attention.
        model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
        models[name] = model.train()
        step(model, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            seconds[name].append(step(model, inputs))
    frozen = seconds["frozen"]
    print(f"{options.experts} experts, {options.batch} x {options.length} tokens, {options.rounds} rounds\n")
    print("| adapter | step | saved, MiB | trainable parameters | file, MiB |\n|---|--:|--:|--:|--:|")
    for name, model in models.items():
        ratio = median(second / base for second, base in zip(seconds[name], frozen, strict=True))
        saved = saved_bytes(model, inputs) / 2**20
        count = sum(p.numel() for path, p in model.named_parameters() if "lora_" in path)
        print(f"| {name} | {ratio:.2f} | {saved:.0f} | {count:,} | {4 * count / 2**20:.1f} |")


if __name__ == "__main__":
    main()
