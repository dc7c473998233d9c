"""What a spectrum of singular values says about an update, computed from its factors.

Everything here is in float32 at least (half-precision factors are converted first), in float64 for float64.
"""

import torch
from torch import Tensor


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """The singular values of ``B @ A``, descending: min(rank, d_in, d_out) of them, the others are 0.

    With ``B = Q_b R_b`` and ``A^T = Q_a R_a``, ``B A = Q_b (R_b R_a^T) Q_a^T``, so the small matrix
    ``R_b R_a^T`` has the same singular values; the (d_out, d_in) product is never formed.
    """
    A, B = _exact(A), _exact(B)
    core = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT
    return torch.linalg.svdvals(core)


def top_k_share(s: Tensor, k: int) -> Tensor:
    """M_eff-k (arXiv 2503.21838, Eq. 8): the k largest singular values' share of the sum of all; 0 for zeros."""
    s = _exact(s).sort(descending=True).values
    return _share(s[..., :k].sum(-1), s.sum(-1))


def effective_rank(s: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values [Roy & Vetterli 2007]; 0 for zeros."""
    s = _exact(s)
    p = _share(s, s.sum(-1, keepdim=True))
    erank = torch.special.entr(p).sum(-1).exp()
    return torch.where(s.sum(-1) > 0, erank, torch.zeros_like(erank))


def stable_rank(s: Tensor) -> Tensor:
    """``sum_k s_k^2 / max_k s_k^2``, the squared Frobenius over the squared spectral norm; 0 for zeros."""
    s = _exact(s)
    p = _share(s, s.amax(-1, keepdim=True))
    return p.square().sum(-1)


def spectrum_kl(s_i: Tensor, s_j: Tensor, eps: float = 1e-12) -> Tensor:
    """``KL(p_i || p_j) = sum_k p_ik ln(p_ik / p_jk)`` of the normalised spectra (arXiv 2503.21838, Eq. 9, 10)."""
    p, q = (_exact(s).sort(descending=True).values + eps for s in (s_i, s_j))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1)


def principal_cosines(U: Tensor, V: Tensor) -> Tensor:
    """Cosines of the principal angles between the column spaces of U (d, m) and V (d, n), descending."""
    Qu, Qv = torch.linalg.qr(_exact(U)).Q, torch.linalg.qr(_exact(V)).Q
    return torch.linalg.svdvals(Qu.mT @ Qv).clamp(max=1)


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """The principal angles in radians, ascending, between the column spaces of U (d, m) and V (d, n)."""
    return principal_cosines(U, V).acos()


def _exact(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(
        whole > 0, part / torch.where(whole > 0, whole, torch.ones_like(whole)), torch.zeros_like(part)
    )
