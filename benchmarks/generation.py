"""Token-by-token generation with an adapter that isn't merged, against the bare model and PEFT's LoRA.

    python benchmarks/generation.py [rounds]

A Llama of SmolLM2-135M's widths and eight layers, random weights, float32, one thread; 32 tokens after a prompt of one.
The ways take turns in one process, in a random order; told are medians and quartiles of
ratios within a round of processor time. "as it is called" is `model.generate`; "forward alone" is a loop of one's own,
in which nothing is known about factors that may change from one call to the next.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ziggurat import LoRA2Config, MSPLoraConfig

TOKENS = 32
TARGETS = {
    "q v": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def llama_decoder() -> LlamaForCausalLM:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=3, **sizes))  # type: ignore[arg-type]


def generated(model: Any) -> None:
    model.generate(
        input_ids=torch.tensor([[1]]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
    )


@torch.no_grad()
def forwards(model: Any) -> None:
    cache = None
    for _ in range(TOKENS):
        cache = model(input_ids=torch.tensor([[1]]), past_key_values=cache, use_cache=True).past_key_values


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    for place, targets in TARGETS.items():
        configs = {
            "PEFT LoRA r 8": LoraConfig(r=8, target_modules=targets, init_lora_weights=False),
            "MSPLoRA r 8": MSPLoraConfig(r=8, target_modules=targets, init_weights=False),
            "LoRA² r 8": LoRA2Config(r=8, target_modules=targets, init_weights=False),
        }
        for config in configs.values():
            config.task_type = "CAUSAL_LM"  # type: ignore[assignment]
        models = {"bare": llama_decoder()}
        models |= {name: get_peft_model(llama_decoder(), config) for name, config in configs.items()}  # type: ignore
        for way, run in {"as it is called": generated, "forward alone": forwards}.items():
            compare(f"{place}, {way}", {name: partial(run, model.eval()) for name, model in models.items()}, rounds)


def compare(title: str, runs: dict[str, Callable[[], None]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            begin = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - begin)
    print(f"\n{title}, {rounds} rounds\n\n| | time / bare (quartiles) |\n|---|--:|")
    for name in runs:
        low, median, high = statistics.quantiles(
            [a / b for a, b in zip(seconds[name], seconds["bare"], strict=True)], n=4
        )
        print(f"| {name} | {median:.3f} ({low:.3f} to {high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
