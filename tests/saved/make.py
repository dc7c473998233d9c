"""Write the saved adapters that test_saved_adapters.py loads: run once, by the code whose files must stay readable.

    PYTHONPATH=src:tests python tests/saved/make.py

`bases/<name>` is a tiny model as transformers saves it; `adapters/<case>` an adapter of it as this version saves it,
with `expected.safetensors`: the inputs, and the outputs that the model gives for them with the adapter. A case that is
there already is left alone: new formats get new cases, and the old ones stay what they are.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ziggurat import AdapterDropConfig, DyLoRAConfig, LoR2CConfig, LoRA2Config, MSPLoraConfig
from zoo import ZOO

HERE = Path(__file__).parent
BASES, ADAPTERS = HERE / "bases", HERE / "adapters"


@dataclass(frozen=True)
class Case:
    """`config` on the zoo's model `base`. `train` takes some steps; `save` writes it another way than PEFT's."""

    base: str
    config: PeftConfig
    train: Callable[[nn.Module, dict[str, Tensor]], None] | None = None
    by_transformers: bool = False
    dtype: torch.dtype = torch.float32
    get: dict[str, Any] = field(default_factory=dict)


def fill(model: nn.Module, seed: int) -> None:
    """Move every trainable parameter away from its initial values, where an adapter changes nothing."""
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.tensor(random.standard_normal(parameter.shape) * 0.15, dtype=parameter.dtype))


def _learn(model: nn.Module, inputs: dict[str, Tensor], step: Callable[[Any, int], object]) -> None:
    """Six optimiser steps on the inputs, with what the method does before or after each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for number in range(6):
        optimizer.zero_grad()
        model(**inputs)[0].pow(2).mean().backward()
        step(optimizer, number)
        optimizer.step()
    model.eval()


def restructured(model: Any, inputs: dict[str, Tensor]) -> None:
    """LoR2C's merges and injections, both due within the first six of 20 steps."""
    _learn(model, inputs, lambda optimizer, number: model.restructure(number, 20, optimizer))
    fill(model, 1)


def pruned(model: Any, inputs: dict[str, Tensor]) -> None:
    """LoRA² pruned to its target."""
    _learn(model, inputs, lambda optimizer, number: model.prune(number + 1, 6))


def compacted(model: Any, inputs: dict[str, Tensor]) -> None:
    """LoRA² pruned, and written without the directions that are gone."""
    pruned(model, inputs)
    model.compact()


_PRUNE: dict[str, Any] = {"initial_warmup": 1, "final_warmup": 1, "mask_interval": 1}
_TIERS = [
    {"name": "global", "groups": 1, "r": 4},
    {"name": "half", "groups": 2, "r": 3},
    {"name": "layer", "groups": "layers", "r": 1, "lora_alpha": 4},
]

