"""What an adapter holds: the effective pair of every linear, the tensors beside them; and whether its file has all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ziggurat.errors import ExportError
from ziggurat.host.bank import Bank
from ziggurat.host.folder import tensor_shapes
from ziggurat.host.linear import AdaptedLinear
from ziggurat.lowrank.pair import FactorPair

PREFIX = "base_model.model."


def lora_pairs(model: nn.Module, adapter: str = "default") -> dict[str, FactorPair]:
    """The effective pair of every linear that `adapter` adapts, by the linear's path in the base model.

    Raises:
        ExportError: the adapter has a part that no low-rank update of a weight can express; or it isn't there.
    """
    base = bare(model)
    pairs: dict[str, FactorPair] = {}
    for path, module in base.named_modules():
        if isinstance(module, AdaptedLinear):
            if adapter in module.adapters:
                a, b = module.effective_pair(adapter)
                pairs[path] = FactorPair(a.detach(), b.detach())
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, Bank):
            raise ExportError(f"{path}: {_refusal(model, module, adapter)}")
    if not pairs:
        names = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ExportError(f"adapter {adapter!r} adapts no linear of this model; its adapters: {names}.")
    return pairs


def other_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """What PEFT saves of the adapter beside the method's own factors: modules_to_save and biases.

    With bias="all" PEFT names the biases of modules_to_save twice, once by where they stand in the wrapper.
    """
    layers: dict[str, Any] = {path: m for path, m in bare(model).named_modules() if isinstance(m, BaseTunerLayer)}
    own = tuple(
        f"{PREFIX}{path}.{name}"
        for path, module in layers.items()
        for name in [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
        if name != "base_layer"
    )
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    prefixed = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in state.items()}
    return {
        name: tensor
        for name, tensor in prefixed.items()
        if not name.startswith(own) and ".modules_to_save." not in name and ".original_module." not in name
    }


def check_complete(folder: str | Path, model: PeftModel) -> list[str]:
    """Names in the adapter's file that the model has no place for.

    Raises:
        ExportError: the file lacks a tensor of the adapter, which PEFT would have left as it was made.
    """
    held = set(tensor_shapes(folder))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    lacking = sorted(wanted - held)
    if lacking:
        raise ExportError(
            f"{folder} lacks {len(lacking)} of the {len(wanted)} tensors its config asks for ({lacking[0]}, ...): is "
            "its adapter_config.json another adapter's?"
        )
    return sorted(held - wanted)


def bare(model: nn.Module) -> nn.Module:
    """The model inside PEFT's, or the model itself where transformers has added the adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refusal(model: nn.Module, module: BaseTunerLayer, adapter: str) -> str:
    """Why a tuner layer that is no adapted linear can't become plain LoRA."""
    config = getattr(model, "peft_config", {}).get(adapter)
    if getattr(config, "peft_type", None) == PeftType.LORA:
        return "this is a plain LoRA adapter already: use it as it is."
    return getattr(module, "cannot_export", f"{type(module).__name__} is no update of a linear's weight")
