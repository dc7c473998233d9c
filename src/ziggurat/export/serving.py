"""The one form of plain LoRA that PEFT, vLLM and llama.cpp scale alike.

PEFT scales each module by its own alpha / r, vLLM all of them by one, llama.cpp by alpha over the tensor's rank. So all
modules get one rank, with lora_alpha = r: rows and columns of zeros fill the pairs up.
"""

from collections.abc import Collection

import torch
from torch import nn

from ziggurat.errors import ExportError
from ziggurat.host.linear import AdaptedLinear

#: The ranks that vLLM's --max-lora-rank accepts.
SERVING_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def serving_rank(needed: int, tensors: Collection[str]) -> int:
    """The lowest of `SERVING_RANKS` that holds pairs of rank `needed`. `tensors`: all names in the plain LoRA.

    Raises:
        ExportError: some are no factors of a pair, which servers reject; or the rank is above the highest.
    """
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise ExportError(
            f"the adapter also holds {len(others)} tensors that are no factor pairs ({others[0]}, ...), from "
            "modules_to_save or bias; servers reject them. Export without --serving, or merge into the model."
        )
    rank = next((allowed for allowed in SERVING_RANKS if allowed >= needed), None)
    if rank is None:
        raise ExportError(
            f"the update's rank is {needed}, and vLLM allows at most {SERVING_RANKS[-1]}: merge into the model instead."
        )
    return rank


@torch.no_grad()
def cost_of_serving(model: nn.Module, adapter: str = "default") -> str | None:
    """The cost in servers of plain LoRA of tiers whose ranks add up, in words; None if `adapter` has LoRA's rank."""
    layers: list[AdaptedLinear] = [m for m in model.modules() if isinstance(m, AdaptedLinear) and adapter in m.adapters]
    if not layers or any(layer.method.pair is None for layer in layers):  # nothing that becomes plain LoRA
        return None
    r: int = layers[0].configs[adapter].largest_rank
    rank = max(layer.effective_pair(adapter).A.shape[-2] for layer in layers)
    padded = next((allowed for allowed in SERVING_RANKS if allowed >= rank), rank)
    usual = next((allowed for allowed in SERVING_RANKS if allowed >= r), r)
    if padded <= usual:
        return None
    return (
        f"as plain LoRA it has rank {rank}, which servers pad to {padded}: {padded / usual:g} times the memory and "
        f"time of LoRA r {r} there"
    )
