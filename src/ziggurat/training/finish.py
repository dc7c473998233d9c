"""What training has left of an adapter, before it is saved: put together, pruned directions dropped, counted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Picture of the ranks that pruning has left, beside the adapter.
RANKS_PICTURE = "ranks.png"


def make_whole(model: nn.Module) -> None:
    """Give `model` each trained parameter in one piece where FSDP2 or ZeRO-3 keeps a piece of it on every process.

    All processes call it, and none uses the model in a forward afterwards: what the strategy knows of the pieces is
    left behind. A parameter that many layers share is owned, and so put together, once.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    whole = {key: _whole(parameter) for key, parameter in trained.items()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            tensor = whole.get(id(parameter))
            if tensor is not None and tensor is not parameter:
                module._parameters[name] = nn.Parameter(tensor)


def _whole(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().detach()  # type: ignore[operator]
    if hasattr(parameter, "ds_id"):
        from deepspeed.zero import GatheredParameters  # type: ignore[import-not-found]

        with GatheredParameters([parameter]), torch.no_grad():
            return parameter.detach().clone()
    return parameter


def settle(model: Any) -> dict[str, int]:
    """Drop the directions that LoRA² has pruned; how many numbers of the adapter act now. Outputs don't change.

    Empty for methods whose structure training doesn't change.
    """
    if hasattr(model, "compact"):
        if any(model.ranks().values()):
            model.compact()
        prefix = model.base_model.prefix
        return {"active": sum(p.numel() for name, p in model.named_parameters() if prefix in name)}
    return dict(model.path_counts()) if hasattr(model, "path_counts") else {}


def draw_ranks(model: Any, folder: Path) -> None:
    """Draw LoRA²'s ranks, layers by roles, into `folder`, where matplotlib is installed."""
    if hasattr(model, "ranks") and importlib.util.find_spec("matplotlib"):
        from ziggurat.methods.lora2.ranks import heat_map

        heat_map(model, model.ranks(), folder / RANKS_PICTURE)
