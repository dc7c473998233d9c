"""y + (dropout(x) A^T) B^T: what every adapted linear computes besides its frozen weight."""

import torch
from torch import Tensor
from torch.nn import functional as F


def low_rank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    """``y + (dropout(x) A^T) B^T``.

    x (..., d_in), y (..., d_out), A (rank, d_in), B (d_out, rank). ``dropout`` is the probability of
    dropping an entry of x, 0 in evaluation.
    """
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(A.dtype)
    if dropout:
        x = F.dropout(x, dropout)
    return y + F.linear(F.linear(x, A), B).to(y.dtype)
