"""Factor pairs: one low-rank update (A, B), and how several become one.

A is (rank, d_in), B is (d_out, rank), the update of the weight is the *delta* ``B @ A``, (d_out, d_in). A scale alpha /
rank is folded into B, so a pair determines its update.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ziggurat.errors import ConfigError

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
#: Dtypes in which a product with a scale is the same whether the scale is a number or a tensor.
_EXACT = (torch.float32, torch.float64)


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
    first = pairs[0]
    d_in, d_out = first.A.shape[1], first.B.shape[0]
    ranks = []
    for A, B in pairs:
        shape, (rows, rank) = A.shape, B.shape
        if shape[0] != rank or shape[1] != d_in or rows != d_out:
            raise _do_not_fit(pairs)
        ranks.append(rank)
    if len(pairs) == 1:
        scale = scales[0]
        return FactorPair(first.A, first.B if scale == 1 else scale * first.B)
    downs, Bs = torch.cat([A for A, _ in pairs]), [B for _, B in pairs]
    if downs.dtype in _EXACT and is_plain(first.B) and is_plain(downs) and not transformed():
        row = _columns_scales(tuple(scales), tuple(ranks), downs.dtype, downs.device)
        return FactorPair(downs, torch.cat(Bs, dim=1) * row)
    return FactorPair(downs, torch.cat([B if s == 1 else s * B for B, s in zip(Bs, scales, strict=True)], dim=1))


@lru_cache(maxsize=1024)
def _columns_scales(
    scales: tuple[float, ...], ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The scale of each column of a stacked B: one operation for all of them, in the dtypes that hold a scale whole."""
    with torch.inference_mode(False):  # a tensor made in inference mode can't be kept for a later backward
        each = [scale for scale, rank in zip(scales, ranks, strict=True) for _ in range(rank)]
        return torch.tensor(each, dtype=dtype, device=device)


def on_device(pair: FactorPair, device: torch.device) -> FactorPair:
    """The pair on `device`, differentiably: a shared one lies on one device, its layers may be spread over several."""
    home = pair.A.device
    if home == pair.B.device and (home == device or home.type == "meta"):
        return pair
    return FactorPair(pair.A.to(device), pair.B.to(device))


def delta(pair: FactorPair) -> Tensor:
    """The dense update ``B @ A``, (d_out, d_in): for merging into a weight. Spectra come from the factors."""
    return pair.B @ pair.A


def inner(a: FactorPair, b: FactorPair) -> float:
    """<dW_a, dW_b>_F = tr(A_b A_a^T B_a^T B_b) in float64, without a dense matrix."""
    return float(((b.A @ a.A.T).double() * (b.B.T @ a.B).double()).sum())


def with_updates(weight: Tensor, pairs: Iterable[FactorPair], transposed: bool) -> Tensor:
    """W + sum of B A, added up in float32 at least and rounded once. `transposed`: W is (d_in, d_out)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide)
    for A, B in pairs:
        update = delta(FactorPair(A.to(wide), B.to(wide))).to(weight.device)
        total = total + (update.mT if transposed else update)
    return total.to(weight.dtype)


def pad(pair: FactorPair, rank: int) -> FactorPair:
    """The same delta with ``rank`` rows in A and columns in B; the added ones are zeros.

    Raises ConfigError if ``rank`` is below the pair's own: cutting would change the delta.
    """
    have = pair.A.shape[-2]
    if rank < have:
        raise ConfigError(f"pad to rank {rank}, but the pair has rank {have}: give at least {have}.")
    extra = rank - have
    return FactorPair(F.pad(pair.A, (0, 0, 0, extra)), F.pad(pair.B, (0, extra)))


def _do_not_fit(pairs: Sequence[FactorPair]) -> ConfigError:
    shapes = ", ".join(f"A {tuple(A.shape)} B {tuple(B.shape)}" for A, B in pairs)
    return ConfigError(f"stack got {shapes}: A (rank, d_in) and B (d_out, rank) must all fit the same linear layer.")


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` is of torch's own class, and not of a subclass that overrides operations."""
    return type(tensor) in _PLAIN


def transformed() -> bool:
    """Whether torch is compiling, tracing, or taking derivatives by torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