CASES: dict[str, Case] = {
    "msplora-encoder-with-head": Case(
        "bert", MSPLoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    ),
    "msplora-rank-pattern": Case(
        "llama",
        MSPLoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"self_attn.v_proj": [6, 3, 1]},
            even_scales=True,
            task_type="CAUSAL_LM",
        ),
    ),
    "msplora-stages": Case(
        "roberta",
        MSPLoraConfig(r=4, target_modules=["query", "value"], train_in_stages=True, bias="all", task_type="SEQ_CLS"),
    ),
    "msplora-encoder-decoder": Case(
        "t5", MSPLoraConfig(r=4, target_modules=["q", "v"], num_groups=2, task_type="SEQ_2_SEQ_LM")
    ),
    "msplora-two-stacks": Case("clip", MSPLoraConfig(tiers=_TIERS, target_modules=["q_proj", "v_proj"])),
    "msplora-some-layers": Case(
        "llama",
        MSPLoraConfig(
            ranks=[4, 2, 2],
            group_starts=[0, 1],
            target_modules=["q_proj"],
            layers_to_transform=[1, 2, 3],
            use_rslora=True,
            modules_to_save=["lm_head"],
            task_type="CAUSAL_LM",
        ),
    ),
    "msplora-fused-projection": Case(
        "gpt2", MSPLoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    ),
    "msplora-by-transformers": Case(
        "llama", MSPLoraConfig(r=4, target_modules=["q_proj", "v_proj"]), by_transformers=True
    ),
    "msplora-bfloat16": Case(
        "llama",
        MSPLoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        dtype=torch.bfloat16,
        get={"autocast_adapter_dtype": False},
    ),
    "lora2-encoder-with-head": Case(
        "bert", LoRA2Config(r=4, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    ),
    "lora2-pruned": Case(
        "llama",
        LoRA2Config(r=4, target_rank=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **_PRUNE),
        pruned,
    ),
    "lora2-compact": Case(
        "roberta",
        LoRA2Config(r=4, target_rank=1, outer_rank=5, target_modules=["query", "value"], task_type="SEQ_CLS", **_PRUNE),
        compacted,
    ),
    "lora2-encoder-decoder": Case("t5", LoRA2Config(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
    "lora2-by-transformers": Case("llama", LoRA2Config(r=4, target_modules=["q_proj"]), by_transformers=True),
    "lor2c-encoder-with-head": Case("bert", LoR2CConfig(r=4, task_type="SEQ_CLS")),
    "lor2c-share": Case("llama", LoR2CConfig(r=4, share=True, task_type="CAUSAL_LM")),
    "lor2c-spans": Case("llama", LoR2CConfig(r=4, spans=[[0, 1], [2, 2]], use_rslora=True, task_type="CAUSAL_LM")),
    "lor2c-injected-layers": Case(
        "roberta", LoR2CConfig(r=4, spans=[[0, 0], [2, 3]], injected_layers=[1], inject_r=3, task_type="SEQ_CLS")
    ),
    "lor2c-merged-and-injected": Case(
        "roberta", LoR2CConfig(r=4, merges=1, injections=1, task_type="SEQ_CLS"), restructured
    ),
    "lor2c-merged-shared": Case(
        "llama", LoR2CConfig(r=4, merges=2, share=True, keep="richer", task_type="CAUSAL_LM"), restructured
    ),
    "lor2c-encoder-decoder": Case(
        "t5", LoR2CConfig(r=4, spans={"decoder.block": [[0, 2], [3, 3]]}, task_type="SEQ_2_SEQ_LM")
    ),
    "dylora-decoder": Case("llama", DyLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
    "dylora-cut": Case(
        "bert", DyLoRAConfig(r=4, inference_rank=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    ),
    "adapterdrop-pfeiffer": Case("bert", AdapterDropConfig(r=4, drop_layers=1, task_type="SEQ_CLS")),
    "adapterdrop-houlsby": Case(
        "llama",
        AdapterDropConfig(r=3, target_modules=["o_proj", "down_proj"], activation="gelu", task_type="CAUSAL_LM"),
    ),
}


def base(name: str) -> Any:
    """The tiny model called `name`, as it lies in `bases`; written there when it isn't."""
    import transformers

    folder = BASES / name
    if not folder.exists():
        model: Any = ZOO[name].build()
        fill(model, 2)
        model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model gives, computed in float32 whatever its weights are kept in, so that processors agree."""
    with torch.no_grad():
        return model.float()(**inputs)[0]


def write(name: str, case: Case) -> None:
    folder, inputs = ADAPTERS / name, ZOO[case.base].inputs()
    torch.manual_seed(0)
    model = base(case.base).to(case.dtype)
    if case.by_transformers:
        model.add_adapter(case.config)
    else:
        model = get_peft_model(model, case.config, **case.get)
    fill(model, 0)
    if case.train is not None:
        case.train(model, inputs)
    model.eval()
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = f"bases/{case.base}"
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for beside in ("README.md", "lor2c_events.svg"):
        (folder / beside).unlink(missing_ok=True)
    given = {f"input.{key}": value.contiguous() for key, value in inputs.items()}
    save_file(given | {"output": outputs(model, inputs).contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for name, case in CASES.items():
        if not (ADAPTERS / name).exists():
            write(name, case)
