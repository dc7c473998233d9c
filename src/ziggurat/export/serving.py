"""The one form of plain LoRA that PEFT, vLLM and llama.cpp scale alike.

PEFT scales each module by its own alpha / r, vLLM all of them by one, llama.cpp by alpha over the tensor's rank. So all
modules get one rank, with lora_alpha = r: rows and columns of zeros fill the pairs up.
"""

from collections.abc import Collection

from ziggurat.errors import ExportError

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
