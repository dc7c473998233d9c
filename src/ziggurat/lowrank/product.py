"""y + (dropout(x) A^T) B^T: what every adapted linear computes besides its frozen weight.

The two thin products are cheap; what costs is passing over (tokens, d) and keeping copies of it. So this is
one autograd operation that keeps x itself (every linear that reads the same x keeps the same tensor), the
(rank, tokens) product and the dropout mask as bits; a dropped-out copy of x is made again in the backward,
in parts that fit a processor's cache.
"""

import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ziggurat.errors import ConfigError
from ziggurat.lowrank import mask as masks

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_PART = 1 << 20  # bytes of x converted or masked at a time on a CPU


def low_rank_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0, *, reuse_y: bool = False) -> Tensor:
    """``y + (dropout(x) A^T) B^T``.

    ================  =====================================================================
    x                 (..., d_in), any number of leading dimensions, any layout
    y                 (..., d_out), the leading dimensions of x; the result has its dtype
    A, B              (rank, d_in), (d_out, rank), the scale folded into B
    dropout           the probability of zeroing an entry of x, the others are multiplied by
                      1 / (1 - dropout); 0 in evaluation. Rounded to a multiple of 2^-16
    reuse_y           y's memory may take the result. Only for a y that was just computed, that nobody
                      else reads, and whose own backward does not need it: see `owns_output`
    ================  =====================================================================

    As in PEFT, x is converted to A's dtype and the sum is rounded to y's; under autocast the products
    are in autocast's dtype, as `torch.nn.functional.linear` has them. Gradients go to y, x, A and B, twice
    if asked. Where Triton is installed and the GPU and the dtypes suit, Triton kernels do it
    (ZIGGURAT_TRITON=0 in the environment turns them off). When compiling, and for tensor subclasses (DTensor,
    FakeTensor), it is composed of plain operations with torch's own dropout: a compiler fuses them itself.

    Raises ConfigError if the shapes do not fit each other or dropout is outside 0..1.
    """
    _check(y, x, A, B, dropout)
    tensors = (y, x, A, B)
    if torch.compiler.is_compiling() or not all(type(t) in _PLAIN for t in tensors):
        return composed(y, x, A, B, dropout)
    dtype = _product_dtype(x, A)
    if x.is_cuda and (fused := _fused()) and fused.runs_on(x.device) and fused.suits(*tensors, dtype):
        return fused.fused_low_rank_add(y, x, A, B, dropout, dtype, reuse_y)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _LowRankAdd.apply(y, x, A, B, dropout, reuse_y)  # type: ignore[no-any-return]
    mask = masks.draw(x, dropout) if dropout else None
    h = _down(x, mask, _scaled(A, masks.keep_scale(dropout), dtype))
    return _up_add(y, h, B.to(dtype), reuse_y)


