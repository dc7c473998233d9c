"""The deviation of the factors from orthonormality, as one differentiable number."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ziggurat.lowrank.spectrum import exact


class Planes(NamedTuple):
    """The factors of one linear layer: outer plane U (k, d_in) and u (d_out, k), inner plane V (r, k) and v (k, r).

    Of all experts of a layer, with the experts in front.
    """

    U: Tensor
    V: Tensor
    v: Tensor
    u: Tensor


def orthogonality(linear_layers: Sequence[Planes]) -> Tensor:
    """||G - I||_F averaged over all factors of all linear layers; G is the Gram matrix of a factor's smaller side.

    U (k, d_in) has rows to be orthonormal, G = U U^T; u (d_out, k) columns, G = u^T u; of V (r, k)
    it is the rows if r <= k and the columns otherwise, of v (k, r) the other way round. The larger
    side can't be orthonormal: its Gram matrix has a rank below its size. Factors without entries count as 0.
    """
    alike: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for planes in linear_layers:
        for factor in planes:
            wide = factor if factor.shape[-2] <= factor.shape[-1] else factor.mT
            matrices = wide.reshape(-1, *wide.shape[-2:])
            alike[(matrices.shape[1:], wide.dtype, wide.device)].append(matrices)
    number = sum(len(matrices) for group in alike.values() for matrices in group)
    parts = []
    for group in alike.values():
        with _full_precision(group[0]):
            stacked = exact(torch.cat(group))
            gram = stacked @ stacked.mT
            identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            parts.append(torch.linalg.vector_norm(gram - identity, dim=(1, 2)).sum() / number)
    return _total(parts)


def cross_plane(linear_layers: Sequence[Planes]) -> Tensor:
    """||(U^T V^T)(v^T u^T)||_F averaged over the linear layers: the norm of (u v)(V U), the update with E = 1.

    From the k x k Gram matrices alone: with C = v V, the square is tr(C^T (u^T u) C (U U^T)).
    """
    parts = []
    for U, V, v, u in linear_layers:
        with _full_precision(U):
            U, V, v, u = exact(U), exact(V), exact(v), exact(u)
            core = v @ V
            square = ((u.mT @ u @ core) * (core @ (U @ U.mT))).sum((-2, -1))
            # The root has no finite derivative at 0; a constant takes its place there.
            tiny = torch.finfo(square.dtype).tiny
            parts.append(torch.where(square > tiny, square.clamp(min=tiny).sqrt(), torch.zeros_like(square)))
    number = sum(part.numel() for part in parts)
    return _total([part.sum() / number for part in parts])


def _total(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        return torch.zeros(())
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device, total.dtype)
    return total


def _full_precision(t: Tensor) -> torch.autocast:
    return torch.autocast(t.device.type if t.device.type != "meta" else "cpu", enabled=False)
