"""The model card of an exported adapter."""

import json
from typing import Any

from torch import nn

from ziggurat.host.method import kind_of


def card(model: nn.Module, config: Any, rank: int, serving: bool, of_experts: bool, only_for_vllm: bool) -> str:
    """`of_experts`: parameters with all experts of a layer are adapted, under names that llama.cpp doesn't know, and
    with `only_for_vllm` PEFT neither."""
    method = kind_of(config)
    base = config.base_model_name_or_path or "the base model"
    load = "Load it with\n`peft.PeftModel.from_pretrained`; no other package is needed."
    owner, name = type(model).__module__, type(model).__qualname__
    if owner.partition(".")[0] == "ziggurat":
        load = f"Load it with\n`peft.PeftModel.from_pretrained` on a `{owner}.{name}`, whose head no other package has."
    if only_for_vllm:
        load = "It is\nfor vLLM alone: PEFT finds no experts under its names, and would leave them out."
    serve = (
        f"""
All modules have rank {rank} and lora_alpha {rank}, so that every reader scales them alike. vLLM: `--enable-lora
--max-lora-rank {rank}`.{"" if of_experts else " llama.cpp: convert_lora_to_gguf.py."}
"""
        if serving
        else ""
    )
    return f"""---
library_name: peft
base_model: {json.dumps(str(base))}
tags: [lora]
---

A plain LoRA adapter for {base}, exported exactly from an adapter of the method {method}. {load}
{serve}"""
