"""What an adapter holds: the effective pair of every linear, the tensors beside them; and whether its file has all."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ziggurat.errors import ExportError
from ziggurat.host.bank import Bank
from ziggurat.host.folder import tensor_shapes
from ziggurat.host.linear import AdaptedLinear
from ziggurat.host.vocabulary import embedding_names, has_grown
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
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, Bank | TrainableTokensLayer):
            raise ExportError(f"{path}: {_refusal(model, module, adapter)}")
    if not pairs:
        names = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ExportError(f"adapter {adapter!r} adapts no linear of this model; its adapters: {names}.")
    return pairs


def other_tensors(model: nn.Module, adapter: str, saved: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """What PEFT saves of the adapter beside the method's own factors: modules_to_save, biases, grown embeddings.

    `saved`: the names in the adapter's file, where it comes from one; whose embeddings go along, but for those below an
    adapter that are as the base has them.

    With bias="all" PEFT names the biases of modules_to_save twice, once by where they stand in the wrapper.
    """
    layers: dict[str, Any] = {
        path: module
        for path, module in bare(model).named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)
    }
    own = tuple(
        f"{PREFIX}{path}.{name}"
        for path, module in layers.items()
        for name in [*dict(module.named_children()), *dict(module.named_parameters(recurse=False))]
        if name != "base_layer"
    )
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    prefixed = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in state.items()}
    base = bare(model)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    grown, other = has_grown(base, config), getattr(config, "no_factors", ())
    weights = {name if name.startswith(PREFIX) else PREFIX + name: p for name, p in model.state_dict().items()}
    known = {
        name: weights[name]
        for name in embedding_names(base, weights)
        if (saved is None or name in saved) and (grown or (saved and not name.endswith(".base_layer.weight")))
    }
    return known | {
        name: tensor
        for name, tensor in prefixed.items()
        if not name.startswith(own)
        and ".modules_to_save." not in name
        and ".original_module." not in name
        and name.rpartition(".")[2] not in other
    }


def check_complete(folder: str | Path, model: PeftModel) -> list[str]:
    """Names in the adapter's file that the model has no place for.

    Raises:
        ExportError: the file lacks a tensor of the adapter, which PEFT would have left as it was made.
    """
    held = set(tensor_shapes(folder))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    beside = embedding_names(bare(model), held | wanted)  # which PEFT saves or leaves out as it sees fit
    lacking = sorted(wanted - held - beside)
    if lacking:
        raise ExportError(
            f"{folder} lacks {len(lacking)} of the {len(wanted)} tensors its config asks for ({lacking[0]}, ...): is "
            "its adapter_config.json another adapter's?"
        )
    # Of an embedding that is tied PEFT writes the rows that train twice.
    return sorted(name for name in held - wanted - beside if not name.endswith(".trainable_tokens_delta"))


def bare(model: nn.Module) -> nn.Module:
    """The model inside PEFT's, or the model itself where transformers has added the adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refusal(model: nn.Module, module: BaseTunerLayer, adapter: str) -> str:
    """Why a tuner layer that is no adapted linear can't become plain LoRA."""
    config = getattr(model, "peft_config", {}).get(adapter)
    if getattr(config, "peft_type", None) == PeftType.LORA:
        return "this is a plain LoRA adapter already: use it as it is."
    return getattr(module, "cannot_export", f"{type(module).__name__} is no update of a linear's weight")