def composed(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    """The same value from plain differentiable operations: what is compiled, and what tests compare with."""
    dtype = _product_dtype(x, A)
    x = x.to(dtype)
    if dropout:
        x = F.dropout(x, dropout)
    return (y + F.linear(F.linear(x, A.to(dtype)), B.to(dtype))).to(y.dtype)


def owns_output(module: nn.Module) -> bool:
    """Whether what ``module`` returns is new and read by nobody else, so `low_rank_add` may reuse its memory.

    True for exactly `torch.nn.Linear` with its own forward and without hooks: a hook could keep the output,
    a subclass or a replaced forward could return anything.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (module._forward_hooks or nn.modules.module._global_forward_hooks)
    )


@cache
def _fused() -> ModuleType | None:
    if os.environ.get("ZIGGURAT_TRITON", "1") == "0":
        return None
    try:
        from ziggurat.lowrank import triton_product
    except ImportError:
        return None
    return triton_product


class _LowRankAdd(torch.autograd.Function):
    """out = y + h^T B^T with h = s A (x * m)^T, m the mask, s its scale; g = dL/dout, (tokens, d_out).

    dL/dy = g;  dL/dB = (h g)^T;  dL/dh = (g B)^T;  dL/dA = s dL/dh (x * m);  dL/dx = (dL/dh^T s A) * m.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float, reuse_y: bool
    ) -> Tensor:
        _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        ctx.dtype, ctx.scale = _product_dtype(x, A), masks.keep_scale(dropout)
        ctx.x_dtype, ctx.A_dtype, ctx.B_dtype = x.dtype, A.dtype, B.dtype
        mask = masks.draw(x, dropout) if dropout else None
        h = _down(x, mask, _scaled(A, ctx.scale, ctx.dtype))
        ctx.save_for_backward(
            x if need_A or need_B else None,
            h if need_B else None,
            mask if need_x or need_A or need_B else None,
            A if need_x or need_B else None,
            B if need_x or need_A else None,
        )
        return _up_add(y, h, B.to(ctx.dtype), reuse_y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_y, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        x, h, mask, A, B = ctx.saved_tensors
        # With grad mode on, this backward is itself differentiated: nothing in place, and h comes from x and A.
        once = not torch.is_grad_enabled()
        dA = dB = dx = None
        rows = _flat(g).to(ctx.dtype)
        if need_B:
            if not once:
                h = _scaled(A, ctx.scale, ctx.dtype) @ _dropped(x, mask, ctx.dtype).T
            dB = (h @ rows).T.to(ctx.B_dtype)
        if need_x or need_A:
            dh = rows @ B.to(ctx.dtype)
            if need_A:
                dA = _dA(dh, x, mask) if once else dh.T @ _dropped(x, mask, ctx.dtype)
                dA = dA.to(ctx.A_dtype) if mask is None else dA.to(ctx.A_dtype) * ctx.scale
            if need_x:
                dx = (dh @ _scaled(A, ctx.scale, ctx.dtype)).view(*g.shape[:-1], A.shape[1])
                dx = (dx if mask is None else masks.apply(dx, mask, in_place=once)).to(ctx.x_dtype)
        return g if need_y else None, dx, dA, dB, None, None


def _down(x: Tensor, mask: Tensor | None, A: Tensor) -> Tensor:
    """A (x * m)^T, (rank, tokens), in A's dtype."""
    if _fits_one_part(x, mask, A.dtype):
        return A @ _dropped(x, mask, A.dtype).T
    h = A.new_empty(A.shape[0], x.numel() // x.shape[-1])
    for start, part in _parts(x, mask, A.dtype):
        torch.mm(A, part.T, out=h[:, start : start + part.shape[0]])
    return h


def _up_add(y: Tensor, h: Tensor, B: Tensor, reuse_y: bool) -> Tensor:
    """y + h^T B^T in y's dtype and shape."""
    if y.dtype != B.dtype:
        return (_flat(y) + h.T @ B.T).to(y.dtype).view(y.shape)
    if reuse_y and y.is_contiguous():
        # detach() shares y's version counter: had somebody saved y for a backward, that would raise there.
        out = y.detach()
        _flat(out).addmm_(h.T, B.T)
        return out
    return torch.addmm(_flat(y), h.T, B.T).view(y.shape)


def _dA(dh: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """dh^T (x * m), (rank, d_in), for dh (tokens, rank)."""
    if _fits_one_part(x, mask, dh.dtype):
        return dh.T @ _dropped(x, mask, dh.dtype)
    total = dh.new_zeros(dh.shape[1], x.shape[-1])
    for start, part in _parts(x, mask, dh.dtype):
        total.addmm_(dh[start : start + part.shape[0]].T, part)
    return total


def _fits_one_part(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> bool:
    # Parts save a copy's trip through memory; without a copy, on other devices, and where adding up the
    # parts' products would round more often (half precision), x is taken whole.
    no_copy = mask is None and x.dtype == dtype
    exact = dtype in (torch.float32, torch.float64)
    return no_copy or not exact or x.device.type != "cpu" or x.numel() * dtype.itemsize <= _PART


def _parts(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """x * m in ``dtype``, some rows at a time, each with the number of its first row."""
    x = _flat(x)
    rows = max(1, _PART // (8 * x.shape[-1] * dtype.itemsize)) * 8  # whole bytes of the mask
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows].to(dtype)
        yield start, part if mask is None else masks.apply(part, mask, start=start * x.shape[-1])


def _dropped(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = _flat(x.to(dtype))
    return x if mask is None else masks.apply(x, mask)


def _scaled(A: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    # The scale goes to the small factor, not to (tokens, d), and before rounding to a shorter dtype.
    return (A if scale == 1 else A * scale).to(dtype)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _product_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, A.dtype):
        return torch.get_autocast_dtype(device)
    return A.dtype


def _check(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> None:
    fits = (
        y.shape[:-1] == x.shape[:-1] and A.shape == (B.shape[1], x.shape[-1]) and B.shape == (y.shape[-1], A.shape[0])
    )
    if not fits:
        raise ConfigError(
            f"low_rank_add got x {tuple(x.shape)}, y {tuple(y.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}: "
            "x must be (..., d_in), y (..., d_out) with the same leading dimensions, A (rank, d_in) and "
            "B (d_out, rank)."
        )
    if not 0 <= dropout <= 1:
        raise ConfigError(f"dropout={dropout}: it is a probability, give 0 to 1.")
