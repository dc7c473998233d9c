"""Factor pairs: one low-rank update (A, B), and how several become one.

A is (rank, d_in), B is (d_out, rank), the update of the weight is the *delta* ``B @ A``, (d_out, d_in).
A scale alpha / rank is folded into B, so a pair says everything about its update.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ziggurat.errors import ConfigError


class FactorPair(NamedTuple):
    """One low-rank update of a linear layer: ``A`` (rank, d_in) goes down, ``B`` (d_out, rank) goes up."""

    A: Tensor
    B: Tensor


def stack(pairs: Sequence[FactorPair], scales: Sequence[float]) -> FactorPair:
    """The pair whose delta is ``sum_i scales[i] * B_i @ A_i``.

    ``A = cat(A_i)`` along the rank, ``B = cat(scales[i] * B_i)``: the ranks add up. This is how the
    three tiers of MSPLoRA (arXiv 2503.21838, Eq. 3 and 4) become one update. Differentiable.
    """
    if len(pairs) != len(scales) or not pairs:
        raise ConfigError(
            f"stack got {len(pairs)} pairs and {len(scales)} scales: give one or more pairs and a scale for each."
        )
    _check_same_layer(pairs)
    if len(pairs) == 1:
        (A, B), scale = pairs[0], scales[0]
        return FactorPair(A, B if scale == 1 else scale * B)
    downs = torch.cat([A for A, _ in pairs])
    ups = torch.cat([B if scale == 1 else scale * B for (_, B), scale in zip(pairs, scales, strict=True)], dim=1)
    return FactorPair(downs, ups)


def on_device(pair: FactorPair, device: torch.device) -> FactorPair:
    """The pair on `device`, differentiably: a shared one lies on one device, its layers may be spread over several."""
    if all(half.device == device or half.device.type == "meta" for half in pair):
        return pair
    return FactorPair(pair.A.to(device), pair.B.to(device))


def delta(pair: FactorPair) -> Tensor:
    """The dense update ``B @ A``, (d_out, d_in): for merging into a weight. Spectra come from the factors."""
    return pair.B @ pair.A


def pad(pair: FactorPair, rank: int) -> FactorPair:
    """The same delta with ``rank`` rows in A and columns in B; the added ones are zeros.

    Raises ConfigError if ``rank`` is below the pair's own: cutting would change the delta.
    """
    have = pair.A.shape[-2]
    if rank < have:
        raise ConfigError(f"pad to rank {rank}, but the pair has rank {have}: give at least {have}.")
    extra = rank - have
    return FactorPair(F.pad(pair.A, (0, 0, 0, extra)), F.pad(pair.B, (0, extra)))


@torch.no_grad()
def init_kaiming_(A: Tensor) -> Tensor:
    """Fill A (rank, d_in) as LoRA does: uniform in ``[-1/sqrt(d_in), 1/sqrt(d_in)]``.

    That is kaiming_uniform with a = sqrt(5): bound ``sqrt(6 / ((1 + a^2) d_in))``.
    """
    bound = 1 / sqrt(A.shape[-1])
    return A.uniform_(-bound, bound)


@torch.no_grad()
def init_gaussian_(A: Tensor) -> Tensor:
    """Fill A (rank, d_in) from a normal distribution with standard deviation ``1 / rank``."""
    return A.normal_(0.0, 1 / A.shape[0])


def _check_same_layer(pairs: Sequence[FactorPair]) -> None:
    d_in, d_out = pairs[0].A.shape[1], pairs[0].B.shape[0]
    if any(A.shape != (B.shape[1], d_in) or B.shape[0] != d_out for A, B in pairs):
        seen = ", ".join(f"A {tuple(A.shape)} B {tuple(B.shape)}" for A, B in pairs)
        raise ConfigError(f"stack got {seen}: A (rank, d_in) and B (d_out, rank) must all fit the same linear.")
