"""The one form of plain LoRA that PEFT, vLLM and llama.cpp scale alike.

PEFT scales each module by its own alpha / r, vLLM all of them by one, llama.cpp by alpha over the tensor's rank. So all
modules get one rank, with lora_alpha = r: rows and columns of zeros fill the pairs up.
"""

from collections.abc import Collection

from ziggurat.errors import ExportError
from ziggurat.lowrank.pair import FactorPair, pad

#: The ranks that vLLM's --max-lora-rank accepts.
SERVING_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def for_servers(pairs: dict[str, FactorPair], others: Collection[str]) -> dict[str, FactorPair]:
    """`pairs`, all of the lowest rank in `SERVING_RANKS` that holds the largest. `others`: names of further tensors.

    Raises:
        ExportError: there are further tensors, which servers reject; or a rank is above the highest.
    """
    if others:
        raise ExportError(
            f"the adapter also holds {len(others)} tensors that are no factor pairs ({next(iter(others))}, ...), from "
            "modules_to_save or bias; servers reject them. Export without --serving, or merge into the model."
        )
    needed = max(pair.A.shape[0] for pair in pairs.values())
    rank = next((allowed for allowed in SERVING_RANKS if allowed >= needed), None)
    if rank is None:
        raise ExportError(
            f"the update's rank is {needed}, and vLLM allows at most {SERVING_RANKS[-1]}: merge into the model instead."
        )
    return {path: pad(pair, rank) for path, pair in pairs.items()}
