"""Measures of an update's singular values, computed from its factors.

The dense (d_out, d_in) update is never formed. Half-precision factors are computed in float32, float64
stays float64. NaN: from factors it is an error, in a given spectrum it is passed on to the result. Factors on Apple's
GPU, for which torch has no QR decomposition, are decomposed on the processor.
"""

import torch
from torch import Tensor

from ziggurat.errors import ConfigError, ZigguratError


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The singular values of ``B @ A``, descending: min(rank, d_in, d_out) of them, the others are 0.

    With ``B = Q_b R_b`` and ``A^T = Q_a R_a``, ``B A = Q_b (R_b R_a^T) Q_a^T``, so the small matrix
    ``R_b R_a^T`` has the same singular values. Leading dimensions are batches.

    Raises ZigguratError if a factor has NaN or infinite entries.
    """
    A, B = _factors(A, B)
    core = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT
    return torch.linalg.svdvals(core)


def factored_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), s (k) and V (d_in, k) with ``B @ A = U diag(s) V^T``, k = min(rank, d_in, d_out).

    Columns that belong to a singular value of 0 are some orthonormal completion. Raises as `singular_values`.
    """
    A, B = _factors(A, B)
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, s, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, s, Qa @ Vh.mT


def top_k_share(s: Tensor, k: int) -> Tensor:
    """M_eff-k: how much of the update its k strongest directions carry, between k/M and 1.

    ``sum_{i<=k} sigma_i / sum_{i<=M} sigma_i`` (arXiv 2503.21838, Eq. 8) for the M values in the last
    dimension of s, in any order. High means low-rank; an update of zeros gives 0.

    Raises ConfigError if k is below 1.
    """
    if k < 1:
        raise ConfigError(f"top_k_share of k={k} values: k counts singular values, give 1 or more.")
    s = exact(s)
    return _share(s.topk(min(k, s.shape[-1])).values.sum(-1), s.sum(-1))


def effective_rank(s: Tensor) -> Tensor:
    """How many directions an update really uses, between 1 and the number of values in s.

    exp of the entropy of the normalised singular values [Roy & Vetterli 2007]:
    ``exp(-sum_k p_k ln p_k)`` with ``p_k = sigma_k / sum(sigma)``. Scaling the update changes nothing; an
    update of zeros gives 0.
    """
    s = exact(s)
    total = s.sum(-1)
    erank = torch.special.entr(_share(s, total.unsqueeze(-1))).sum(-1).exp()
    return torch.where(total == 0, torch.zeros_like(erank), erank)


def stable_rank(s: Tensor) -> Tensor:
    """``sum_k sigma_k^2 / max_k sigma_k^2``: squared Frobenius over squared spectral norm; 0 for zeros."""
    s = exact(s)
    return _share(s, s.amax(-1, keepdim=True)).square().sum(-1)


def spectrum_kl(s_i: Tensor, s_j: Tensor, smoothing: float = 1e-12) -> Tensor:
    """How far the spectrum of one update is from another's, in nats, at least 0.

    ``KL(P_i || P_j) = sum_k P_ik ln(P_ik / P_jk)`` of the normalised spectra ``P = sigma / sum(sigma)``
    (arXiv 2503.21838, Eq. 9 and 10), compared largest to largest; the shorter spectrum is filled up with
    zeros. ``smoothing`` is added to every share, so a direction that only the first update has costs much
    but not infinitely (at most ``-ln smoothing``); 0 gives the exact, then infinite, value. A spectrum of
    zeros has no shares: NaN.
    """
    spectra = [exact(s).sort(descending=True).values for s in (s_i, s_j)]
    longest = max(s.shape[-1] for s in spectra)
    p, q = (_smoothed_shares(s, longest, smoothing) for s in spectra)
    # xlogy makes 0 ln 0 = 0 where nothing is smoothed.
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1).clamp(min=0)


def numerical_rank(s: Tensor) -> int:
    """The number of values in s (n) above rounding: more than ``n * eps`` of the largest."""
    s = exact(s)
    return int((s > s.amax() * s.numel() * torch.finfo(s.dtype).eps).sum()) if s.numel() else 0


def _factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if A.shape[-2] != B.shape[-1]:
        raise ConfigError(
            f"a spectrum of A {tuple(A.shape)} and B {tuple(B.shape)}: A must be (rank, d_in), B (d_out, rank)."
        )
    for name, factor in (("A", A), ("B", B)):
        if not factor.isfinite().all():
            raise ZigguratError(
                f"factor {name} {tuple(factor.shape)} has NaN or infinite entries, so it has no singular "
                "values: the training diverged or the file is damaged. Lower the learning rate or reload."
            )
    A, B = (factor.cpu() if factor.device.type == "mps" else factor for factor in (A, B))
    return exact(A), exact(B)


def exact(t: Tensor) -> Tensor:
    """t in float32, or as it is in float64."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, torch.zeros_like(part), part / whole)


def _smoothed_shares(s: Tensor, length: int, smoothing: float) -> Tensor:
    s = torch.nn.functional.pad(s, (0, length - s.shape[-1]))
    shares = s / s.sum(-1, keepdim=True) + smoothing
    return shares / shares.sum(-1, keepdim=True)
