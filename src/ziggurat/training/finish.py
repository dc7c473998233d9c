"""What training has left of an adapter, before it is saved: pruned directions dropped, what acts counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ziggurat.extras import missing

#: Picture of the ranks that pruning has left, beside the adapter.
RANKS_PICTURE = "ranks.png"


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
    if hasattr(model, "ranks") and not missing(["matplotlib"]):
        from ziggurat.methods.lora2.ranks import heat_map

        heat_map(model, model.ranks(), folder / RANKS_PICTURE)
