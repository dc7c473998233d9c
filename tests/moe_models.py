"""Small mixtures of experts, as transformers lays them out."""

from typing import Any

import torch
import transformers
from torch import nn

_SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "head_dim": 8},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3Config", {**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "deepseek_v2": ("DeepseekV2Config", _DEEPSEEK),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
}
ALL_MIXTURES = list(_CONFIGS)
#: One of each layout.
MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3"]
#: The parameters of all experts, as target_parameters names them.
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
#: The weight of the router, as target_parameters names it.
ROUTERS = {name: "router.weight" if name in ("gpt_oss", "granitemoe") else "gate.weight" for name in _CONFIGS}


def mixture(name: str, **fields: Any) -> nn.Module:
    """A small model of the architecture, in evaluation, the same at every call."""
    kind, more = _CONFIGS[name]
    config = getattr(transformers, kind)(**{**_SIZES, **more, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in (
            () if next(model.parameters()).is_meta else model.parameters()
        ):  # routers and biases of some begin at zero
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter == 1))
    return model


def tokens() -> dict[str, torch.Tensor]:
    """Two texts of nine tokens."""
    return {"input_ids": torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))}
