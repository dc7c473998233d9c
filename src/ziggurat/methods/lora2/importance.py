"""The importance of directions: sensitivities of the small factors, smoothed, and the choice of the best.

Pure functions on tensors; the importance of AdaLoRA (arXiv 2303.10512), read from the inner plane alone (LoRA², arXiv
2408.06854). The entries of one linear layer lie in a matrix (r, 1 + 2 k): row i holds the entries of direction i: E_i,
V's row i and v's column i.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Importance(NamedTuple):
    """Running averages, each (..., r, 1 + 2 k): of the sensitivities, and of how uncertain they are."""

    mean: Tensor
    uncertainty: Tensor


def entries(E: Tensor, V: Tensor, v: Tensor) -> Tensor:
    """E (..., r), V (..., r, k) and v (..., k, r) as (..., r, 1 + 2 k), one row a direction."""
    return torch.cat([E.unsqueeze(-1), V, v.mT], dim=-1)


def sensitivity(weights: Tensor, gradients: Tensor) -> Tensor:
    """|w * grad| of every entry: how much the loss would change, to first order, without it."""
    return (weights * gradients).abs()


def smooth(old: Importance, sensed: Tensor, beta1: float, beta2: float) -> Importance:
    """Exponential averages I <- beta1 I + (1 - beta1) s and U <- beta2 U + (1 - beta2) |s - I|, I being the new one."""
    mean = beta1 * old.mean + (1 - beta1) * sensed
    return Importance(mean, beta2 * old.uncertainty + (1 - beta2) * (sensed - mean).abs())


def scores(importance: Importance, k: int) -> Tensor:
    """The score of each direction, (..., r): score(E_i) + mean score of V's row i + mean score of v's column i.

    The score of an entry is its mean sensitivity times its uncertainty.
    """
    each = importance.mean * importance.uncertainty
    return each[..., 0] + each[..., 1 : 1 + k].mean(-1) + each[..., 1 + k :].mean(-1)


def survivors(scored: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Masks, True for the `budget` best of all directions together; `scored` holds one (r,) for each linear layer.

    Exactly min(budget, all) survive. Equal scores are decided by position: the direction that
    comes first, layer by layer, stays. NaN counts as the lowest.
    """
    together = torch.cat([s.detach().float().cpu() for s in scored])
    together = torch.where(together.isnan(), torch.full_like(together, -torch.inf), together)
    order = torch.sort(together, descending=True, stable=True).indices
    mask = torch.zeros(len(together), dtype=torch.bool)
    mask[order[: max(budget, 0)]] = True
    return list(mask.split([len(s) for s in scored]))
